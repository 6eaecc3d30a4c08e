"""A metrics port as Prometheus reads it."""

from __future__ import annotations

import asyncio
import urllib.request
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


@dataclass(frozen=True)
class Scrape:
    """What a port said once."""

    text: str

    @property
    def samples(self) -> list[Sample]:
        return [sample for family in text_string_to_metric_families(self.text) for sample in family.samples]

    def all(self, name: str) -> dict[tuple[str, ...], float]:
        """Values by label values, in the order in which they are written."""
        return {tuple(it.labels.values()): it.value for it in self.samples if it.name == name}

    def one(self, name: str, **labels: str) -> float:
        (value,) = [it.value for it in self.samples if it.name == name and it.labels == labels]
        return value


def scrape(url: str) -> Scrape:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return Scrape(reply.read().decode())


async def scraped(address: str) -> Scrape:
    """The port at host:port; the server may live in this very loop."""
    return await asyncio.to_thread(scrape, f"http://{address}/metrics")
