"""Panels as all dashboards have them: a title, what it means, a unit, and one idea. And the frame around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from grafana_foundation_sdk.builders import common, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from helm.dashboards.promql import quantile

_GRAPH = (8, 8)
"""Width and height: three in a row of the grid."""
_NUMBER = (4, 4)
_SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")

SECONDS = "s"
PER_SECOND = "ops"
REQUESTS_PER_S = "reqps"
TOKENS = "suffix: tok"
TOKENS_PER_S = "suffix: tok/s"
SHARE = "percentunit"
COUNT = "short"
BYTES = "bytes"
BYTES_PER_S = "binBps"


@dataclass(frozen=True)
class Line:
    """A query, and how its series are called: Grafana puts labels in place of `{{label}}`."""

    legend: str
    expr: str


Thresholds = Sequence[tuple[str, float | None]]
"""Colours, each from a value on; the first from below all."""
ALWAYS_GOOD: Thresholds = (("green", None),)


def bad_from(value: float) -> Thresholds:
    return (("green", None), ("red", value))


def good_from(value: float) -> Thresholds:
    return (("red", None), ("green", value))


class _Shown(Protocol):
    """What the builders of all kinds of panels have."""

    def title(self, title: str) -> object: ...
    def description(self, description: str) -> object: ...
    def datasource(self, datasource: models.DataSourceRef) -> object: ...
    def span(self, w: int) -> object: ...
    def height(self, h: int) -> object: ...


def graph(title: str, description: str, unit: str, *lines: Line) -> Builder[models.Panel]:
    """Lines over time."""
    return _graph(title, description, unit, lines)


def stacked(title: str, description: str, unit: str, *lines: Line) -> Builder[models.Panel]:
    """Parts of a whole over time."""
    mode = common.StackingConfig().mode(shapes.StackingMode.NORMAL)
    return _graph(title, description, unit, lines).stacking(mode).fill_opacity(30)


def quantiles(title: str, description: str, unit: str, histogram: str) -> Builder[models.Panel]:
    """The middle, the slow and the slowest."""
    lines = [Line(f"p{100 * q:g}", quantile(q, histogram)) for q in (0.5, 0.95, 0.99)]
    return graph(title, description, unit, *lines)


def _graph(title: str, description: str, unit: str, lines: Sequence[Line]) -> timeseries.Panel:
    panel = timeseries.Panel().unit(unit).min(0).fill_opacity(5).show_points(shapes.VisibilityMode.NEVER)
    legend = common.VizLegendOptions().display_mode(shapes.LegendDisplayMode.LIST).show_legend(True)
    panel.legend(legend.placement(shapes.LegendPlacement.BOTTOM))
    panel.tooltip(common.VizTooltipOptions().mode(shapes.TooltipDisplayMode.MULTI))
    _frame(panel, title, description, _GRAPH)
    for number, line in enumerate(lines):
        panel.with_target(_query(number, line))
    return panel


def number(title: str, description: str, unit: str, expr: str, *, thresholds: Thresholds = ALWAYS_GOOD) -> stat.Panel:
    """How it is now."""
    panel = stat.Panel().unit(unit).graph_mode(shapes.BigValueGraphMode.AREA)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    steps = [models.Threshold(color=color, value=start) for color, start in thresholds]
    panel.thresholds(builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
    _frame(panel, title, description, _NUMBER)
    return panel.with_target(_query(0, Line(title, expr)))


def spread(title: str, description: str, unit: str, expr: str) -> heatmap.Panel:
    """A histogram over time, by the rate of its buckets."""
    panel = heatmap.Panel().calculate(False).y_axis(heatmap.YAxisConfig().unit(unit))
    _frame(panel, title, description, _GRAPH)
    return panel.with_target(_query(0, Line("{{le}}", expr)).format(PromQueryFormat.HEATMAP))


def listing(title: str, description: str, unit: str, expr: str) -> table.Panel:
    """Labels and the value of each series, as they are now."""
    panel = table.Panel().unit(unit)
    _frame(panel, title, description, _GRAPH)
    query = _query(0, Line("", expr)).format(PromQueryFormat.TABLE).instant()
    hidden = {"Time": True, "__name__": True}
    tidy = models.DataTransformerConfig(id_val="organize", options={"excludeByName": hidden})
    return panel.with_target(query).with_transformation(tidy)


def _frame(panel: _Shown, title: str, description: str, size: tuple[int, int]) -> None:
    panel.title(title)
    panel.description(description)
    panel.datasource(_SOURCE)
    panel.span(size[0])
    panel.height(size[1])


def _query(number: int, line: Line) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(line.expr).legend_format(line.legend).ref_id(chr(ord("A") + number)).range()


@dataclass(frozen=True)
class Section:
    """A row with a heading."""

    title: str
    panels: Sequence[Builder[models.Panel]]


def board(uid: str, title: str, description: str, *sections: Section) -> models.Dashboard:
    """A dashboard, with the choice of a data source and of installations, and links to the others."""
    made = builders.Dashboard(title).uid(uid).description(description).tags(["mull"]).timezone("browser")
    made.readonly().refresh("30s").time("now-1h", "now").tooltip(models.DashboardCursorSync.CROSSHAIR)
    made.with_variable(builders.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    made.with_variable(_installations())
    links = builders.DashboardLink("mull").type(models.DashboardLinkType.DASHBOARDS).tags(["mull"])
    made.link(links.as_dropdown(True).keep_time(True).include_vars(True))
    for section in sections:
        made.with_row(builders.Row(section.title))
        for panel in section.panels:
            made.with_panel(panel)
    return made.build()


def _installations() -> builders.QueryVariable:
    choice = builders.QueryVariable("installation").label("Installation").datasource(_SOURCE)
    choice.query("label_values(mull_build_info, installation)").refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
    # All of them is also what a Prometheus shows whose targets lack the label.
    return choice.multi(True).include_all(True).all_value(".*").sort(models.VariableSort.ALPHABETICAL_ASC)
