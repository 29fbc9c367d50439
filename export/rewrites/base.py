# SPDX-License-Identifier: Apache-2.0
"""What every rewrite of a component promises: the same outputs, before anything is rounded."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ...ground.arrays import Arrays
from ...ground.errors import TurbopocketError
from ...runtimes.compare.metrics import relative_error
from ...runtimes.compare.replay import Call
from ...runtimes.pipeline import Pipeline
from ..families.graphs import Component, ComponentModule

TOLERANCE = 1e-6
"""Of ||rewritten - as it was|| / ||as it was||, of every output of every recorded call."""


@dataclass(frozen=True)
class Rewritten:
    """A component that computes the same in another way, and what a person may want to know of it: by name, and as a
    sentence."""

    component: Component
    facts: Mapping[str, float]
    remark: str


class Rewrite(ABC):
    """One kind of change. `name` is what recipes and manifests call it; it is made to a pipeline's denoiser.

    `of_text` says whether its constants are made of what text encoders say, `only_these_steps` whether they hold for
    the shipped timesteps alone.
    """

    name: ClassVar[str]
    of_text: ClassVar[bool]
    only_these_steps: ClassVar[bool]

    @abstractmethod
    def refusal(self, denoiser: Component, pipeline: Pipeline) -> str | None:
        """None when it can be made, as far as shapes tell, else the reason."""

    @abstractmethod
    def shaped(self, denoiser: Component, pipeline: Pipeline, timesteps: Sequence[float]) -> Component:
        """The denoiser with constants of unknown values, for what reads shapes alone."""

    @abstractmethod
    def made(
        self, denoiser: Component, pipeline: Pipeline, calls: Sequence[Call], timesteps: Sequence[float]
    ) -> Rewritten:
        """The denoiser rewritten. `calls` are some that it had for two prompts at least, and without a prompt where
        the model is ever asked so; `timesteps` are those of all calls that a picture takes.

        Raises TurbopocketError when the calls show that it can not be made.
        """

    def require(self, denoiser: Component, pipeline: Pipeline) -> None:
        """Raises TurbopocketError with the reason when it can not be made."""
        if reason := self.refusal(denoiser, pipeline):
            raise TurbopocketError(f"{self.name}: {reason}", hint=f"leave {self.name} out of compress.rewrites")


def applied(
    rewrite: Rewrite, denoiser: Component, pipeline: Pipeline, calls: Sequence[Call], timesteps: Sequence[float]
) -> Rewritten:
    """The denoiser rewritten, which was found to give every recorded call's outputs again; it shares all tensors.

    Raises TurbopocketError when the rewrite does not fit the model, or changes an output by more than `TOLERANCE`.
    """
    rewrite.require(denoiser, pipeline)
    found = rewrite.made(denoiser, pipeline, calls, timesteps)
    for number, call in enumerate(calls):
        outputs = _outputs(found.component, call.inputs)
        for name, expected in call.outputs.items():
            error = relative_error(outputs[name], expected)
            if not error <= TOLERANCE:
                raise TurbopocketError(
                    f"{rewrite.name}: in recorded call {number} {denoiser.name} gives {name} with a relative error "
                    f"of {error:.3g}, more than {TOLERANCE:g}: it is not the same computation"
                )
    return found


def own_modules(component: Component) -> Component:
    """The same with modules of its own, which share all tensors and weights with the others."""
    module = component.module
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    twin: nn.Module = copy.deepcopy(module, shared)
    assert isinstance(twin, ComponentModule)
    return replace(component, module=twin)


def _outputs(component: Component, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
    with torch.no_grad():
        outputs = component.module(*(torch.from_numpy(np.asarray(inputs[name])) for name in component.example_inputs))
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    return {name: output.numpy() for name, output in zip(component.output_names, outputs, strict=True)}
