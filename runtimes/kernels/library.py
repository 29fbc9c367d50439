# SPDX-License-Identifier: Apache-2.0
"""Where `make kernels` puts what it builds. Also runs on an emulated CPU: needs nothing but Python."""

import platform
from pathlib import Path


def onnx_operators() -> Path | None:
    """The library of our operators for ONNX Runtime on this kind of machine, None where it was not built."""
    return _library("libcodebook_onnxruntime.so")


def executorch_operators() -> Path | None:
    """The library of our operators for ExecuTorch's Python bindings here, None where it was not built."""
    return _library("libcodebook_executorch.so")


def _library(name: str) -> Path | None:
    library = Path(__file__).parent / "lib" / platform.machine() / name
    return library if library.is_file() else None
