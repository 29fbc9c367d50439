# SPDX-License-Identifier: Apache-2.0
"""An artifact on an emulated CPU: one picture drawn there, each call against PyTorch and against this machine's CPU."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...quant.compress import decompressed
from ...quant.formats import CompressedTensor
from ...runtimes.compare.crosscheck import crosscheck, draw_recorded
from ...runtimes.compare.replay import compare_pictures
from ...runtimes.compare.rows import Limits, ParityReport
from ...runtimes.drawing.text_to_image import generate
from ...runtimes.runner import LayerRunner
from ..evidence import Evidence
from ..families.graphs import Component
from .gaps import Runtime, Session, torch_runner

PICTURE_STEPS = 4
"""Sampling steps of the picture, at most, for a model that draws with any number; a student keeps its own. Emulation is
50 to 400 times slower, and a kernel that computes wrong does so at every step."""


ORDER_OF_SUMS = 1e-5
"""Between two CPUs where nothing is rounded, only the order of float sums differs; measured: 4e-7 at most."""


class EmulatedRunner(LayerRunner, Protocol):
    """A runner on an emulated CPU, which logs what it executes."""

    def kernels(self) -> dict[str, int]:
        """Instructions of the runtime that have run so far, by the kind of kernel they belong to."""
        ...

    def close(self) -> None:
        """Ends the emulation."""
        ...


@dataclass(frozen=True)
class EmulatedRuntime:
    """An artifact's runtime on an emulated CPU, and how far it may be from PyTorch and from the same runtime here.

    With `within_compression` no component may differ between the two CPUs by more than compression changed it.
    """

    runner: EmulatedRunner
    to_pytorch: Limits
    to_native: Limits
    within_compression: bool = False


@dataclass(frozen=True)
class Emulated:
    """What one CPU did: its calls and picture against PyTorch with the stored weights, its calls against this CPU."""

    to_pytorch: ParityReport
    to_native: ParityReport
    steps: int
    kernels: dict[str, int]

    @property
    def failure(self) -> str | None:
        """One sentence on what is wrong, None when nothing is."""
        if self.to_pytorch.failure is not None:
            return f"to PyTorch: {self.to_pytorch.failure}"
        return self.to_native.failure and f"to this machine's CPU: {self.to_native.failure}"

    def summary(self) -> dict[str, Any]:
        """Returns the outcome as JSON values."""
        return {
            "passed": self.failure is None,
            "failure": self.failure,
            "steps": self.steps,
            "instructions_by_kernel": self.kernels,
            "to_pytorch": self.to_pytorch.model_dump(mode="json"),
            "to_native": self.to_native.model_dump(mode="json"),
        }


def measure_emulated(
    components: Sequence[Component],
    as_run: Sequence[Component],
    weights: Mapping[str, CompressedTensor],
    runtime: EmulatedRuntime,
    native: Runtime,
    compression: ParityReport,
    session: Session,
    evidence: Evidence,
    advance: Callable[[], None],
) -> Emulated:
    """Draws the session's first picture on the emulated CPU and compares; `advance` is called twice.

    `as_run` are the components as the target's runtimes are to compute them from the stored weights, `compression` says
    how far they then are from the float model.
    """
    manifest, tokenizers, prompt = session.manifest, session.tokenizers, session.prompts[0]
    shipped = manifest.sampler.steps
    steps = shipped if manifest.only_these_steps else min(shipped, PICTURE_STEPS)
    asked = manifest, tokenizers, prompt, session.seed, steps
    drawn, calls = draw_recorded(runtime.runner, *asked)
    advance()
    torch = torch_runner(as_run)
    gaps = compression.worst_errors if runtime.within_compression else {}
    ceilings = {name: max(error, ORDER_OF_SUMS) for name, error in gaps.items()}
    with decompressed({component.name: component.module.model for component in components}, weights):
        to_pytorch = crosscheck(runtime.runner, calls, torch, torch, runtime.to_pytorch)
        expected = generate(torch, *asked)
        to_native = crosscheck(runtime.runner, calls, native.runner, torch, runtime.to_native, ceilings)
    picture = compare_pictures(drawn, expected, 0, prompt, session.seed, evidence.feature_distance)
    advance()
    return Emulated(to_pytorch.model_copy(update={"pictures": [picture]}), to_native, steps, runtime.runner.kernels())
