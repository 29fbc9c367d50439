# SPDX-License-Identifier: Apache-2.0
"""Artifacts on every emulated ARM CPU: errors to PyTorch and to x86-64, and the kernels that ran. Minutes per CPU.

    python benchmarks/arm64.py ARTIFACT... [--out benchmarks/results/arm64.json]

Artifacts are folders that `build` made, their reports beside them; results of others in the JSON are kept. Says nothing
about speed on a device.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from turbopocket.export.check import check
from turbopocket.export.progress import StageProgress
from turbopocket.export.verify.emulated import Emulated
from turbopocket.runtimes.arm64.cpus import CPUS, PREFIX
from turbopocket.runtimes.arm64.setup import default_cache, prepare


def row(found: Emulated, compression: dict[str, float]) -> dict[str, Any]:
    """What one CPU did, as JSON values."""
    (picture,) = found.to_pytorch.pictures
    return {
        "failure": found.failure,
        "steps": found.steps,
        "compression": compression,
        "to_pytorch": found.to_pytorch.worst_errors,
        "to_x86_64": found.to_native.worst_errors,
        "picture_psnr_db_to_pytorch": picture.psnr_db,
        "instructions_by_kernel": found.kernels,
    }


def main() -> None:
    """Measures and writes the JSON, CPU by CPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "arm64.json")
    options = parser.parse_args()
    prepare(default_cache(), print)
    results = json.loads(options.out.read_text()) if options.out.is_file() else {}
    for artifact in options.artifacts:
        checked = check(artifact, StageProgress(), [PREFIX + cpu.name for cpu in CPUS])
        assert checked.gaps is not None
        compression = checked.gaps.compression.worst_errors
        results[artifact.name] = {name: row(found, compression) for name, found in checked.emulated.items()}
        options.out.write_text(json.dumps(results, indent=2) + "\n")
        print(json.dumps(results[artifact.name], indent=2))


if __name__ == "__main__":
    main()
