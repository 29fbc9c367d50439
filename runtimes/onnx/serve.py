# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on the emulated CPU: answers requests of `wire` on stdin until it ends. Run by `runner`, with -m.

Imports the standard library, numpy, ONNX Runtime and files of ours that need no more: that is all there is on the
emulated side, and every import costs seconds there.
"""

from pathlib import Path
from typing import IO

import numpy as np
import onnxruntime as ort

from ..kernels.library import onnx_operators
from ..served import wire
from ..served.serve import serve
from .session import open_session, run_session

_KERNELS_IN = "onnxruntime_pybind11_state"


class Server:
    """Sessions by key."""

    def __init__(self) -> None:
        self.sessions: dict[str, ort.InferenceSession] = {}

    def answer(self, verb: int, key: str, pipe: IO[bytes]) -> wire.Arrays:
        """What one request asks for; its arguments are read from `pipe` before anything can fail."""
        match verb:
            case wire.OPEN:
                model, weights = wire.read_text(pipe), wire.read_text(pipe)
                self.sessions[key] = open_session(model, threads=1, weights=weights or None, operators=onnx_operators())
                return {}
            case wire.RUN:
                inputs, outputs = wire.read_tensors(pipe), wire.read_texts(pipe)
                return dict(zip(outputs, run_session(self.sessions[key], outputs, inputs), strict=True))
            case wire.CLOSE:
                del self.sessions[key]
                return {}
            case wire.ABOUT:
                return {"kernel_addresses": np.array(_mapped(_KERNELS_IN), dtype=np.int64)}
        raise wire.Broken(f"verb {verb}")


def _mapped(library: str) -> list[tuple[int, int]]:
    """Address ranges [start, end) of the library's code in this process."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions, *_ = line.split()
        if library in line and "x" in permissions:
            start, end = (int(number, 16) for number in addresses.split("-"))
            ranges.append((start, end))
    return ranges


if __name__ == "__main__":
    serve(Server().answer)
