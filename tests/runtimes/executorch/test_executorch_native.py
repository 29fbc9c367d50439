# SPDX-License-Identifier: Apache-2.0
"""The C++ runner of ExecuTorch programs, here and on an emulated ARM CPU: right answers, and no trust in its input."""

import json
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.arm64.cpus import parse_cpu
from turbopocket.runtimes.arm64.setup import open_emulator
from turbopocket.runtimes.executorch.native import build
from turbopocket.runtimes.executorch.native.build import arm64_runner, native_runner
from turbopocket.runtimes.executorch.native.memory import measure_program
from turbopocket.runtimes.manifest import file_entries, load_manifest, write_manifest
from turbopocket.runtimes.served import wire
from turbopocket.runtimes.served.process import ServedProcess

pytest.importorskip("executorch.exir")
pytestmark = [
    pytest.mark.timeout(1800),  # the first run sets up the emulated CPU
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # torch.export's own
]
NAMES = ["y", "hidden"]


class Net(nn.Module):
    """A convolution that XNNPACK runs, a norm that it does not, a linear layer, two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Linear(8, 16)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.norm(self.conv(x)).relu()
        return self.linear(hidden.flatten(2).transpose(1, 2)) * scale, hidden


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The net as a .pte file."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    example = torch.zeros(1, 3, 8, 8), torch.zeros(1)
    exported = torch.export.export(Net().eval(), example, strict=False)
    path = tmp_path_factory.mktemp("pte") / "net.pte"
    with path.open("wb") as file:
        to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch().write_to_file(file)
    return path


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {"x": rng.standard_normal((1, 3, 8, 8), dtype=np.float32), "scale": np.array([2.0], dtype=np.float32)}


@pytest.fixture(scope="module")
def expected(inputs: dict[str, Any]) -> list[Any]:
    with torch.no_grad():
        return [tensor.numpy() for tensor in Net().eval()(*map(torch.from_numpy, inputs.values()))]


@pytest.fixture
def server() -> Iterator[ServedProcess]:
    with ServedProcess([str(native_runner()), "serve"], "runner") as started:
        yield started


def test_outputs_are_pytorchs(server: ServedProcess, program: Path, inputs: Any, expected: Any) -> None:
    server.open("net", program)
    for _ in range(2):
        found = server.run("net", inputs, NAMES)
        for name, value in zip(NAMES, expected, strict=True):
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5)
    server.shut("net")
    with pytest.raises(TurbopocketError, match="no model is open under net"):
        server.run("net", inputs, NAMES)


def test_emulated_arm_gives_the_same(program: Path, inputs: Any, expected: Any, emulator_cache: Path) -> None:
    emulator = open_emulator(emulator_cache)
    command = emulator.command(parse_cpu("arm64:cortex-a76"), arm64_runner(emulator), "serve", environment={}, log=None)
    with ServedProcess(command, "runner", environment={}) as server:
        server.open("net", program)
        found = server.run("net", inputs, NAMES)
        assert len(server.about()["kernel_addresses"]) > 0
    for name, value in zip(NAMES, expected, strict=True):
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": np.zeros((1, 3, 8, 4), np.float32)}, r"x is float32 \[1, 3, 8, 4\], .* takes float32 \[1, 3, 8, 8\]"),
        ({"x": np.zeros((1, 3, 8, 8), np.float16)}, r"x is float16 \[1, 3, 8, 8\], the program takes float32"),
        ({"x": np.zeros((3, 8, 8), np.float32)}, r"x is float32 \[3, 8, 8\]"),
        ({"more": np.zeros(1, np.float32)}, "2 inputs and 2 outputs, asked were 3 and 2"),
    ],
)
def test_inputs_made_for_another_program_are_refused(
    server: ServedProcess, program: Path, inputs: Any, changed: Any, message: str
) -> None:
    server.open("net", program)
    with pytest.raises(TurbopocketError, match=message):
        server.run("net", inputs | changed, NAMES)
    assert set(server.run("net", inputs, NAMES)) == set(NAMES)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "other format", "garbage"])
def test_damaged_program_is_one_clear_error(server: ServedProcess, program: Path, tmp_path: Path, damage: str) -> None:
    content = program.read_bytes()
    damaged = {
        "empty": b"",
        "cut": content[: len(content) // 2],
        "other format": content[:4] + b"ET99" + content[8:],
        "garbage": np.random.default_rng(0).bytes(4096),
    }
    path = tmp_path / "damaged.pte"
    if damage != "missing":
        path.write_bytes(damaged[damage])
    with pytest.raises(TurbopocketError, match="damaged.pte can not be (read|made ready)"):
        server.open("net", path)
    server.open("net", program)


@pytest.mark.parametrize(
    "request_bytes",
    [
        bytes([9]) + struct.pack("<I", 0),
        bytes([wire.RUN]) + struct.pack("<I", 1 << 31),
        bytes([wire.RUN]) + struct.pack("<III", 0, 1, 1) + b"x" + bytes([0, 2]) + struct.pack("<II", 1 << 30, 1 << 30),
        bytes([wire.RUN]) + struct.pack("<III", 0, 1, 1) + b"x" + bytes([200, 0]),
        bytes([wire.OPEN]) + struct.pack("<II", 0, 5) + b"abc",
    ],
)
def test_request_that_is_not_the_protocol_ends_the_program_with_an_error(request_bytes: bytes) -> None:
    command = [str(native_runner()), "serve"]
    done = subprocess.run(command, input=request_bytes, capture_output=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stdout == b""
    assert done.stderr.startswith(b"error: ")


def test_memory_and_times_are_json(program: Path) -> None:
    command = [str(native_runner()), "measure", "3", str(program)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["start"]["anon_bytes"] <= found["loaded"]["anon_bytes"] <= found["peak_bytes"] < 100_000_000
    assert len(found["run_ms"]) == 3
    assert min(found["run_ms"]) > 0


def test_memory_of_a_component_is_that_of_its_program(program: Path, toy_artifact: Path) -> None:
    shutil.copy(program, toy_artifact / "vae_decoder.pte")
    manifest = load_manifest(toy_artifact)
    spec = manifest.components["vae_decoder"].model_copy(update={"file": "vae_decoder.pte"})
    changed = {"components": manifest.components | {"vae_decoder": spec}, "files": file_entries(toy_artifact)}
    write_manifest(toy_artifact, manifest.model_copy(update=changed))
    found = measure_program(toy_artifact, "vae_decoder")
    assert found.weight_bytes == program.stat().st_size
    assert 0 < found.start_anon_bytes <= found.loaded_anon_bytes <= found.peak_bytes
    (toy_artifact / "vae_decoder.pte").write_bytes(b"")
    with pytest.raises(TurbopocketError, match="memory of vae_decoder.* can not be read"):
        measure_program(toy_artifact, "vae_decoder")


def test_missing_cmake_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build.shutil, "which", lambda _: None)
    with pytest.raises(TurbopocketError, match="built with cmake, which is not there"):
        native_runner()
