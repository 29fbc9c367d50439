# SPDX-License-Identifier: Apache-2.0
"""Run as a script: loads a model, traces it for ONNX, runs each graph with float weights and with stored ones.

Prints the largest growth of anonymous memory over that, the bytes of the layers' weights in fp32 and those of the
stored ones, as JSON. What is mapped from files does not count.
"""

import json
import math
import re
import sys
import threading
from pathlib import Path

from turbopocket.export.checkpoint.load import load
from turbopocket.export.families.components import components_of, layers_of, shapes_of
from turbopocket.export.targets.onnx.trace import trace
from turbopocket.export.verify.gaps import torch_runner
from turbopocket.quant import layers as quant_layers
from turbopocket.quant.account import layer_snr_db
from turbopocket.quant.compress import decompressed
from turbopocket.quant.fit import ABSMAX
from turbopocket.quant.formats import parse_format
from turbopocket.quant.layers import weight_of

KEPT_BYTES = 2**22
SAMPLE_S = 0.002


def anonymous_bytes() -> int:
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def main(small: str, large: str) -> None:
    use(small, graphs=1)  # what libraries set up when they are first used
    before = peak = anonymous_bytes()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_S):
            peak = max(peak, anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    dense_bytes, stored_bytes = use(large)
    done.set()
    sampler.join()
    print(json.dumps({"growth": peak - before, "dense": dense_bytes, "stored": stored_bytes}))


def use(folder: str, graphs: int | None = None) -> tuple[int, int]:
    """Bytes of the layers' weights in fp32, and as they are stored; traces so many graphs, all by default."""
    components = components_of(load(folder))
    layers = layers_of(components)
    runner, form = torch_runner(components), parse_format("int4-row")

    def run() -> None:
        for component in components:
            item = {name: each[:1] if each.ndim else each for name, each in component.example_inputs.items()}
            runner.run(component.name, {name: each.numpy() for name, each in item.items()})

    for component in components[:graphs]:
        trace(component)
    weights = {name: form.compress(weight_of(name, layer), ABSMAX) for name, layer in layers.items()}
    layer_snr_db(layers, weights, run)
    with decompressed({component.name: component.module.model for component in components}, weights):
        run()
    dense = sum(4 * math.prod(shape) for shape in shapes_of(layers).values())
    return dense, sum(each.nbytes for each in weights.values())


if __name__ == "__main__":
    quant_layers.KEPT_BYTES = KEPT_BYTES
    main(*sys.argv[1:])
