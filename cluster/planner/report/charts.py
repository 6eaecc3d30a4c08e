"""The kinds of charts that the report has, each a function from numbers to SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from cluster.planner.report.axes import Axis
from cluster.planner.report.svg import Drawing, Point

WIDTH, HEIGHT = 460.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 20.0, 32.0, 36.0
_BAR_TOP, _BAR_ROW, _BAR = 6.0, 36.0, 10.0
_TEXT_DOWN = 4.0
"""From the middle of a text to its base line."""
_NOTE = 80.0
"""What a moment's name takes: of those that come sooner after it only the rule is drawn."""
_OVER = 1.25
"""What an inline bar has room for, in limits."""
_DOT = 2.5
_DOTTED = 16
"""Lines of no more points have each of them marked."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart; a point without a value interrupts it. `css`: classes of its colour and dashes."""

    name: str
    points: Sequence[tuple[float, float | None]]
    css: str

    @property
    def largest(self) -> float:
        return max((value for _, value in self.points if value is not None), default=0.0)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One of the parts that are stacked on each other, a value for each place on the axis."""

    name: str
    values: Sequence[float]
    css: str


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Something that happens in a chart over time."""

    time_s: float
    name: str


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Quantiles of a time, of one layout."""

    name: str
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, kw_only=True)
class Bar:
    """Parts beside each other, of one layout."""

    name: str
    note: str
    parts: Sequence[tuple[str, float, str]]
    """(name, value, css)"""


def lines(x: Axis, y: Axis, shown: Sequence[Line], moments: Sequence[Moment] = ()) -> Markup:
    """Lines over an axis."""
    frame = _Frame(x, y)
    named_to = 0.0
    for moment in moments:
        at = frame.across(moment.time_s)
        frame.rule(at, moment.name if at >= named_to else "")
        named_to = at + _NOTE if at >= named_to else named_to
    for line in shown:
        for run in _runs(line.points):
            frame.drawing.polyline([frame.place(*point) for point in run], f"line {line.css}")
            if len(line.points) <= _DOTTED or len(run) == 1:
                for point in run:
                    hint = f"{line.name}: {y.label(point[1])} at {x.label(point[0])}"
                    frame.drawing.dot(frame.place(*point), _DOT, f"dot {line.css}", hint)
    return frame.drawing.markup()


def layers(x: Axis, y: Axis, places: Sequence[float], stacked: Sequence[Layer], floor: Line) -> Markup:
    """Parts that add up, over an axis, and a line before them."""
    frame = _Frame(x, y)
    below = [0.0] * len(places)
    for layer in stacked:
        above = [low + value for low, value in zip(below, layer.values, strict=True)]
        edge = [frame.place(*point) for point in zip(places, above, strict=True)]
        back = [frame.place(*point) for point in zip(places, below, strict=True)]
        frame.drawing.polygon([*edge, *reversed(back)], f"area {layer.css}", layer.name)
        below = above
    for run in _runs(floor.points):
        frame.drawing.polyline([frame.place(*point) for point in run], f"line {floor.css}")
    return frame.drawing.markup()


def spreads(x: Axis, rows: Sequence[Spread]) -> Markup:
    """For each row a dot at the median, a thick line to the 95th percentile and a thin one to the 99th."""
    frame = _Frame(x, None, height=_BAR_TOP + _BAR_ROW * len(rows) + _BOTTOM)
    for index, row in enumerate(rows):
        middle = frame.row(index, row.name, " · ".join(x.label(value) for value in (row.p50, row.p95, row.p99)))
        p50, p95, p99 = (frame.across(value) for value in (row.p50, row.p95, row.p99))
        frame.drawing.line((p50, middle), (p99, middle), "thin c1")
        frame.drawing.line((p50, middle), (p95, middle), "thick c1")
        frame.drawing.dot((p50, middle), 2 * _DOT, "dot c1")
    return frame.drawing.markup()


def bars(x: Axis, rows: Sequence[Bar]) -> Markup:
    """For each row its parts beside each other."""
    frame = _Frame(x, None, height=_BAR_TOP + _BAR_ROW * len(rows) + _BOTTOM)
    for index, row in enumerate(rows):
        middle = frame.row(index, row.name, row.note)
        start = 0.0
        for name, value, css in row.parts:
            left, right = frame.across(start), frame.across(start + value)
            hint = f"{name}: {x.label(value)}"
            frame.drawing.rect((left, middle - _BAR / 2), right - left, _BAR, f"area {css}", hint)
            start += value
    return frame.drawing.markup()


def inline_bar(title: str, parts: Sequence[tuple[str, float, str]], limit: float) -> Markup:
    """(words, value, css) beside each other, for the cell of a table: a stroke stands at the limit.

    What is far over it is cut off.
    """
    width, height = 150.0, 14.0
    drawing = Drawing(width, height, title)
    start, scale = 0.0, width / (_OVER * limit)
    for words, value, css in parts:
        drawing.rect((start, 2.0), value * scale, height - 4, f"area {css}", words)
        start += value * scale
    drawing.line((limit * scale, 0.0), (limit * scale, height), "limit")
    return drawing.markup()


class _Frame:
    """The axes, and where values lie between them. Without `y` there are rows in its place."""

    def __init__(self, x: Axis, y: Axis | None, height: float = HEIGHT) -> None:
        self._x, self._y = x, y
        self._left = _LEFT if y is not None else 4.0
        self._right, self._bottom = WIDTH - _RIGHT, height - _BOTTOM
        title = x.title if y is None else f"{y.title}, by {x.title}"
        self.drawing = Drawing(WIDTH, height, title)
        for tick in x.ticks:
            at = self.across(tick)
            if y is None:
                self.drawing.line((at, _BAR_TOP), (at, self._bottom), "grid")
            self.drawing.text((at, self._bottom + 14), x.label(tick), "tick", "middle")
        self.drawing.text((self._right, self._bottom + 30), x.title, "axis", "end")
        if y is None:
            return
        for tick in y.ticks:
            up = self._up(tick)
            self.drawing.line((self._left, up), (self._right, up), "grid")
            self.drawing.text((self._left - 6, up + _TEXT_DOWN), y.label(tick), "tick", "end")
        self.drawing.text((4.0, 12.0), y.title, "axis")

    def place(self, x: float, y: float) -> Point:
        return self.across(x), self._up(y)

    def across(self, value: float) -> float:
        return self._left + self._x.share(value) * (self._right - self._left)

    def row(self, index: int, name: str, note: str) -> float:
        """Writes over the row what it is; the height of its middle."""
        top = _BAR_TOP + index * _BAR_ROW
        self.drawing.text((self._left, top + 12), name, "label")
        self.drawing.text((self._right, top + 12), note, "value", "end")
        return top + 24

    def rule(self, at: float, name: str) -> None:
        self.drawing.line((at, _TOP), (at, self._bottom), "moment")
        is_far = at > (self._left + self._right) / 2
        self.drawing.text((at, _TOP - 5), name, "note", "end" if is_far else "start")

    def _up(self, value: float) -> float:
        assert self._y is not None, "it has rows instead"
        return self._bottom - self._y.share(value) * (self._bottom - _TOP)


def _runs(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """The parts of a line between its gaps."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]
