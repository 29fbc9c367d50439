# SPDX-License-Identifier: Apache-2.0
"""What a session's options make of the memory of a UNet in codebooks: the manifest's, and ONNX Runtime's defaults.

    python benchmarks/session_options.py ARTIFACT [--out benchmarks/results/session_options.json]

ARTIFACT is `pocket-turbo` by the recipe `codebooks`. Anonymous memory is that which a fresh process has more after one
run than before it opened the session, on one thread, in three processes; with our operators where `make kernels` built
them.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import onnxruntime as ort

from turbopocket.runtimes.kernels.library import onnx_operators
from turbopocket.runtimes.manifest import load_manifest
from turbopocket.runtimes.memory import component_bytes, zero_inputs
from turbopocket.runtimes.onnx.memory import resident_bytes
from turbopocket.runtimes.onnx.session import session_options

TRIALS = 3
OURS, DEFAULT, OPERATORS = "manifest's options", "default options", "our operators"


def print_growth(artifact: Path, row: str) -> None:
    """Bytes, of this very process."""
    manifest = load_manifest(artifact)
    spec = manifest.components["unet"]
    inputs = zero_inputs(spec, manifest.image.at(manifest.largest_size))
    options = ort.SessionOptions() if row == DEFAULT else session_options()
    options.intra_op_num_threads = 1
    if row == OPERATORS:
        options.register_custom_ops_library(str(onnx_operators()))
    start = resident_bytes()["RssAnon"]
    session = ort.InferenceSession(str(artifact / spec.file), options, providers=["CPUExecutionProvider"])
    session.run(None, inputs)
    print(resident_bytes()["RssAnon"] - start)


def main(artifact: Path, out: Path) -> None:
    """Measures and writes the JSON."""
    grown = {}
    for row in (OURS, DEFAULT, *([OPERATORS] if onnx_operators() else [])):
        command = [sys.executable, __file__, str(artifact), "--row", row]
        runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(TRIALS)]
        grown[row] = [int(said) for said in runs]
    weights = component_bytes(artifact, load_manifest(artifact), "unet")
    told = json.dumps({"onnxruntime": ort.__version__, "weight_bytes": weights, "grown_anon_bytes": grown}, indent=2)
    out.write_text(told + "\n", encoding="utf-8")
    print(told)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "session_options.json")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.row:
        print_growth(asked.artifact, asked.row)
    else:
        main(asked.artifact, asked.out)
