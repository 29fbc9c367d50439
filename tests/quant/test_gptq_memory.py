# SPDX-License-Identifier: Apache-2.0
"""GPTQ's factorisation happens in one float64 matrix, read from the peak of a process that does nothing else."""

import json
import subprocess
import sys

METER = """
import json, re, sys
from pathlib import Path
import torch
from turbopocket.quant.fit.gptq import error_feedback

def status_bytes(field):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\\s+(\\d+) kB$", status, re.MULTILINE)[1])

torch.set_num_threads(1)
error_feedback(torch.eye(1500))
found = []
for columns in map(int, sys.argv[1:]):
    hessian_KK = torch.eye(columns).add_(0.5)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    before = status_bytes("VmRSS")
    feedback_KK = error_feedback(hessian_KK)
    found.append((status_bytes("VmHWM") - before) / (8 * columns**2))
    del hessian_KK, feedback_KK
print(json.dumps(found))
"""


def test_the_factorisation_takes_little_more_than_one_float64_matrix() -> None:
    run = subprocess.run([sys.executable, "-c", METER, *["4000"] * 4], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    # What a library loads or pools in its first calls only adds; a second matrix would be in every call.
    assert 0.9 < min(found) < 1.3, found
