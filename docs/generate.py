"""Makes docs/metrics.md from cluster/metrics. `python docs/generate.py`, with --check only a comparison."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cluster.config import GatewayConfig, RouterConfig
from cluster.metrics import gateway, router
from cluster.metrics.plain import Kind, MetricSpec

PAGE = Path(__file__).parent / "metrics.md"

PORTS = GatewayConfig().metrics_port, RouterConfig().metrics_port
HEAD = f"""# Metrics

Made from `cluster/metrics/` by `make docs`.

Each Gateway has a port for Prometheus, `gateway.metrics_port` ({PORTS[0]}), and each Router has one,
`router.metrics_port` ({PORTS[1]}); further ones on a machine take the next ports. One Router is one copy of the model,
and reports for its ranks. `mull serve` prints all of them when it is ready. They are plain HTTP without keys, whatever
the ports for clients ask for. Beside `/metrics`, `/ready` says whether work is taken (200), or why not (503).

Units are seconds, bytes and tokens. Tokens are counted once for each message or step, in plain numbers. Series whose
labels are known beforehand start at 0, so that `rate()` and `increase()` miss nothing. `tenant` is the name in the keys
file, empty without one. Both ports have `process_*` as well: CPU, memory and files, as every client of Prometheus has.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_section("Gateway", gateway.SPECS), *_section("Router", router.SPECS), *_buckets()])


def _section(name: str, specs: Sequence[MetricSpec]) -> Iterator[str]:
    yield f"## {name}\n\n| metric | type | labels | meaning | known as |\n|---|---|---|---|---|"
    for spec in specs:
        labels = ", ".join(f"`{label}`" for label in spec.labels)
        known_as = ", ".join(f"`{name}`" for name in spec.known_as)
        yield f"| `{spec.name}` | {spec.kind.value} | {labels} | {spec.text} | {known_as} |"
    yield ""


def _buckets() -> Iterator[str]:
    yield "## Buckets\n\nUpper bounds of the histograms.\n\n| histograms | bounds |\n|---|---|"
    by_bounds: dict[tuple[float, ...], list[str]] = {}
    for spec in (*gateway.SPECS, *router.SPECS):
        if spec.kind is Kind.HISTOGRAM:
            names = by_bounds.setdefault(spec.buckets, [])
            names += [f"`{spec.name}`"] if f"`{spec.name}`" not in names else []
    for bounds, names in by_bounds.items():
        yield f"| {', '.join(names)} | {', '.join(f'{bound:.10g}' for bound in bounds)} |"
    yield ""


def main() -> int:
    made = page()
    is_stale = not PAGE.exists() or PAGE.read_text() != made
    if "--check" in sys.argv[1:]:
        if is_stale:
            print("docs/metrics.md is not what cluster/metrics says; run `make docs`", file=sys.stderr)
        return int(is_stale)
    PAGE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
