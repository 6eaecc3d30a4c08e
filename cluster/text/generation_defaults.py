"""What a checkpoint's generation_config.json says: default sampling and the tokens that end a turn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.text.model_files import REMEDY, read_json
from cluster.text.sampling_ranges import SAMPLING_RANGES
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
    def from_dir(cls, model_dir: Path, vocab_size: int) -> GenerationDefaults:
        """Read generation_config.json, for the stop ids also config.json. Raises CheckpointError."""
        file = model_dir / "generation_config.json"
        values = read_json(file)
        eos_file = file
        if values.get("eos_token_id") is None:
            eos_file = model_dir / "config.json"
        greedy = values.get("do_sample") is False
        return cls(
            temperature=0.0 if greedy else _number(file, values, "temperature", 1.0),
            top_k=_integer(file, values, "top_k", 0),
            top_p=_number(file, values, "top_p", 1.0),
            min_p=_number(file, values, "min_p", 0.0),
            repetition_penalty=_number(file, values, "repetition_penalty", 1.0),
            stop_token_ids=_token_ids(eos_file, read_json(eos_file).get("eos_token_id"), vocab_size),
        )


def _number(file: Path, values: dict[str, Any], name: str, absent: float) -> float:
    value = values.get(name)
    if value is None:
        return float(absent)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"{file}: {name} is {value!r}, expected a number; {REMEDY}")
    number = float(str(value))  # by its text, because an integer of 400 digits is no float but has one: infinity
    if number not in SAMPLING_RANGES[name]:
        raise CheckpointError(f"{file}: {name} {number:g} is outside of {SAMPLING_RANGES[name]}; {REMEDY}")
    return number


def _integer(file: Path, values: dict[str, Any], name: str, absent: int) -> int:
    value = _number(file, values, name, absent)
    if not value.is_integer():
        raise CheckpointError(f"{file}: {name} is {value:g}, expected an integer; {REMEDY}")
    return int(value)


def _token_ids(file: Path, eos: Any, vocab_size: int) -> frozenset[int]:
    ids = eos if isinstance(eos, list) else [eos]
    if not ids or not all(type(token_id) is int and 0 <= token_id < vocab_size for token_id in ids):
        raise CheckpointError(
            f"{file}: eos_token_id is {eos!r}, expected a token id below {vocab_size} or a list of them; {REMEDY}"
        )
    return frozenset(ids)
