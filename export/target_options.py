# SPDX-License-Identifier: Apache-2.0
"""What can be asked of each target: the options of a target are its section of a recipe, so a default is told once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..ground.errors import TurbopocketError
from .units import parse_bytes

Deployment = Literal["iOS17", "iOS18", "iOS26"]
Codebooks = Literal["portable", "kernel"]


@dataclass(frozen=True)
class OnnxOptions:
    """How ONNX Runtime is to run it.

    Attributes:
        accuracy_level: of MatMulNBits: 1 multiplies in fp32, 4 quantizes activations to int8 (faster on ARM).
        activations: how layers in `int8-row` round what they are given, so that integers are multiplied: not at all,
            with scales found while it runs, or by calibration: one for all timesteps, or one for each that the steps
            walk through (`step`). A layer whose inputs calibrated scales would ruin has dynamic ones. A Conv2d has
            calibrated scales wherever activations are rounded, or fp32's product.
        prepacked: save weights in the layout of this machine's CPU kernels: less memory, but twice the file, and only
            for the same kind of CPU.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    accuracy_level: Literal[0, 1, 4] = 1
    activations: Literal["float", "dynamic", "static", "step"] = "float"
    prepacked: bool = False


@dataclass(frozen=True)
class CoreMLOptions:
    """What Core ML packages are to need.

    Attributes:
        deployment: the oldest system that reads them; iOS18 is the first with groups of scales, 4-bit integers and
            vectors in lookup tables.
        max_package: a UNet of more bytes becomes two packages, which are loaded one after the other.
        batch: items that one call of the UNet takes. Apple's Swift pipelines always give two, with guidance and
            without; an app with a loop of its own needs one where there is no guidance, and half the work.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    deployment: Deployment = "iOS18"
    max_package: str = "1GiB"
    batch: Literal[1, 2] = 2

    def __post_init__(self) -> None:
        parse_bytes(self.max_package, "max_package")

    @property
    def max_package_bytes(self) -> int:
        """`max_package` in bytes."""
        return parse_bytes(self.max_package, "max_package")


@dataclass(frozen=True)
class ExecuTorchOptions:
    """How ExecuTorch programs are to run.

    Attributes:
        activations: how 8-bit layers whose format does not say it round inputs: with scales found while they run, or by
            calibration. Static scales round outputs too; layers whose inputs they would ruin, and all 4-bit ones, stay
            dynamic.
        weights: whether a program holds its constants, or a .ptd file beside it does, which can be sent and mapped by
            itself.
        codebooks: what reads layers of codebooks: operators that every ExecuTorch has, or ours, which an app has to
            link.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    activations: Literal["dynamic", "static"] = "dynamic"
    weights: Literal["inside", "apart"] = "inside"
    codebooks: Codebooks = "portable"

    @property
    def static(self) -> bool:
        """Whether activations are rounded with scales that calibration chose."""
        return self.activations == "static"

    @property
    def weights_apart(self) -> bool:
        """Whether constants go into a file of their own."""
        return self.weights == "apart"


@dataclass(frozen=True)
class TargetEntry:
    """What a recipe, a help text and a report say of a target.

    Attributes:
        title: for people; options: a frozen dataclass with a default for each field.
        several_sizes: whether one artifact draws several sizes; emulated: whether artifacts run on emulated CPUs.
    """

    title: str
    options: type[Any]
    several_sizes: bool = False
    emulated: bool = False


TARGET_ENTRIES: dict[str, TargetEntry] = {
    "onnx": TargetEntry("ONNX Runtime", OnnxOptions, several_sizes=True, emulated=True),
    "coreml": TargetEntry("Core ML", CoreMLOptions),
    "executorch": TargetEntry("ExecuTorch", ExecuTorchOptions, emulated=True),
}
"""Every target by its name in recipes and manifests."""


def known_target(name: str) -> str:
    """Returns the name itself. Raises TurbopocketError when there is no such target."""
    if name not in TARGET_ENTRIES:
        raise TurbopocketError(f"`{name}` is not a target: known are {', '.join(TARGET_ENTRIES)}")
    return name


def with_several_sizes() -> Sequence[str]:
    """Returns the targets of which one artifact draws several sizes."""
    return [name for name, entry in TARGET_ENTRIES.items() if entry.several_sizes]


def with_emulation() -> Sequence[str]:
    """Returns the targets whose artifacts run on emulated CPUs."""
    return [name for name, entry in TARGET_ENTRIES.items() if entry.emulated]
