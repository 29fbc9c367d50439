# SPDX-License-Identifier: Apache-2.0
"""What keeps a wrong or silently widened program from being written.

XNNPACK's lowering takes a layer whose weight is dequantized while its input is not, drops the scale and stores the
codes as fp32, without a word (ExecuTorch 1.4.1 and 1.5.1). The first gate knows that pattern; the second asks the
finished file for every code and scale, whatever went wrong on the way.
"""

import hashlib
import mmap
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ....ground.errors import TurbopocketError
from ....quant.formats import CompressedTensor
from ....runtimes.executorch.file import read_data_names, read_layout
from .stores import form_of_weight

_LAYERS = (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default)


def refuse_weight_only(program: torch.export.ExportedProgram) -> None:
    """Returns when every layer with integer weights has an integer input; else TurbopocketError names the layer."""
    for node in program.graph.nodes:
        if node.target in _LAYERS and _is_dequantized(node.args[1]) and not _is_dequantized(node.args[0]):
            stack = list(node.meta.get("nn_module_stack", {}).values())
            layer = stack[-1][0] if stack else node.name
            raise TurbopocketError(
                f"{layer}: its weight is integers, its input is not; XNNPACK drops the scale of such a layer"
            )


def require_constants(path: Path, weights: Mapping[str, CompressedTensor]) -> None:
    """Returns when the program, or the .ptd file, at `path` holds every weight byte for byte as it was compressed.

    XNNPACK's constants are named by the SHA-256 of their bytes; others have no such names and are looked for
    themselves. TurbopocketError names the first layer whose codes or scales are not there: they were changed,
    folded or widened on the way.
    """
    names = read_data_names(path) if path.suffix == ".ptd" else read_layout(path).program
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
        for layer, weight in weights.items():
            form = form_of_weight(layer, weight)
            for constant in form.arrays(weight):
                if not (constant_key(constant).encode() in names if form.named_by_hash else _holds(held, constant)):
                    raise TurbopocketError(
                        f"{layer}: {path.name} does not hold its {weight.format} values as they were compressed: "
                        f"{list(constant.shape)} {str(constant.dtype).removeprefix('torch.')} are missing"
                    )


def constant_key(constant: Tensor) -> str:
    """What XNNPACK names a constant: the SHA-256 of its bytes, in hexadecimal."""
    return hashlib.sha256(_bytes_of(constant)).hexdigest()


def _holds(held: mmap.mmap, constant: Tensor) -> bool:
    """Whether the bytes are there; the next constant is looked for from there on first, where it mostly is."""
    wanted = _bytes_of(constant)
    found = held.find(wanted, held.tell())
    found = held.find(wanted, 0) if found < 0 else found
    held.seek(max(found, 0))
    return found >= 0


def _bytes_of(constant: Tensor) -> bytes:
    return constant.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _is_dequantized(node: object) -> bool:
    return isinstance(node, torch.fx.Node) and "dequantize" in str(node.target)
