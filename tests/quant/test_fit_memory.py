# SPDX-License-Identifier: Apache-2.0
"""Fits work in one float32 matrix of K², read from the peak of a process that does nothing else."""

import json
import subprocess
import sys

import pytest

METER = """
import json, re, sys
from pathlib import Path
import torch
from turbopocket.quant.fit import GPTQ, VQDM, AdditiveGrid, IntegerGrid
from turbopocket.quant.fit.hessian import HalfMatrix

def status_bytes(field):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\\s+(\\d+) kB$", status, re.MULTILINE)[1])

torch.set_num_threads(1)
fit, grid = {"gptq": (GPTQ, IntegerGrid(4, True, 32)), "vqdm": (VQDM, AdditiveGrid(2, 8, 8))}[sys.argv[1]]

def half(columns):
    whole_KK = torch.eye(columns).add_(0.5)
    return HalfMatrix(tuple(whole_KK[:end, end - 1024 : end].clone() for end in range(1024, columns + 1, 1024)))

fit.choose(torch.randn(8, 2048), grid, half(2048))
found = []
for columns in [4096] * 3:
    weight_OK, hessian = torch.randn(8, columns), half(columns)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    before = status_bytes("VmRSS")
    fit.choose(weight_OK, grid, hessian)
    found.append((status_bytes("VmHWM") - before) / (4 * columns**2))
print(json.dumps(found))
"""


@pytest.mark.parametrize(("fit", "most"), [("gptq", 1.25), ("vqdm", 1.85)])
def test_a_fit_takes_one_matrix_and_the_search_half_of_another(fit: str, most: float) -> None:
    run = subprocess.run([sys.executable, "-c", METER, fit], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    # What a library loads or pools in its first calls only adds; a second matrix would be in every call.
    assert 0.9 < min(found) < most, found
