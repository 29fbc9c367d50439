# SPDX-License-Identifier: Apache-2.0
"""The report's three plots: error over depth, error over timesteps, predicted loss over bytes."""

import itertools
import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from ...ground.names import LayerName
from ...quant.plan import Plan
from ..units import UNIT_BYTES, format_bytes
from .data import FeatureRow, TradeoffPoint
from .svg import Frame, Scale, dot, element, line, linear_scale, log_scale, power_of_ten, scientific

_WIDE = Frame(width=960, height=340, bottom=68)
_HALF = Frame(width=480, height=330)
_MAX_TIMESTEP_LABELS = 8
Gap = Mapping[float, float]
"""Timestep -> relative error, the worst of all pictures."""


def layer_chart(plan: Plan, layer_snr_db: Mapping[str, float | None], format_classes: Mapping[str, str]) -> Markup:
    """Returns one dot a layer, in execution order, at the signal-to-noise ratio of its stored weights."""
    finite = [value for value in layer_snr_db.values() if value is not None]
    y = linear_scale([0.0, *finite], *_WIDE.y_px)
    x = Scale(-1, len(plan.choices), *_WIDE.x_px)
    dots = []
    for index, choice in enumerate(plan.choices):
        snr_db = layer_snr_db[choice.layer]
        told = "no error" if snr_db is None else f"{snr_db:.1f} dB"
        tooltip = f"{choice.layer}\n{choice.scheme}, {told}, {format_bytes(choice.nbytes)}"
        height = y(math.inf if snr_db is None else snr_db)
        dots.append(dot(x(index), height, format_classes[choice.scheme], tooltip))
    components = [LayerName.parse(choice.layer).component for choice in plan.choices]
    return _WIDE.figure(
        "Signal-to-noise ratio of each layer's stored weights",
        _WIDE.y_axis(y, "SNR, dB (higher is better)", lambda value: f"{value:g}"),
        _WIDE.x_axis([], "layers, in execution order"),
        _component_bands(components, x),
        *dots,
    )


def _component_bands(components: Sequence[str], x: Scale) -> Markup:
    """The components' names under their layers, on two lines in turn, and lines where one ends and the next begins."""
    bottom, top = _WIDE.y_px
    marks = []
    runs = itertools.groupby(range(len(components)), key=lambda index: components[index])
    for order, (name, run) in enumerate(runs):
        indices = list(run)
        left, middle = x(indices[0] - 0.5), x((indices[0] + indices[-1]) / 2)
        if order > 0:
            marks.append(element("line", class_="band", x1=left, x2=left, y1=bottom, y2=top))
        height = bottom + 18 + 17 * (order % 2)
        marks.append(element("text", name, class_="tick", x=middle, y=height, text_anchor="middle"))
    return Markup("").join(marks)


def timestep_chart(compression: Gap, lowering: Gap, limit: float) -> Markup:
    """Returns the two gaps of the denoiser over its timesteps, noisiest first, with the lowering gap's limit."""
    timesteps = sorted({*compression, *lowering}, reverse=True)
    positions = Scale(-0.5, len(timesteps) - 0.5, *_HALF.x_px)
    at_px = {timestep: positions(index) for index, timestep in enumerate(timesteps)}
    y = log_scale([*compression.values(), *lowering.values(), limit], *_HALF.y_px)
    every = -(-len(timesteps) // _MAX_TIMESTEP_LABELS)
    labels = [(at_px[timestep], f"{timestep:g}") for timestep in timesteps[::every]]
    left, right = _HALF.x_px
    return _HALF.figure(
        "Relative error of the denoiser by timestep",
        _HALF.y_axis(y, "relative error", lambda value: power_of_ten(round(math.log10(value)))),
        _HALF.x_axis(labels, "timestep, in sampling order"),
        element("line", class_="limit", x1=left, x2=right, y1=y(limit), y2=y(limit)),
        element("text", "limit of the lowering gap", class_="note", x=right, y=y(limit) - 6, text_anchor="end"),
        _gap_series("compression", compression, at_px, y),
        _gap_series("lowering", lowering, at_px, y),
    )


def _gap_series(name: str, gap: Gap, at_px: Mapping[float, float], y: Scale) -> Markup:
    points = [(at_px[timestep], y(gap[timestep])) for timestep in sorted(gap, reverse=True)]
    dots = [
        dot(at_px[timestep], y(error), name, f"timestep {timestep:g}: {name} gap {scientific(error)}")
        for timestep, error in gap.items()
    ]
    return Markup("").join([line(points, name), *dots])


def feature_chart(features: Sequence[FeatureRow]) -> Markup:
    """Returns one dot a temporal feature and step at the relative error of the feature; large where it is nearest to
    another timestep's. The line is the worst of each step."""
    steps = {row.step: row.timestep for row in features}
    positions = Scale(-0.5, len(steps) - 0.5, *_WIDE.x_px)
    at_px = {step: positions(index) for index, step in enumerate(steps)}
    y = log_scale([row.relative_error for row in features], *_WIDE.y_px)
    dots = []
    for row in features:
        told = f"timestep {row.timestep:g}: relative error {scientific(row.relative_error)}, cos {row.cosine:.5f}"
        nearest = "" if row.shift == 0 else f"\nnearest to timestep {row.timestep + row.shift:g}'s"
        class_, radius = ("lowering", 2.5) if row.shift == 0 else ("chosen", 6)
        dots.append(dot(at_px[row.step], y(row.relative_error), class_, f"{row.layer}\n{told}{nearest}", radius))
    worst = [max(row.relative_error for row in features if row.step == step) for step in steps]
    every = -(-len(steps) // (2 * _MAX_TIMESTEP_LABELS))
    labels = [(at_px[step], f"{timestep:g}") for step, timestep in list(steps.items())[::every]]
    return _WIDE.figure(
        "Relative error of the temporal features by timestep",
        _WIDE.y_axis(y, "relative error", lambda value: power_of_ten(round(math.log10(value)))),
        _WIDE.x_axis(labels, "timestep, in sampling order"),
        line([(at_px[step], y(error)) for step, error in zip(steps, worst, strict=True)], "lowering"),
        *dots,
    )


def tradeoff_chart(points: Sequence[TradeoffPoint], plan: Plan) -> Markup:
    """Returns predicted loss against bytes of the best plans, with the chosen one and its budget marked."""
    curve = sorted(points, key=lambda point: point.total_bytes)
    sizes = [*(point.total_bytes for point in curve), plan.total_bytes, plan.budget_bytes or plan.total_bytes]
    unit = "GB" if max(sizes) >= UNIT_BYTES["GB"] else "MB"
    x = linear_scale([size / UNIT_BYTES[unit] for size in sizes], *_HALF.x_px)
    y = log_scale([*(point.predicted_loss for point in curve), plan.predicted_loss], *_HALF.y_px)

    def place(total_bytes: int, loss: float) -> tuple[float, float]:
        return x(total_bytes / UNIT_BYTES[unit]), y(loss)

    placed = [place(point.total_bytes, point.predicted_loss) for point in curve]
    told = [f"{format_bytes(point.total_bytes)}: loss {scientific(point.predicted_loss)}" for point in curve]
    chosen = place(plan.total_bytes, plan.predicted_loss)
    loss = scientific(plan.predicted_loss)
    return _HALF.figure(
        "Predicted loss against bytes",
        _HALF.y_axis(y, "predicted loss", lambda value: power_of_ten(round(math.log10(value)))),
        _HALF.x_axis([(x(value), f"{value:g}") for value in x.ticks()], f"planned size, {unit}"),
        _budget_line(plan, UNIT_BYTES[unit], x),
        line(placed, "curve"),
        *(dot(px, py, "curve", text, 2.5) for (px, py), text in zip(placed, told, strict=True)),
        dot(*chosen, "chosen", f"chosen plan: {format_bytes(plan.total_bytes)}, loss {loss}", 6),
        _beside(chosen, f"chosen: {format_bytes(plan.total_bytes)}"),
    )


def _budget_line(plan: Plan, unit_bytes: int, x: Scale) -> Markup:
    if plan.budget_bytes is None:
        return Markup("")
    px = x(plan.budget_bytes / unit_bytes)
    bottom, top = _HALF.y_px
    name = element("text", "budget", class_="note", x=px + 6, y=bottom - 8)
    return element("line", class_="limit", x1=px, x2=px, y1=bottom, y2=top) + name


def _beside(point: tuple[float, float], text: str) -> Markup:
    """`text` on the side of `point` where the figure has more room."""
    px, py = point
    on_left = px > _HALF.width / 2
    return element(
        "text",
        text,
        class_="note strong",
        x=px + (-11 if on_left else 11),
        y=py - 9,
        text_anchor="end" if on_left else "start",
    )
