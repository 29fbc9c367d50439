# SPDX-License-Identifier: Apache-2.0
"""ExecuTorch's Python bindings in a process of their own: answers requests of `wire` on stdin until it ends.

Run by `runner`, with -m. The bindings are imported alone: the rest of ExecuTorch takes longer than
PyTorch.
"""

from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ...ground.errors import TurbopocketError
from ..kernels.library import executorch_operators, require_whole
from ..served import wire
from ..served.serve import serve
from .file import read_layout
from .imported import executorch_module

METHOD = "forward"


class Server:
    """Methods by key, each with its program, which has to outlive it."""

    def __init__(self) -> None:
        self.bindings: Any = executorch_module("extension.pybindings._C")
        self.opened: dict[str, tuple[Any, Any]] = {}

    def answer(self, verb: int, key: str, pipe: IO[bytes]) -> wire.Arrays:
        """What one request asks for; its arguments are read from `pipe` before anything can fail.

        Opening gives the program's own word on its tensors: `input 0`, … and `output 0`, …, each its type as PyTorch
        numbers them, then its sizes.
        """
        match verb:
            case wire.OPEN:
                model, data = wire.read_text(pipe), wire.read_text(pipe)
                return self._open(key, model, data or None)
            case wire.RUN:
                inputs, outputs = wire.read_tensors(pipe), wire.read_texts(pipe)
                given = [torch.from_numpy(value.copy()) for value in inputs.values()]
                found = self.opened[key][1](given)
                return {name: value.numpy() for name, value in zip(outputs, found, strict=True)}
            case wire.CLOSE:
                del self.opened[key]
                return {}
        raise wire.Broken(f"verb {verb}")

    def _open(self, key: str, model: str, data: str | None) -> wire.Arrays:
        if read_layout(Path(model)).needs_operators:
            _load_operators()
        check = self.bindings.Verification.InternalConsistency
        program = self.bindings._load_program(model, program_verification=check, data_path=data)
        method = program.load_method(METHOD)
        self.opened[key] = program, method
        meta = method.method_meta()
        sides = {
            "input": (meta.num_inputs(), meta.input_tensor_meta),
            "output": (meta.num_outputs(), meta.output_tensor_meta),
        }
        described = {}
        for side, (count, meta_of) in sides.items():
            for index in range(count):
                tensor = meta_of(index)
                described[f"{side} {index}"] = np.array([tensor.dtype(), *tensor.sizes()], dtype=np.int64)
        return described


def _load_operators() -> None:
    """Our operators, which register with the bindings' libraries. TurbopocketError where they can not be loaded."""
    library = executorch_operators()
    try:
        if library is not None:
            require_whole(library)
        torch.ops.load_library(str(library))
    except OSError as error:
        raise TurbopocketError(f"{library} can not be loaded: {error}") from error


if __name__ == "__main__":
    serve(Server().answer)
