# SPDX-License-Identifier: Apache-2.0
"""What the report's template shows: every number, share and order decided here, nothing computed in HTML."""

import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ...quant.plan import Plan
from ...quant.scheme import parse_scheme
from ...runtimes.compare.rows import ParityRow
from ..families.components import group_name
from ..target_options import TARGET_ENTRIES
from .charts import feature_chart, layer_chart, timestep_chart, tradeoff_chart
from .data import ReportData, TemporalFigures
from .svg import scientific

_DRAWN_BY = {"float_model": "float", "stored": "stored weights", "artifact": "artifact"}
_FORMAT_COLOURS = 6
_LOWEST = 5


@dataclass(frozen=True)
class Segment:
    """One coloured piece of a bar; `percent` is of the longest bar."""

    class_: str
    percent: float
    label: str
    bytes: int


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart: `percent` is its share of the chart's total."""

    label: str
    bytes: int
    percent: float
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class FormatRow:
    """All layers that have one scheme; `bits_per_weight` counts scales and zero points of the weights too."""

    scheme: str
    class_: str
    layers: int
    weights: int
    bytes: int
    bits_per_weight: float
    percent: float


@dataclass(frozen=True)
class GapRow:
    """The worst of all pictures' calls of one component at one timestep; None where nothing was compared."""

    component: str
    timestep: float | None
    compression_error: float | None
    lowering: tuple["Lowering", ...]

    @property
    def passed(self) -> bool:
        """Whether every runtime is within its limit."""
        return all(each.passed for each in self.lowering)


@dataclass(frozen=True)
class Lowering:
    """One runtime's largest error there, and its limit."""

    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit."""
        return self.error <= self.limit


@dataclass(frozen=True)
class PageView:
    """Everything on the page that is not in ReportData as it is.

    `alignment` counts pictures, by who drew; `runtimes` are (name, limit); `worst` is the first runtime's worst call.
    """

    target_name: str
    parity_failure: str | None
    worst: ParityRow | None
    runtimes: tuple[tuple[str, float], ...]
    budget_percent: float | None
    over_budget: bool
    fp16_bytes: int
    fp32_bytes: int
    alignment: tuple[tuple[str, int], ...]
    components: tuple[Bar, ...]
    blocks: tuple[Bar, ...]
    formats: tuple[FormatRow, ...]
    format_classes: Mapping[str, str]
    gaps: tuple[GapRow, ...]
    has_timesteps: bool
    layer_chart: Markup
    timestep_chart: Markup
    tradeoff_chart: Markup
    misread: tuple[tuple[str, ...], ...]
    seconds: "Seconds | None"
    tried: tuple[str, ...]
    lowest: tuple[tuple[str, float], ...]
    memory_growth: int
    temporal: "TemporalView | None"


@dataclass(frozen=True)
class TemporalView:
    """What is shown of temporal features: `least_cosine` and `worst` of all, and how many are another timestep's."""

    share_percent: float
    chart: Markup
    least_cosine: float
    worst: str
    mismatches: int
    steps: int


def page_view(data: ReportData) -> PageView:
    """Returns what the template shows of `data`."""
    measured, plan = data.measurements, data.plan
    classes = format_classes(plan)
    compression = _worst(measured.compression.rows)
    lowering = {name: _worst(report.rows) for name, report in data.parity.items()}
    first, main = next(iter(lowering.values())), next(iter(data.parity.values()))
    failures = [f"{name}: {report.failure}" for name, report in data.parity.items() if not report.passed]
    return PageView(
        target_name=TARGET_ENTRIES[data.manifest.target].title,
        parity_failure=next(iter(failures), None),
        worst=main.worst,
        runtimes=tuple((name, report.limits.max_relative_error) for name, report in data.parity.items()),
        over_budget=plan.budget_bytes is not None and measured.artifact_bytes > plan.budget_bytes,
        budget_percent=100 * measured.artifact_bytes / plan.budget_bytes if plan.budget_bytes else None,
        fp16_bytes=2 * measured.parameters,
        fp32_bytes=4 * measured.parameters,
        alignment=tuple(
            (_DRAWN_BY[who], round(share * len(data.pictures)))
            for who, share in measured.alignment.items()
            if share is not None
        ),
        components=component_bars(data),
        blocks=block_bars(plan, classes),
        formats=format_rows(plan, classes),
        format_classes=classes,
        gaps=gap_rows(compression, lowering),
        has_timesteps=any(timestep is not None for _, timestep in first),
        layer_chart=layer_chart(plan, measured.layer_snr_db, classes),
        timestep_chart=timestep_chart(_by_timestep(compression), _by_timestep(first), main.limits.max_relative_error),
        tradeoff_chart=tradeoff_chart(data.tradeoff, plan),
        misread=tuple(tuple(each) for each in measured.misread.get("artifact", [])),
        seconds=seconds_of(data),
        tried=tried(data),
        lowest=_lowest(measured.layer_snr_db),
        memory_growth=sum(each.ran_anon_bytes - each.start_anon_bytes for each in measured.memory.values()),
        temporal=None if measured.temporal is None else _temporal(measured.temporal),
    )


def _temporal(figures: TemporalFigures) -> TemporalView:
    worst = min(figures.features, key=lambda row: row.cosine)
    return TemporalView(
        share_percent=100 * figures.share,
        chart=feature_chart(figures.features),
        least_cosine=worst.cosine,
        worst=f"{worst.layer} at timestep {worst.timestep:g}",
        mismatches=sum(row.shift != 0 for row in figures.features),
        steps=len({row.step for row in figures.features}),
    )


@dataclass(frozen=True)
class Seconds:
    """Medians of calls in the runtime that drew: by component, of a step (both calls where guidance asks twice), and
    what these come to for a picture."""

    calls: Mapping[str, float]
    step: float
    picture: float


def seconds_of(data: ReportData) -> Seconds | None:
    """Returns how long drawing takes, None where no runtime of a phone was timed or some component was not."""
    manifest, calls = data.manifest, data.measurements.call_seconds
    pipeline = manifest.pipeline
    denoiser, decoder = pipeline.denoiser.component, pipeline.decoder.component
    if not {*pipeline.text_encoders, denoiser, decoder} <= calls.keys():
        return None
    twice = manifest.sampler.guidance_scale > 1 and not pipeline.guidance_inputs
    step = calls[denoiser] * (2 if twice else 1)
    texts = sum(calls[name] for name in pipeline.text_encoders) * (2 if twice else 1)
    return Seconds(calls, step, texts + step * len(manifest.sampler.timesteps or ()) + calls[decoder])


def tried(data: ReportData) -> tuple[str, ...]:
    """Returns what the build weighed and did not ship, a line each with the reason.

    That is formats which the plan gave no layer, and fine-tuning that made a component worse on calls it had not seen.
    """
    formats = [f"{name}: in this budget no layer's best choice" for name in _unused_formats(data)]
    worse = [
        f"fine-tuning of {name}: relative squared error on held-out calls {scientific(loss.before)} before, "
        f"{scientific(loss.after)} after"
        for name, loss in data.measurements.fine_tuning.items()
        if loss.after >= loss.before
    ]
    return (*formats, *worse)


def _unused_formats(data: ReportData) -> tuple[str, ...]:
    asked = tomllib.loads(data.manifest.recipe).get("compress", {}).get("formats", [])
    used = {str(parse_scheme(choice.scheme).weight) for choice in data.plan.choices}
    return tuple(name for name in asked if str(parse_scheme(name).weight) not in used)


def _lowest(layer_snr_db: Mapping[str, float | None]) -> tuple[tuple[str, float], ...]:
    """The layers whose weights stand least above their error, the lowest first, with the figure in dB."""
    finite = sorted((value, name) for name, value in layer_snr_db.items() if value is not None)
    return tuple((name, value) for value, name in finite[:_LOWEST])


def format_classes(plan: Plan) -> dict[str, str]:
    """Returns the CSS class of each scheme's colour, fewest bits of a weight first."""

    def order(name: str) -> tuple[float, str]:
        return parse_scheme(name).weight.weight_bits, name

    used = sorted({choice.scheme for choice in plan.choices}, key=order)
    return {name: f"f{index % _FORMAT_COLOURS}" for index, name in enumerate(used)}


def component_bars(data: ReportData) -> tuple[Bar, ...]:
    """Returns bytes of all shipped files by their first path part, largest first; together the whole artifact."""
    sizes: dict[str, int] = {}
    for entry in data.manifest.files:
        owner = entry.path.split("/", 1)[0]
        sizes[owner] = sizes.get(owner, 0) + entry.bytes
    sizes["manifest.json"] = data.measurements.artifact_bytes - data.manifest.total_bytes
    whole = [(name, [("all", name, size)]) for name, size in sorted(sizes.items(), key=lambda item: -item[1])]
    return _bars(whole)


def block_bars(plan: Plan, classes: Mapping[str, str]) -> tuple[Bar, ...]:
    """Returns bytes of the compressed layers by block of the network, in execution order, split by scheme."""
    blocks: dict[str, dict[str, int]] = {}
    for choice in plan.choices:
        formats = blocks.setdefault(group_name(choice.layer), dict.fromkeys(classes, 0))
        formats[choice.scheme] += choice.nbytes
    return _bars(
        [
            (block, [(classes[name], name, size) for name, size in formats.items() if size])
            for block, formats in blocks.items()
        ]
    )


def _bars(rows: Sequence[tuple[str, Sequence[tuple[str, str, int]]]]) -> tuple[Bar, ...]:
    """Bars of (label, pieces), each piece (CSS class, label, bytes)."""
    sizes = [sum(size for *_, size in pieces) for _, pieces in rows]
    longest, total = max(sizes, default=0) or 1, sum(sizes) or 1
    return tuple(
        Bar(
            label,
            size,
            100 * size / total,
            tuple(Segment(class_, 100 * piece / longest, name, piece) for class_, name, piece in pieces),
        )
        for (label, pieces), size in zip(rows, sizes, strict=True)
    )


def format_rows(plan: Plan, classes: Mapping[str, str]) -> tuple[FormatRow, ...]:
    """Returns one row per scheme of the plan, fewest bits first; percentages are of the planned artifact."""
    rows = []
    for name, class_ in classes.items():
        choices = [choice for choice in plan.choices if choice.scheme == name]
        weights = sum(math.prod(choice.shape) for choice in choices)
        nbytes = sum(choice.nbytes for choice in choices)
        percent = 100 * nbytes / plan.total_bytes
        rows.append(FormatRow(name, class_, len(choices), weights, nbytes, 8 * nbytes / weights, percent))
    return tuple(rows)


Calls = Mapping[tuple[str, float | None], ParityRow]
"""(component, timestep) -> the row with the largest relative error among all pictures."""


def _worst(rows: Iterable[ParityRow]) -> Calls:
    worst: dict[tuple[str, float | None], ParityRow] = {}
    for row in rows:
        kept = worst.setdefault((row.component, row.timestep), row)
        if row.relative_error > kept.relative_error:
            worst[row.component, row.timestep] = row
    return worst


def gap_rows(compression: Calls, lowering: Mapping[str, Calls]) -> tuple[GapRow, ...]:
    """Returns both gaps side by side, in the order in which the pipeline calls its components."""
    rows = []
    for key in next(iter(lowering.values())):
        compressed = compression[key].relative_error if key in compression else None
        found = [calls[key] for calls in lowering.values()]
        rows.append(GapRow(*key, compressed, tuple(Lowering(r.relative_error, r.max_relative_error) for r in found)))
    return tuple(rows)


def _by_timestep(calls: Calls) -> dict[float, float]:
    return {timestep: row.relative_error for (_, timestep), row in calls.items() if timestep is not None}
