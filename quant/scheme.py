# SPDX-License-Identifier: Apache-2.0
"""What is decided for a layer, as a value with a name: `int8-row`, `int8-row+a8-dynamic`, `int8-row+a8-static`.

After compressed-tensors' QuantizationScheme (weights, input_activations, output_activations), as one string.
"""

from dataclasses import dataclass

from .activations import ActivationFormat
from .formats import LayerFormat, parse_format
from .names import known_scheme, outputs_with, scheme_name


@dataclass(frozen=True)
class Scheme:
    """How a weight is stored, and how the layer's input and output are rounded; None leaves them as they are.

    Its name is the weight format's, then that of the activations' format: rounded inputs where it is dynamic, rounded
    inputs and outputs where scales are calibrated, since integers that come out of a layer are what these are for. Any
    other pair is spelled out, input first, as in `int8-row+a8-static+float`.

    A name without activations, in a recipe, is a weight format and nothing else: a target reads it as it runs it (see
    `Target.resolved`). Only where a target rounds no activations is it the whole scheme.
    """

    weight: LayerFormat
    input: ActivationFormat | None = None
    output: ActivationFormat | None = None

    @property
    def is_weight_only(self) -> bool:
        """Whether neither input nor output is rounded."""
        return self.input is None and self.output is None

    @property
    def is_static(self) -> bool:
        """Whether it needs scales from calibration: of all timesteps, or of each."""
        return any(each is not None and each.scales != "dynamic" for each in (self.input, self.output))

    @property
    def is_by_step(self) -> bool:
        """Whether these are scales of each timestep."""
        return any(each is not None and each.scales == "step" for each in (self.input, self.output))

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Exact stored bytes of a weight of this shape; TurbopocketError when it does not fit."""
        return self.weight.nbytes(shape)

    def __str__(self) -> str:
        return scheme_name(self.weight, self.input, self.output)


def with_activations(weight: LayerFormat, activations: ActivationFormat) -> Scheme:
    """The scheme that is named by these two: inputs rounded, and outputs too where scales are calibrated."""
    return Scheme(weight, activations, outputs_with(activations))


def parse_scheme(text: str) -> Scheme:
    """The scheme of that name, the inverse of `str(scheme)`; TurbopocketError listing what there is."""
    named = known_scheme(text)
    return Scheme(parse_format(str(named.weight)), named.input, named.output)
