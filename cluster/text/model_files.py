"""The JSON and text files of a checkpoint directory that text needs, read with errors that name file and remedy.

Knows nothing of what the files mean.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from workers.errors import CheckpointError

REMEDY = "copy the whole checkpoint directory again"


def read_text(file: Path) -> str:
    """The text of `file`. Raises CheckpointError."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing; {REMEDY}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); {REMEDY}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises CheckpointError."""
    try:
        values = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file}: is not JSON ({error}); {REMEDY}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(values).__name__}; {REMEDY}")
    return values
