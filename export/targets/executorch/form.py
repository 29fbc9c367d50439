# SPDX-License-Identifier: Apache-2.0
"""One layer of an ExecuTorch program: the constants it reads, the bytes it takes, and its arithmetic in PyTorch."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from ....quant.formats import CompressedTensor, PartSpec
from ....quant.ranges import Ranges
from ...target_options import ExecuTorchOptions
from ..layer import LayerBytes, LayerForm, LayerUse
from .size import KEY_BYTES, PLACE_BYTES, constants_bytes

DEFAULTS = ExecuTorchOptions()
OPERATOR_MEMORY_BYTES = 11_000
"""What a layer holds beside its weight: of programs of 1 and of 41 Linear layers with an activation behind each, in
int8-row, in ExecuTorch 1.5.1 on x86-64."""


@dataclass
class Order:
    """What the codebook layers of one component hand on: the output of the one that ran last, while it is exported."""

    last: Tensor | None = None


@dataclass(frozen=True)
class FormOptions:
    """What the layers of one component have in common.

    `asked` is for formats that say nothing of activations: those of 8 bits have static scales where it says so and
    `ranges` (what each layer saw, by full name) leave digits enough. Static scales are those of the ranges. `order` is
    that in which layers read codebooks.
    """

    asked: ExecuTorchOptions = DEFAULTS
    ranges: Mapping[str, Ranges] = field(default_factory=dict)
    order: Order = field(default_factory=Order)


@dataclass(frozen=True)
class ProgramForm(LayerForm):
    """One layer in one scheme; `reference` is the module that is exported."""

    options: FormOptions

    named_by_hash: ClassVar[bool] = True
    """Whether the program names the constants by their SHA-256: XNNPACK's are."""

    @property
    def runs_as_linear(self) -> bool:
        """Whether it is a convolution of one tap that runs as the Linear that it is."""
        return False

    def memory(self, use: LayerUse) -> LayerBytes:
        """The weight as it is stored, which XNNPACK packs when the program is loaded and lets go of the file's."""
        return LayerBytes(self.format.nbytes(self.layer.shape) + OPERATOR_MEMORY_BYTES)

    @abstractmethod
    def tensors(self) -> list[PartSpec]:
        """The constants that a program holds for the weight."""

    @abstractmethod
    def arrays(self, weight: CompressedTensor) -> list[Tensor]:
        """The constants, byte for byte.

        Rows are outputs and columns in (kh, kw, I) order, as in the matrix view.
        """

    @abstractmethod
    def operators_bytes(self) -> int:
        """Bytes of what runs the layer, at most."""

    def own_bytes(self) -> int:
        """Bytes of its operators and constants, at most, without those that it has in common with others."""
        own = [spec.nbytes for at, spec in enumerate(self.tensors()) if at not in self.shared()]
        return self.operators_bytes() + constants_bytes(own, KEY_BYTES if self.named_by_hash else PLACE_BYTES)

    def shared_bytes(self) -> int:
        """Bytes of the constants that all layers of the format have in common."""
        return constants_bytes([self.tensors()[at].nbytes for at in self.shared()], PLACE_BYTES)


def constant(values: Tensor) -> nn.Parameter:
    """A parameter, so that runners know the module as a layer with a weight."""
    return nn.Parameter(values.detach().contiguous(), requires_grad=False)
