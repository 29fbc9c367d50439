# SPDX-License-Identifier: Apache-2.0
"""Plots as inline SVG: scales, axes, and elements whose text can not break out of the page."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_TIMES = "\N{NARROW NO-BREAK SPACE}\N{MULTIPLICATION SIGN}\N{NARROW NO-BREAK SPACE}"
_MAX_DECADE_TICKS = 7


def element(tag: str, *content: str, **attributes: object) -> Markup:
    """Returns one SVG element; `content` and attribute values are escaped unless they are Markup.

    Underscores in attribute names become hyphens (`text_anchor`), a trailing one is dropped (`class_`).
    """
    pairs = (
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), _number(value))
        for name, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(
        Markup(tag), Markup("").join(pairs), Markup("").join(map(escape, content))
    )


def _number(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def power_of_ten(exponent: int) -> str:
    """Returns 10⁻³ and the like."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def scientific(value: float) -> str:
    """Returns `value` with two digits and a power of ten; 0 and ∞ as themselves."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return "∞"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}{_TIMES}{power_of_ten(int(exponent))}"


@dataclass(frozen=True)
class Scale:
    """Where a value lies along one axis, in px; values outside [low, high] lie on its nearer end."""

    low: float
    high: float
    start_px: float
    end_px: float
    log: bool = False

    def __call__(self, value: float) -> float:
        clamped = min(max(value, self.low), self.high)
        if self.log:
            share = math.log10(clamped / self.low) / math.log10(self.high / self.low)
        else:
            share = (clamped - self.low) / (self.high - self.low)
        return self.start_px + share * (self.end_px - self.start_px)

    def ticks(self, count: int = 5) -> list[float]:
        """Returns round values inside the axis: powers of ten, or about `count` multiples of 1, 2 or 5."""
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            return [10.0**exponent for exponent in range(first, last + 1, 1 + (last - first) // _MAX_DECADE_TICKS)]
        step = _round_step((self.high - self.low) / count)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def log_scale(values: Iterable[float], start_px: float, end_px: float) -> Scale:
    """Returns a log axis of whole decades around the positive finite values (1e-1 to 1 when there are none)."""
    usable = [value for value in values if 0 < value < math.inf] or [1.0]
    low, high = math.floor(math.log10(min(usable))), math.ceil(math.log10(max(usable)))
    return Scale(10.0 ** (low - (low == high)), 10.0**high, start_px, end_px, log=True)


def linear_scale(values: Iterable[float], start_px: float, end_px: float) -> Scale:
    """Returns an axis around the finite values, widened to round numbers."""
    usable = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(usable), max(usable)
    step = _round_step(max(high - low, abs(high) * 1e-3, 1e-9) / 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Scale(first * step, max(last, first + 1) * step, start_px, end_px)


def _round_step(step: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(step))
    return next(factor * magnitude for factor in (1, 2, 5, 10) if step <= factor * magnitude * (1 + 1e-9))


@dataclass(frozen=True)
class Frame:
    """The plotting area of a figure, inside margins that hold the axes' text; all in px."""

    width: int
    height: int
    left: int = 72
    right: int = 14
    top: int = 14
    bottom: int = 50

    @property
    def x_px(self) -> tuple[float, float]:
        """Left and right end of the horizontal axis."""
        return self.left, self.width - self.right

    @property
    def y_px(self) -> tuple[float, float]:
        """Lower and upper end of the vertical axis."""
        return self.height - self.bottom, self.top

    def figure(self, title: str, *content: Markup) -> Markup:
        """Returns the whole <svg>, named `title` for readers that do not see it."""
        box = f"0 0 {self.width} {self.height}"
        return element("svg", *content, viewBox=box, role="img", aria_label=title)

    def y_axis(self, scale: Scale, label: str, text: Callable[[float], str]) -> Markup:
        """Returns horizontal grid lines with their values, and the axis' name along the left edge."""
        left, right = self.x_px
        middle = sum(self.y_px) / 2
        marks = [
            element("line", class_="grid", x1=left, x2=right, y1=scale(value), y2=scale(value))
            + element("text", text(value), class_="tick", x=left - 7, y=scale(value) + 4, text_anchor="end")
            for value in scale.ticks()
        ]
        name = element(
            "text",
            label,
            class_="axis",
            text_anchor="middle",
            transform=f"translate(13 {middle:g}) rotate(-90)",
        )
        return Markup("").join([*marks, name])

    def x_axis(self, positions: Sequence[tuple[float, str]], label: str) -> Markup:
        """Returns the base line, the given (px, text) below it, and the axis' name."""
        left, right = self.x_px
        bottom, _ = self.y_px
        marks = [
            element("text", text, class_="tick", x=px, y=bottom + 18, text_anchor="middle") for px, text in positions
        ]
        name = element("text", label, class_="axis", x=(left + right) / 2, y=bottom + 40, text_anchor="middle")
        base = element("line", class_="base", x1=left, x2=right, y1=bottom, y2=bottom)
        return Markup("").join([base, *marks, name])


def dot(x: float, y: float, class_: str, tooltip: str, radius: float = 3.5) -> Markup:
    """Returns a round mark that tells `tooltip` when pointed at."""
    return element("circle", element("title", tooltip), class_=f"dot {class_}", cx=x, cy=y, r=radius)


def line(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    """Returns straight lines from point to point."""
    return element("polyline", class_=f"line {class_}", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points))
