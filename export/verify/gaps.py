# SPDX-License-Identifier: Apache-2.0
"""The two gaps of an artifact, measured apart on the same pictures: compression and lowering."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ...ground.errors import ParityFailed
from ...ground.heap import give_back_freed
from ...ground.names import at_place
from ...quant.account import layer_snr_db
from ...quant.compress import decompressed
from ...quant.formats import CompressedTensor
from ...runtimes.compare.reference import PyTorchRunner, TorchComponent
from ...runtimes.compare.replay import compare, compare_call, compare_pictures, record
from ...runtimes.compare.rows import Limits, ParityReport, ParityRow
from ...runtimes.drawing.text_to_image import exercise
from ...runtimes.drawing.tokenizer import Tokenizer
from ...runtimes.image_size import ImageSize
from ...runtimes.manifest import Manifest
from ...runtimes.runner import LayerRunner, Runner
from ..evidence import Evidence
from ..families.components import layers_of
from ..families.graphs import Component
from .timed import TimedRunner

Picture = NDArray[np.uint8]
KINDS = ("float_model", "stored", "artifact")
NO_LIMITS = Limits(max_relative_error=math.inf)
TO_DIFFUSERS_ERROR = 1e-4
"""Of any array of `compare_with_diffusers`, as ||ours - theirs|| / ||theirs||.

Two right loops in 1, 4 and 30 steps, guidance 0, 5 and 7.5, each sampler, on both bundled models and on random ones of
both families: 2.5e-6 at most (the UNet's input after thirty ancestral steps); inputs that are no sums, such as
timesteps and text states, are equal. Wrong ones: a `beta_end` that is 0.1 % off 1.1e-3 to 2.4e-3, a VAE scaling factor
that is 2 % off 2e-2, another timestep spacing or other text states 0.1 and more. One timestep beside the right one is
at least 1e-3 off.
"""


@dataclass(frozen=True)
class Pictures:
    """The same prompts and seeds drawn three times; lists of uint8 [H, W, 3]."""

    float_model: list[Picture]
    stored: list[Picture]
    artifact: list[Picture]


@dataclass(frozen=True)
class Runtime:
    """One way to run the artifact: its runner, and what must hold for it."""

    runner: LayerRunner
    limits: Limits


@dataclass(frozen=True)
class Difference:
    """One array of our loop and the same one of diffusers' pipeline, as ||ours - theirs|| / ||theirs||."""

    array: str
    relative_error: float
    limit: float = TO_DIFFUSERS_ERROR


@dataclass(frozen=True)
class ToDiffusers:
    """Everything that was compared while pictures were drawn, in the order in which it came to be."""

    differences: tuple[Difference, ...]

    @property
    def largest_error(self) -> float:
        """The largest relative error of all arrays."""
        return max(each.relative_error for each in self.differences)

    @property
    def failure(self) -> str | None:
        """One sentence on the first array that differs, None when none does: what comes later follows from it."""
        for each in self.differences:
            if each.relative_error > each.limit:
                return (
                    f"diffusers' own pipeline draws another picture from the same float weights and the same noise: "
                    f"relative error {each.relative_error:.3g} is over {each.limit:g} in {each.array}"
                )
        return None

    def require(self) -> None:
        """Raises ParityFailed when the loop is another than diffusers'."""
        if self.failure is not None:
            hint = "the loop here does not know something that the model asks for: please report its .json files"
            raise ParityFailed(self.failure, hint)


@dataclass(frozen=True)
class Gaps:
    """Four comparisons and the pictures under them.

    `to_diffusers`: our loop over float PyTorch against diffusers' own; nothing else is worth comparing when it fails.
    `compression`: float PyTorch against PyTorch with the stored weights; it has no limit, it is what the budget
    costs. `lowering`, by runtime: PyTorch with the stored weights against the artifact; each must pass. `total`:
    pictures of float PyTorch against those of the artifact in its first runtime. `alignment` has a share per set of
    pictures, or None; `misread` has what each picture does not show of its prompt. `call_seconds`: the median of each
    component's calls in the first runtime. `layer_snr_db`: each layer's output against what the stored weight changes
    in it, on the inputs that the float model gives it in the first picture.
    """

    to_diffusers: ToDiffusers
    compression: ParityReport
    lowering: dict[str, ParityReport]
    total: ParityReport
    pictures: Pictures
    alignment: dict[str, float | None]
    layer_snr_db: dict[str, float | None]
    misread: dict[str, list[list[str]]] = field(default_factory=dict)
    call_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def failure(self) -> str | None:
        """One sentence on the first runtime that does not compute what PyTorch computes; None when all do."""
        if self.to_diffusers.failure is not None:
            return self.to_diffusers.failure
        failures = {name: report.failure for name, report in self.lowering.items()}
        return next((f"{name}: {failure}" for name, failure in failures.items() if failure), None)


def torch_runner(components: Sequence[Component]) -> PyTorchRunner:
    """Returns PyTorch behind the runners' interface, for the weights the modules hold when it is asked."""
    return PyTorchRunner(
        {
            component.name: TorchComponent(
                component.module,
                tuple(component.example_inputs),
                component.output_names,
                component.layer_prefix,
            )
            for component in components
        }
    )


@dataclass(frozen=True)
class Session:
    """What runs that are to be compared must share."""

    manifest: Manifest
    tokenizers: Mapping[str, Tokenizer]
    prompts: Sequence[str]
    seed: int

    @classmethod
    def of_report(
        cls, manifest: Manifest, tokenizers: Mapping[str, Tokenizer], evidence: Evidence, pictures: int, seed: int
    ) -> "Session":
        """What a report shows: so many pictures of prompts that nothing else has seen, one of each size at least."""
        prompts = evidence.prompts("report", max(pictures, len(manifest.sizes)), seed)
        return cls(manifest, tokenizers, prompts, seed)

    def of_one_size(self) -> "Session":
        """Returns the same with all pictures of the default size."""
        return replace(self, manifest=self.manifest.model_copy(update={"sizes": self.manifest.sizes[:1]}))

    def draw(self, runner: Runner, index: int) -> Picture:
        """Returns picture `index`: its prompt, from the noise of seed + index, the artifact's sizes in turn."""
        return self.draw_batch(runner, [index])[0]

    def batches(self, most: int) -> list[list[int]]:
        """Returns the indices of all pictures in groups of one size, each of at most `most`."""
        done: list[list[int]] = []
        begun: dict[ImageSize, list[int]] = {}
        for index in range(len(self.prompts)):
            size = self.manifest.of_picture(index).image.size
            begun.setdefault(size, []).append(index)
            if len(begun[size]) == most:
                done.append(begun.pop(size))
        return [*done, *begun.values()]

    def draw_batch(self, runner: Runner, indices: Sequence[int]) -> list[Picture]:
        """Returns the pictures `draw` gives for these indices, drawn at once; they must be of one size.

        Every call is made at the `CallPlace` of its step; its `picture` is the first index.
        """
        sizes = {self.manifest.of_picture(index).image.size for index in indices}
        if len(sizes) > 1:
            raise ValueError(f"pictures {indices} are of {len(sizes)} sizes")
        manifest, prompts = self.manifest.of_picture(indices[0]), [self.prompts[index] for index in indices]
        with at_place(picture=indices[0]):
            return list(exercise(runner, manifest, self.tokenizers, prompts, [self.seed + each for each in indices]))


def measure_gaps(
    components: Sequence[Component],
    as_run: Sequence[Component],
    weights: Mapping[str, CompressedTensor],
    runtimes: Mapping[str, Runtime],
    session: Session,
    evidence: Evidence,
    to_diffusers: ToDiffusers,
    advance: Callable[[], None],
) -> Gaps:
    """Draws every prompt with the float model, with the stored weights and with the artifact, and compares.

    `as_run` are the components as the target's runtimes are to compute them from the stored weights; they are the
    reference of the lowering gap. The modules hold the float weights before and after. `advance` is called
    `gap_steps(runtimes)` times.
    """
    torch, stored_torch = torch_runner(components), torch_runner(as_run)
    shared = session.manifest, session.tokenizers
    asked_of = torch, *shared, session.prompts, session.seed
    floats = []
    snr_db = layer_snr_db(layers_of(components), weights, lambda: floats.extend(record(*asked_of, slice(1))))
    floats += record(*asked_of, slice(1, None))
    give_back_freed()
    advance()
    lowering: dict[str, ParityReport] = {}
    drawn: dict[str, list[Picture]] = {}
    with decompressed({component.name: component.module.model for component in components}, weights):
        stored = record(stored_torch, *shared, session.prompts, session.seed)
        rows = [
            compare_call(stored_torch, call, index, NO_LIMITS)
            for index, recording in enumerate(floats)
            for call in recording.calls
        ]
        give_back_freed()
        advance()
        timed = {name: TimedRunner(runtime.runner) for name, runtime in runtimes.items()}
        for name, runtime in runtimes.items():
            asked = stored_torch, stored, timed[name], *shared, runtime.limits, evidence.feature_distance
            lowering[name], found = compare(*asked)
            drawn[name] = [_shown(picture, stored[0].picture) for picture in found]
            advance()
    pictures = Pictures(
        [each.picture for each in floats], [each.picture for each in stored], next(iter(drawn.values()))
    )
    return Gaps(
        to_diffusers=to_diffusers,
        compression=_report(rows, session, pictures.stored, pictures.float_model, evidence),
        lowering=lowering,
        total=_report([], session, pictures.artifact, pictures.float_model, evidence),
        pictures=pictures,
        alignment={name: evidence.alignment(getattr(pictures, name), session.prompts) for name in KINDS},
        misread={name: evidence.misread(getattr(pictures, name), session.prompts) for name in KINDS},
        call_seconds=next(iter(timed.values())).call_seconds(),
        layer_snr_db=snr_db,
    )


def gap_steps(runtimes: Mapping[str, Runtime]) -> int:
    """How many steps `measure_gaps` tells of."""
    return 2 + len(runtimes)


def _shown(picture: Picture | None, like: Picture) -> Picture:
    """The picture; black when it was not finite, as a phone would show it."""
    return np.zeros_like(like) if picture is None else picture


def _report(
    rows: list[ParityRow],
    session: Session,
    found: Sequence[Picture],
    expected: Sequence[Picture],
    evidence: Evidence,
) -> ParityReport:
    pictures = [
        compare_pictures(one, other, index, session.prompts[index], session.seed + index, evidence.feature_distance)
        for index, (one, other) in enumerate(zip(found, expected, strict=True))
    ]
    return ParityReport(limits=NO_LIMITS, rows=rows, pictures=pictures)
