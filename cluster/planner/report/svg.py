"""A drawing as SVG, by ElementTree: whatever text it is given, the result is well-formed.

Colours are classes: the page's style sheet knows them for light, dark and paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal
from xml.etree import ElementTree

from markupsafe import Markup

Point = tuple[float, float]
Anchor = Literal["start", "middle", "end"]


class Drawing:
    """So wide and high in units of about a pixel; it grows and shrinks with the page."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self._root = ElementTree.Element(
            "svg", {"viewBox": f"0 0 {_number(width)} {_number(height)}", "role": "img", "aria-label": title}
        )

    def line(self, start: Point, end: Point, css: str) -> None:
        ends = {"x1": start[0], "y1": start[1], "x2": end[0], "y2": end[1]}
        self._add("line", css, {name: _number(value) for name, value in ends.items()})

    def polyline(self, points: Sequence[Point], css: str) -> None:
        self._add("polyline", css, {"points": _points(points)})

    def polygon(self, points: Sequence[Point], css: str, hint: str = "") -> None:
        self._add("polygon", css, {"points": _points(points)}, hint)

    def rect(self, corner: Point, width: float, height: float, css: str, hint: str = "") -> None:
        sizes = {"x": corner[0], "y": corner[1], "width": max(0.0, width), "height": height}
        self._add("rect", css, {name: _number(value) for name, value in sizes.items()}, hint)

    def dot(self, center: Point, radius: float, css: str, hint: str = "") -> None:
        self._add("circle", css, {"cx": _number(center[0]), "cy": _number(center[1]), "r": _number(radius)}, hint)

    def text(self, at: Point, text: str, css: str, anchor: Anchor = "start") -> None:
        place = {"x": _number(at[0]), "y": _number(at[1]), "text-anchor": anchor}
        ElementTree.SubElement(self._root, "text", {"class": css, **place}).text = text

    def markup(self) -> Markup:
        # Escaped by ElementTree.
        return Markup(ElementTree.tostring(self._root, encoding="unicode"))

    def _add(self, tag: str, css: str, attributes: dict[str, str], hint: str = "") -> None:
        element = ElementTree.SubElement(self._root, tag, {"class": css, **attributes})
        if hint:
            ElementTree.SubElement(element, "title").text = hint


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _points(points: Sequence[Point]) -> str:
    return " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
