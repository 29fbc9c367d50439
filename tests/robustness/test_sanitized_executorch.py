# SPDX-License-Identifier: Apache-2.0
"""Damaged programs through our operators for ExecuTorch, compiled with the sanitizers of `sanitizers`.

The runtime maps what a program's table says and trusts it, so now and then it ends its process, which is why it has
one. Asked for is that no report of a sanitizer, and no abort, has our operators among the calls that led to it.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from turbopocket.export.families.graphs import Component, ComponentModule
from turbopocket.export.target_options import ExecuTorchOptions
from turbopocket.export.targets.executorch import program as target
from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.fit import MSE
from turbopocket.quant.formats import parse_format
from turbopocket.runtimes.served.process import ServedProcess

from .damaged_programs import Damaged
from .mutations import with_other_tables
from .sanitizers import built, environment

FORMATS = {"conv": "avq2x8-d8", "linear": "vq8-d4"}
SERVED = """
import turbopocket.runtimes.executorch.serve as m
from pathlib import Path
m.executorch_operators = lambda: Path({operators!r})
{planted}
m.serve(m.Server().answer)
"""
POISONED = """
import ctypes
honest = m.torch.from_numpy
def poisoned(array):
    made = honest(array)
    ctypes.CDLL(None).__asan_poison_memory_region(ctypes.c_void_p(made.data_ptr()), ctypes.c_size_t(made.nbytes))
    return made
m.torch.from_numpy = poisoned
"""
"""What a program is given to read is no memory of anybody's, as far as AddressSanitizer knows."""
NOT_OURS = "ended the process, none of our operators under way"
CASES = 400

pytest.importorskip("executorch")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


class Layers(ComponentModule):
    """A convolution and a Linear."""

    def forward(self, sample: Tensor) -> Tensor:
        pixels = self.model["conv"](sample).flatten(2).transpose(1, 2)
        return self.model["linear"](pixels)  # type: ignore[no-any-return]


@dataclass
class Sanitized:
    """A process that runs programs on the operators, begun again whenever one has ended it."""

    operators: Path
    scratch: Path
    planted: str = ""
    ends: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    last_report: str = ""
    _process: ServedProcess | None = None

    def run(self, program: Path, what: str) -> None:
        """Opens it, runs it and shuts it; counts how that ended."""
        process = self._started()
        sample = np.random.default_rng(0).standard_normal((1, 8, 6, 6), dtype=np.float32)
        try:
            process.open("part", program)
            process.run("part", {"sample": sample}, ["row"])
            process.shut("part")
        except TurbopocketError as error:
            self._ended(str(error), what)
        else:
            self.ends["ran"] += 1

    def _ended(self, said: str, what: str) -> None:
        if "the process ended" not in said:
            self.ends["refused"] += 1
            return
        self.close()
        reports = sorted(self.scratch.glob("report.*"))
        told = "\n".join(each.read_text(errors="replace") for each in reports)
        self.last_report = told
        for each in reports:
            each.unlink()
        if "codebook" in told:
            self.ends["fault"] += 1
            self.faults.append(f"{what}: {said}\n{told[:3000]}")
        else:
            self.ends[NOT_OURS] += 1

    def _started(self) -> ServedProcess:
        if self._process is None:
            served = SERVED.format(operators=str(self.operators), planted=self.planted)
            given = {**os.environ, **environment(self.scratch / "report")}
            given["ASAN_OPTIONS"] += ":handle_abort=1:allocator_may_return_null=1"
            self._process = ServedProcess([sys.executable, "-c", served], "ExecuTorch", given)
        return self._process

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.close()
            self._process = None


@pytest.fixture(scope="module")
def operators() -> Path:
    """Our operators for ExecuTorch."""
    import executorch

    (package,) = executorch.__path__
    return built("codebook_executorch", f"-DEXECUTORCH={package}")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, both of which our operators run."""
    torch.manual_seed(0)
    modules: Any = nn.ModuleDict({"conv": nn.Conv2d(8, 64, 3, padding=1), "linear": nn.Linear(64, 32)})
    sample = {"sample": torch.zeros(1, 8, 6, 6)}
    component = Component("part", Layers("part", modules.eval()), sample, ("row",), role="denoiser")
    weights = {
        f"part.{name}": parse_format(text).compress(modules[name].weight.detach(), MSE)
        for name, text in FORMATS.items()
    }
    folder = tmp_path_factory.mktemp("program")
    traced = target.trace(component, ExecuTorchOptions(codebooks="kernel"))
    return folder / target.lower(traced, weights, folder).file


@pytest.fixture
def sanitized(operators: Path, tmp_path: Path) -> Iterator[Sanitized]:
    made = Sanitized(operators, tmp_path)
    yield made
    made.close()


def test_damaged_programs_are_refused_or_run_within_their_tensors(
    sanitized: Sanitized, program: Path, tmp_path: Path
) -> None:
    sanitized.run(program, "whole")
    assert sanitized.ends["ran"] == 1, sanitized.faults
    damaged = Damaged(program.read_bytes())
    case = tmp_path / "case.pte"
    for seed in range(CASES):
        random = Random(f"program {seed}")
        if seed % 4:
            case.write_bytes(damaged.program(random))
        else:
            case.write_bytes(with_other_tables(program.read_bytes(), random))
        sanitized.run(case, str(seed))
    print(f"{CASES} cases: {dict(sanitized.ends)}")
    assert not sanitized.faults, "\n\n".join(sanitized.faults)
    assert sanitized.ends["ran"] > CASES / 20
    assert sanitized.ends["refused"] > CASES / 4


def test_the_sanitizers_see_what_a_program_reads(sanitized: Sanitized, program: Path) -> None:
    sanitized.planted = POISONED  # which the runtime copies before our operators see it
    sanitized.run(program, "whole")
    assert dict(sanitized.ends) == {NOT_OURS: 1}
    assert "use-after-poison" in sanitized.last_report
