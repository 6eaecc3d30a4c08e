"""Plain values and YAML files → ClusterConfig, with errors of one line that say what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.config import ClusterConfig
from cluster.errors import ConfigError

_PARTS = ", ".join(f"'{part}'" for part in ClusterConfig.model_fields)


def parse_config(values: dict[str, Any]) -> ClusterConfig:
    """Validate nested values. Raises ConfigError with one line that names the first wrong field."""
    try:
        return ClusterConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        got = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
        words = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {words}{got}".removeprefix(": ")) from error


def read_config(file: Path) -> dict[str, dict[str, Any]]:
    """The nested values of a YAML file. Raises ConfigError when it is missing or is not a mapping of mappings."""
    try:
        values = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read as YAML ({error})".replace("\n", " ")) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected a mapping with {_PARTS}")
    for part, inner in values.items():
        if not isinstance(inner, dict):
            raise ConfigError(f"{file}: '{part}' is {inner!r}, expected a mapping of its settings")
    return values
