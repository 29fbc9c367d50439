# SPDX-License-Identifier: Apache-2.0
"""Run as a script: opens one ONNX graph, runs it once and prints what that cost in memory, as JSON, in bytes.

Imports neither torch nor onnx, so that the process holds only what a phone's process would.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

from turbopocket.runtimes.onnx.memory import mapped_bytes as pages_in_memory
from turbopocket.runtimes.onnx.session import session_options


def status_bytes(field: str) -> int:
    """A field of /proc/self/status that counts memory."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def mapped_bytes(file_name: str) -> int:
    """Bytes of mappings of files with that name, resident or not."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [line[0].split("-") for line in lines if line[-1].endswith(file_name)]
    return sum(int(end, 16) - int(start, 16) for start, end in spans)


def main(model: str, *entries: str) -> None:
    options = session_options(threads=1)
    for entry in entries:
        options.add_session_config_entry(*entry.split("=", 1))
    before, before_all = status_bytes("RssAnon"), status_bytes("VmHWM")
    files = status_bytes("RssFile")
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    loaded = status_bytes("RssAnon")
    random = np.random.default_rng(0)
    inputs = {
        i.name: random.standard_normal([1 if isinstance(n, str) else n for n in i.shape], dtype=np.float32)
        for i in session.get_inputs()
    }
    outputs = session.run(None, inputs)
    runtime = status_bytes("RssFile") - files - pages_in_memory(Path(model).parent)
    report = {
        "anonymous": status_bytes("RssAnon") - before,
        "anonymous_loaded": loaded - before,
        "mapped": mapped_bytes(".onnx.data"),
        "peak": status_bytes("VmHWM") - before_all,
        "own_peak": status_bytes("VmHWM") - before - files - runtime,
        "finite": all(bool(np.isfinite(output).all()) for output in outputs),
        "torch": "torch" in sys.modules,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
