# SPDX-License-Identifier: Apache-2.0
"""The core built for 64-bit ARM, on emulated CPUs: NEON computes the bits of AVX2."""

import os
import subprocess
import sys
from pathlib import Path

from turbopocket.runtimes.arm64.cpus import CPUS
from turbopocket.runtimes.arm64.emulator import Emulator
from turbopocket.runtimes.arm64.setup import open_emulator
from turbopocket.runtimes.kernels.core_library import CoreLibrary

ROOT = Path(__file__).parents[3]
PROGRAM = """
import hashlib, sys
from pathlib import Path
import numpy as np
from turbopocket.runtimes.kernels.core_library import CodebookWeights, Conv2dLayer, CoreLibrary

core, rng = CoreLibrary(Path(sys.argv[1])), np.random.default_rng(0)

def weights(outputs, vectors):
    codes = rng.integers(0, 256, (outputs, vectors, 2), dtype=np.uint8)
    codebooks = rng.uniform(-1, 1, (2, 256, 8)).astype(np.float16)
    return CodebookWeights(codes, codebooks, rng.uniform(0.5, 2, outputs).astype(np.float16))

linear, conv2d = weights(40, 33), weights(20, 18)
rows, picture = (rng.uniform(-1, 1, shape).astype(np.float32) for shape in ((19, 264), (1, 16, 9, 9)))
layer = Conv2dLayer((3, 3), padding=(1, 1, 1, 1))
for path in core.paths():
    results = core.linear(linear, rows, path).tobytes() + core.conv2d(conv2d, layer, picture, path).tobytes()
    print(path, hashlib.sha256(results).hexdigest())
"""


def build_for_arm64(emulator: Emulator, target: str) -> Path:
    """The folder with `target`, built by the compiler that `arm64 setup` unpacked."""
    host, folder = emulator.trees / "host", ROOT / "build" / "kernels" / "tests-aarch64"
    libraries = f"{host}/lib/x86_64-linux-gnu:{host}/usr/lib/x86_64-linux-gnu"
    environment = os.environ | {"LD_LIBRARY_PATH": libraries, "PATH": f"{host}/usr/bin:{os.environ['PATH']}"}
    sources = ROOT / "runtimes" / "kernels"
    toolchain = f"-DCMAKE_TOOLCHAIN_FILE={sources}/cmake/aarch64-linux-gnu.cmake"
    configure = ["cmake", "-S", str(sources), "-B", str(folder), toolchain, f"-DCROSS_ROOT={host}"]
    for command in (configure, ["cmake", "--build", str(folder), "--target", target]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def hashes(command: list[str]) -> dict[str, str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(line.split() for line in done.stdout.splitlines())


def test_arm_computes_the_bits_of_x86(
    emulator_cache: Path, cmake_build: Path, core: CoreLibrary, tmp_path: Path
) -> None:
    emulator = open_emulator(emulator_cache)
    (tmp_path / "turbopocket").mkdir()
    for folder in ("ground", "runtimes"):
        (tmp_path / "turbopocket" / folder).symlink_to(ROOT / folder)
    library = build_for_arm64(emulator, "codebook") / "libcodebook.so"
    there = hashes(
        emulator.command(
            CPUS[0],
            emulator.python,
            "-c",
            PROGRAM,
            str(library),
            environment={"PYTHONPATH": f"{tmp_path}:{emulator.site}", "PYTHONDONTWRITEBYTECODE": "1"},
        )
    )
    here = hashes([sys.executable, "-c", PROGRAM, str(cmake_build / "libcodebook.so")])
    assert list(there) == ["scalar", "neon"]
    assert there["scalar"] == here["scalar"]
    assert "avx2" not in here or there["neon"] == here["avx2"]
