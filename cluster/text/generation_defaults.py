"""What a checkpoint's generation_config.json says: default sampling and the tokens that end a turn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.text.model_files import REMEDY, read_json
from workers.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """Sampling for requests that do not say, and stop ids for all."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    stop_token_ids: frozenset[int]

    @classmethod
    def from_dir(cls, model_dir: Path) -> GenerationDefaults:
        """Read generation_config.json, for the stop ids also config.json. Raises CheckpointError."""
        file = model_dir / "generation_config.json"
        values = read_json(file)
        eos = values.get("eos_token_id")
        if eos is None:
            eos = read_json(model_dir / "config.json").get("eos_token_id")
        greedy = values.get("do_sample") is False
        return cls(
            temperature=0.0 if greedy else _number(file, values, "temperature", 1.0),
            top_k=int(_number(file, values, "top_k", 0)),
            top_p=_number(file, values, "top_p", 1.0),
            min_p=_number(file, values, "min_p", 0.0),
            repetition_penalty=_number(file, values, "repetition_penalty", 1.0),
            stop_token_ids=_token_ids(file, eos),
        )


def _number(file: Path, values: dict[str, Any], name: str, absent: float) -> float:
    value = values.get(name)
    if value is None:
        return absent
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"{file}: {name} is {value!r}, expected a number; {REMEDY}")
    return float(value)


def _token_ids(file: Path, eos: Any) -> frozenset[int]:
    ids = eos if isinstance(eos, list) else [eos]
    if not ids or not all(isinstance(token_id, int) and token_id >= 0 for token_id in ids):
        raise CheckpointError(f"{file}: eos_token_id is {eos!r}, expected a token id or a list of them; {REMEDY}")
    return frozenset(ids)
