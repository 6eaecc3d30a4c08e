"""The screen of `mull top`: what clients feel, what the model does, how each copy is, and troubles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cluster.top.figures import LONG_S, Figures, History

_BARS = "▁▂▃▄▅▆▇█"
_PANEL_WIDTH = 38
_LINE_WIDTH = 30
_FULL, _TIGHT = 0.95, 0.8
"""Shares of the KV pool from which on it is red, and yellow."""


def screen(history: History, time_text: str) -> RenderableType:
    """All of it; it fits 80 columns, and uses more."""
    gateways, routers = history.gateways(), history.all_routers()
    panels = (_tokens(gateways), _requests(gateways, routers), _latency(gateways, routers), _thoughts(gateways))
    parts: list[RenderableType] = [_head(gateways, routers, time_text)]
    parts += [Text(f"{address}: {why}", style="red") for address, why in history.now.errors.items()]
    parts += [_SideBySide(panels), _copies(history.routers())]
    parts.append(_troubles(f"in the last {LONG_S:.0f} s: ", gateways, routers))
    parts.append(_troubles("since they started: ", gateways.ever, routers.ever))
    return Group(*parts)


class _SideBySide:
    """Panels in as many columns as have room, of those that leave no gap."""

    def __init__(self, panels: Sequence[RenderableType]) -> None:
        self._panels = panels

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        num_columns = next((num for num in (4, 2) if num * _PANEL_WIDTH <= options.max_width), 1)
        grid = Table.grid()
        for start in range(0, len(self._panels), num_columns):
            grid.add_row(*self._panels[start : start + num_columns])
        yield grid


def _head(gateways: Figures, routers: Figures, time_text: str) -> Text:
    ports = [*gateways.now, *routers.now]
    model = next((name for port in ports if (name := port.text("mull_build_info", "model"))), "")
    release = next((name for port in ports if (name := port.text("mull_build_info", "version"))), "")
    num_ready, num_gateways = gateways.value("mull_gateway_ready") or 0, len(gateways.now)
    state = ("ready", "green") if num_gateways and num_ready == num_gateways else ("not ready", "red")
    told = f"{num_ready:.0f} of {num_gateways} gateways · {len(routers.now)} Routers · {time_text}"
    return Text.assemble(("mull", "bold"), f" {release} · {model} · ", state, f" · {told}")


def _tokens(gateways: Figures) -> Panel:
    name = "mull_generation_tokens_total"
    cached = gateways.ratio("mull_cached_prompt_tokens_total", "mull_prompt_tokens_total")
    rows = [
        ("thinking", _per_s(gateways.rate(name, phase="thinking"))),
        ("answer", _per_s(gateways.rate(name, phase="answer"))),
        ("prompt", _per_s(gateways.rate("mull_prompt_tokens_total"))),
        ("prompt from the cache", _percent(cached)),
    ]
    return _panel("tokens a second", rows, line(gateways.rates(name)))


def _requests(gateways: Figures, routers: Figures) -> Panel:
    rows = [
        ("streams open", _count(gateways.value("mull_streams_open"))),
        ("running", _count(routers.value("mull_requests_running"))),
        ("  in thought / in answer", _pair(routers, "mull_requests_thinking", "mull_requests_answering")),
        ("waiting", _count(routers.value("mull_requests_waiting"))),
        ("finished a second", _decimal(gateways.rate("mull_requests_finished_total"))),
    ]
    return _panel("requests", rows)


def _latency(gateways: Figures, routers: Figures) -> Panel:
    rows = [
        ("first token", _quantiles(gateways, "mull_time_to_first_token_seconds")),
        ("first answer", _quantiles(gateways, "mull_time_to_first_answer_seconds")),
        ("between tokens", _quantiles(gateways, "mull_inter_token_latency_seconds")),
        ("whole request", _quantiles(gateways, "mull_e2e_request_latency_seconds")),
        ("in the queue", _quantiles(routers, "mull_request_queue_time_seconds")),
    ]
    return _panel("times: median / 95 %", rows)


def _thoughts(gateways: Figures) -> Panel:
    name = "mull_thinking_ended_total"
    ended = gateways.grown_by(name, "reason") or gateways.ever.grown_by(name, "reason")
    rows = [
        ("thinking tokens, mean", _decimal(gateways.mean("mull_thinking_tokens"))),
        ("answer tokens, mean", _decimal(gateways.mean("mull_answer_tokens"))),
        ("time in thought, mean", _time(gateways.mean("mull_thinking_seconds"))),
        ("thoughts ended", _counts(ended) or "–"),
    ]
    return _panel("thoughts", rows)


def _copies(routers: Sequence[tuple[str, Figures]]) -> RenderableType:
    names = ("copy", "", "ranks", "run", "wait", "KV", "cache", "steps/s", "step", "batch", "experts")
    table = Table(*names, box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.columns[0].no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for address, figures in routers:
        table.add_row(address, *_copy(figures))
    return table


def _copy(figures: Figures) -> Iterable[RenderableType]:
    used = figures.value("mull_kv_usage_ratio")
    imbalance = [port.by("mull_expert_imbalance_ratio", "layers") for port in figures.now]
    worst = max((ratio for ratios in imbalance for ratio in ratios.values()), default=None)
    is_ready = figures.value("mull_engine_ready")
    yield Text("ready", "green") if is_ready else Text("not ready", "red")
    yield _of(figures, "mull_ranks_ready", "mull_ranks")
    yield _count(figures.value("mull_requests_running"))
    yield _count(figures.value("mull_requests_waiting"))
    yield Text(_percent(used), "" if used is None or used < _TIGHT else "yellow" if used < _FULL else "red")
    yield _percent(figures.ratio("mull_prefix_hit_tokens_total", "mull_prefix_query_tokens_total"))
    yield _per_s(figures.rate("mull_engine_steps_total"))
    yield _time(figures.mean("mull_step_seconds", part="compute"))
    yield _decimal(figures.mean("mull_step_sequences"))
    yield "–" if worst is None else f"×{worst:.2f}"


def _troubles(when: str, gateways: Figures, routers: Figures) -> Text:
    """What went wrong; nothing, mostly."""
    words = [
        *_told("failed", gateways.grown_by("mull_requests_failed_total", "code")),
        *_told("refused", gateways.grown_by("mull_calls_refused_total", "reason")),
        *_told("preempted", {"": routers.grown("mull_preemptions_total")}),
        *_told("ranks lost", routers.grown_by("mull_ranks_lost_total", "cause")),
        *_told("given up", {"": routers.grown("mull_quarantined_requests_total")}),
        *_pauses(gateways),
        *_pauses(routers),
    ]
    return Text.assemble((when, "dim"), (" · ".join(words), "yellow") if words else ("no troubles", "green"))


def _pauses(figures: Figures) -> list[str]:
    """Recoveries that requests went through."""
    counts = figures.grown_by("mull_recovery_pause_seconds_count", "cause")
    longest = figures.quantile(0.95, "mull_recovery_pause_seconds")
    return [f"{count:.0f} went on after {cause} (95 % within {_time(longest)})" for cause, count in counts.items()]


def _told(what: str, counts: dict[str, float]) -> list[str]:
    total = sum(counts.values())
    causes = _counts({name: count for name, count in counts.items() if name})
    return [f"{what} {total:.0f}" + (f" ({causes})" if causes else "")] if total else []


def _panel(title: str, rows: Iterable[tuple[str, str]], *below: RenderableType) -> Panel:
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column()
    table.add_column(justify="right")
    for name, shown in rows:
        table.add_row(name, Text(shown, "bold"))
    return Panel(Group(table, *below), title=title, title_align="left", width=_PANEL_WIDTH, border_style="dim")


def line(values: Sequence[float]) -> Text:
    """The newest values as bars, the highest of them in full height."""
    shown = values[-_LINE_WIDTH:]
    highest = max(shown, default=0) or 1
    bars = "".join(_BARS[round((len(_BARS) - 1) * value / highest)] for value in shown)
    return Text(bars.rjust(_LINE_WIDTH), "cyan")


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}"


def _per_s(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}" if value < 10 else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _time(value_s: float | None) -> str:
    if value_s is None:
        return "–"
    if value_s < 1:
        return f"{1000 * value_s:.1f} ms" if value_s < 0.1 else f"{1000 * value_s:.0f} ms"
    return f"{value_s:.1f} s" if value_s < 120 else f"{value_s / 60:.1f} min"


def _quantiles(figures: Figures, name: str) -> str:
    return f"{_time(figures.quantile(0.5, name))} / {_time(figures.quantile(0.95, name))}"


def _pair(figures: Figures, one: str, other: str) -> str:
    return f"{_count(figures.value(one))} / {_count(figures.value(other))}"


def _of(figures: Figures, part: str, whole: str) -> str:
    return f"{_count(figures.value(part))}/{_count(figures.value(whole))}"


def _counts(counts: dict[str, float]) -> str:
    return ", ".join(f"{name} {count:.0f}" for name, count in counts.items())
