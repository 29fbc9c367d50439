# SPDX-License-Identifier: Apache-2.0
"""The runner of an artifact, whatever it was built for."""

from collections.abc import Callable
from pathlib import Path

from ..ground.errors import TurbopocketError
from .manifest import Manifest
from .runner import LayerRunner


def open_runner(folder: Path, manifest: Manifest) -> LayerRunner:
    """The runner for the manifest's target, our kernels included where built; the runtime is imported only now.

    Raises TurbopocketError for a target that nothing here runs.
    """
    if manifest.target not in RUNNERS:
        raise TurbopocketError(
            f"{folder} is for target {manifest.target!r}, which nothing here runs: known are {', '.join(RUNNERS)}"
        )
    return RUNNERS[manifest.target](folder, manifest)


def _onnx(folder: Path, manifest: Manifest) -> LayerRunner:
    from .kernels.library import onnx_operators
    from .onnx.runner import OnnxRunner

    return OnnxRunner(folder, manifest, operators=onnx_operators())


def _coreml(folder: Path, manifest: Manifest) -> LayerRunner:
    from .coreml.apple import on_a_mac
    from .coreml.runner import CoreMLRunner

    return CoreMLRunner(folder, manifest, None if on_a_mac() else "fp32")


def _executorch(folder: Path, manifest: Manifest) -> LayerRunner:
    from .executorch.runner import ExecuTorchRunner

    return ExecuTorchRunner(folder, manifest)


RUNNERS: dict[str, Callable[[Path, Manifest], LayerRunner]] = {
    "onnx": _onnx,
    "coreml": _coreml,
    "executorch": _executorch,
}
"""What opens an artifact, by its target."""
