"""Numbers as people write them on a command line, 2k tokens, 2/s, 5m, and as they are shown to them.

k, M and G are thousands; Ki, Mi and Gi powers of two.
"""

from __future__ import annotations

import re

from cluster.errors import ConfigError

_FACTORS = {"": 1, "k": 10**3, "K": 10**3, "m": 10**6, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"


def parse_count(text: str) -> int:
    """ "2k" -> 2000, "32Ki" -> 32768. Raises ConfigError."""
    match = re.fullmatch(rf"{_NUMBER}\s*(Ki|Mi|Gi|k|K|m|M|G)?", text.strip())
    count = float(match[1]) * _FACTORS[match[2] or ""] if match else 0.0
    if count < 1 or count != int(count):
        raise ConfigError(f"{text!r} is no count; write it as 512, 2k (2,000) or 2Ki (2,048)")
    return int(count)


def parse_duration_s(text: str) -> float:
    """ "5m" -> 300.0; a bare number is in seconds. Raises ConfigError."""
    match = re.fullmatch(rf"{_NUMBER}\s*(ms|s|min|m|h|d)?", text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is no duration; write it as 500ms, 30s, 5m, 2h or 1d")
    return float(match[1]) * _SECONDS[match[2] or "s"]


def parse_rate_per_s(text: str) -> float:
    """ "120/min" -> 2.0; a bare number is per second. Raises ConfigError."""
    match = re.fullmatch(rf"{_NUMBER}\s*(k|M)?\s*(?:/\s*(s|min|m|h|d))?", text.strip())
    rate = float(match[1]) * _FACTORS[match[2] or ""] / _SECONDS[match[3] or "s"] if match else 0.0
    if rate <= 0:
        raise ConfigError(f"{text!r} is no rate; write it as 2/s, 90/min or 1k/h")
    return rate


def plain(value: float) -> str:
    """12,000 · 12 · 1.2 · 0.12"""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
