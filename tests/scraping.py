"""A metrics port as Prometheus reads it."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from cluster.metrics.plain import Kind, MetricSpec


@dataclass(frozen=True)
class Scrape:
    """What a port said once."""

    text: str

    @property
    def families(self) -> list[Metric]:
        return list(text_string_to_metric_families(self.text))

    @property
    def samples(self) -> list[Sample]:
        return [sample for family in self.families for sample in family.samples]

    def all(self, name: str) -> dict[tuple[str, ...], float]:
        """Values by label values, in the order in which they are written."""
        return {tuple(it.labels.values()): it.value for it in self.samples if it.name == name}

    def one(self, name: str, **labels: str) -> float:
        (value,) = [it.value for it in self.samples if it.name == name and it.labels == labels]
        return value


def scrape(url: str) -> Scrape:
    with urllib.request.urlopen(url, timeout=60) as reply:
        return Scrape(reply.read().decode())


async def scraped(address: str) -> Scrape:
    """The port at host:port; the server may live in this very loop."""
    return await asyncio.to_thread(scrape, f"http://{address}/metrics")


def check_as_prometheus_does(said: Scrape) -> None:
    """Its own linter of metrics; skips the test where it is not installed."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    done = subprocess.run(
        [promtool, "check", "metrics"], input=said.text, capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def check_against_table(said: Scrape, specs: Iterable[MetricSpec]) -> None:
    """What the table has is served, with its type, help, labels and buckets; else only what is said of the process."""
    served = {family.name: family for family in said.families if not family.name.startswith("process_")}
    wanted = {spec.name.removesuffix("_total"): spec for spec in specs}
    assert served.keys() == wanted.keys()
    for name, spec in wanted.items():
        family = served[name]
        assert (family.type, family.documentation) == (spec.kind.value, spec.text)
        for sample in family.samples:
            assert sample.labels.keys() - {"le"} == set(spec.labels), sample
        if spec.kind is Kind.HISTOGRAM:
            bounds = {float(it.labels["le"]) for it in family.samples if it.name.endswith("_bucket")}
            assert bounds == {*spec.buckets, float("inf")}
