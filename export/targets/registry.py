# SPDX-License-Identifier: Apache-2.0
"""Which targets there are."""

from ..recipe import TargetSection
from ..units import parse_bytes
from .base import Target
from .coreml.program import CoreMLOptions
from .coreml.target import CoreML
from .executorch.target import ExecuTorch
from .onnx.program import OnnxOptions
from .onnx.target import Onnx

TARGETS: tuple[Target, ...] = (Onnx(), CoreML(), ExecuTorch())
"""Every target, with its default options."""


def open_target(section: TargetSection, guided: bool = False) -> Target:
    """Returns the target that a recipe asks for; `guided` says whether classifier-free guidance is on."""
    if section.name == "coreml":
        wanted = section.coreml
        batch = 2 if guided else 1
        return CoreML(CoreMLOptions(wanted.deployment, batch, max_package_bytes=parse_bytes(wanted.max_package)))
    if section.name == "executorch":
        asked = section.executorch
        return ExecuTorch(asked.activations == "static", asked.weights == "apart", asked.codebooks)
    return Onnx(OnnxOptions(section.onnx.accuracy_level, section.onnx.prepacked))
