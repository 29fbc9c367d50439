# SPDX-License-Identifier: Apache-2.0
"""The runner of an artifact, whatever it was built for."""

from pathlib import Path

from .manifest import Manifest
from .runner import LayerRunner


def open_runner(folder: Path, manifest: Manifest) -> LayerRunner:
    """The runner for the manifest's target, our kernels included where built; the runtime is imported only now."""
    match manifest.target:
        case "onnx":
            from .kernels.library import onnx_operators
            from .onnx.runner import OnnxRunner

            return OnnxRunner(folder, manifest, operators=onnx_operators())
        case "coreml":
            from .coreml.apple import on_a_mac
            from .coreml.runner import CoreMLRunner

            return CoreMLRunner(folder, manifest, None if on_a_mac() else "fp32")
        case "executorch":
            from .executorch.runner import ExecuTorchRunner

            return ExecuTorchRunner(folder, manifest)
