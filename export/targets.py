# SPDX-License-Identifier: Apache-2.0
"""Which targets there are."""

from .lower.coreml import CoreMLOptions
from .lower.onnx import OnnxOptions
from .recipe import TargetSection
from .target import Target
from .target_coreml import CoreML
from .target_executorch import ExecuTorch
from .target_onnx import Onnx
from .units import parse_bytes

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
