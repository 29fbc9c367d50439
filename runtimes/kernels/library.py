# SPDX-License-Identifier: Apache-2.0
"""Where `make kernels` puts what it builds. Also runs on an emulated CPU: needs nothing but Python."""

import platform
from pathlib import Path


def onnx_operators() -> Path | None:
    """The library of our operators for ONNX Runtime on this kind of machine, None where it was not built."""
    library = Path(__file__).parent / "lib" / platform.machine() / "libcodebook_onnxruntime.so"
    return library if library.is_file() else None
