"""Which model is planned for: a checkpoint, a config.json alone, or a name whose dimensions come with mull."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ConfigError
from workers.config import ModelConfig

_DATA = Path(__file__).parent / "data" / "models"


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """A model's dimensions, and what it is called."""

    name: str
    path: str
    """For the flags of the recommendation: where the checkpoint lies, or a place to put it."""
    config: ModelConfig


def known_models() -> list[str]:
    """Names that need no file."""
    return sorted(file.stem for file in _DATA.glob("*.json"))


def find_model(asked: str) -> PlannedModel:
    """A directory with config.json, a config file, or a known name. Raises ConfigError or CheckpointError."""
    path = Path(asked)
    if (path / "config.json").is_file():
        return PlannedModel(name=path.resolve().name, path=asked, config=ModelConfig.from_dir(path))
    if path.is_file():
        return PlannedModel(name=path.stem, path=str(path.parent), config=ModelConfig.from_file(path))
    known = _DATA / f"{asked.lower()}.json"
    if known.is_file():
        return PlannedModel(name=asked.lower(), path=f"/models/{asked.lower()}", config=ModelConfig.from_file(known))
    raise ConfigError(
        f"{asked}: {'a directory without config.json' if path.is_dir() else 'no such directory or file'}; give a "
        f"checkpoint's directory, a config.json or one of {', '.join(known_models())}"
    )
