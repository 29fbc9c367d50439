# SPDX-License-Identifier: Apache-2.0
"""A program that ends the process which opens it ends nothing else, and is one sentence."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.executorch.runner import ExecuTorchRunner
from turbopocket.runtimes.served.process import ServedProcess

pytest.importorskip("executorch.exir")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.export's own
XNNPACK = b"XN01"
"""What each of XNNPACK's own tables begins with, which the program's check of itself does not reach."""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear layer as a .pte file."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    exported = torch.export.export(nn.Linear(8, 8).eval(), (torch.zeros(1, 8),), strict=False)
    path = tmp_path_factory.mktemp("pte") / "net.pte"
    with path.open("wb") as file:
        to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch().write_to_file(file)
    return path


def test_a_crash_of_the_runtime_is_one_sentence(program: Path, tmp_path: Path) -> None:
    """Another mark is put into an error's words, which the bindings can not decode: they end the process by SIGABRT."""
    data = program.read_bytes()
    assert XNNPACK in data
    damaged = tmp_path / "net.pte"
    damaged.write_bytes(data.replace(XNNPACK, b"\xff\xff\xff\xff"))
    command = [sys.executable, "-m", f"{ExecuTorchRunner.__module__.rpartition('.')[0]}.serve"]
    with (
        ServedProcess(command, "ExecuTorch") as process,
        pytest.raises(TurbopocketError, match=r"^ExecuTorch, net from .*: the process ended by SIGABRT: .+$"),
    ):
        process.open("net", damaged)
    with ServedProcess(command, "ExecuTorch") as process:
        assert process.open("net", program)
