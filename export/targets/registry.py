# SPDX-License-Identifier: Apache-2.0
"""Which targets there are."""

from ..recipe import TargetSection
from ..target_options import TARGET_ENTRIES
from .base import Target
from .coreml.target import CoreML
from .executorch.target import ExecuTorch
from .onnx.target import Onnx

TARGETS: dict[str, type[Target]] = {each.name: each for each in (Onnx, CoreML, ExecuTorch)}
"""Every target by its name."""


def open_target(section: TargetSection) -> Target:
    """Returns the target that a recipe asks for."""
    return TARGETS[section.name].opened(section.options)


def default_targets() -> tuple[Target, ...]:
    """Returns every target, with its default options."""
    return tuple(target.opened(TARGET_ENTRIES[name].options()) for name, target in TARGETS.items())
