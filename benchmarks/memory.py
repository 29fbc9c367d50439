# SPDX-License-Identifier: Apache-2.0
"""What components were predicted to take of memory at their peaks, beside what they take in their runtime here.

    python benchmarks/memory.py ARTIFACT … [--out benchmarks/results/memory.json]
    python benchmarks/memory.py --terms
    python benchmarks/memory.py --recorded [--sdxl FOLDER]

Predictions are from shapes and the schemes of the manifest's plan, as `plan` makes them. Measured is one process for
each component, with one thread: the most that it held beside what it was before, without pages of the runtime's own
code, once with an allocator that gives freed blocks of 128 KiB and more back at once, and as `default` with glibc's own
thresholds, which keep now more, now fewer of them. Each artifact replaces the entry of its name. `--terms` measures
what ONNX Runtime holds for a session, a node and a tensor: the constants of `export/targets/onnx/memory.py`.
`--recorded` predicts what other benchmarks measured with glibc's thresholds: `unet.json`, and with SDXL's configs in
FOLDER the builds in one format of `sdxl_builds.json`. These did not tell a component's pages from the runtime's; of
the latter there are as many as a component has that holds no page of its own file.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from unet import BUILDS

from turbopocket.export.build.forecast import drawing_works
from turbopocket.export.build.manifest import planned_schemes
from turbopocket.export.build.peak import peak_memory
from turbopocket.export.checkpoint.load import load_shapes
from turbopocket.export.recipe import Recipe, make_recipe, recipe_of
from turbopocket.export.targets.base import Target
from turbopocket.export.targets.layer import kind_of
from turbopocket.export.targets.registry import open_target
from turbopocket.quant.peak import ComponentMemory
from turbopocket.quant.plan import Candidate, LayerChoices
from turbopocket.quant.scheme import Scheme, parse_scheme
from turbopocket.runtimes.command import run
from turbopocket.runtimes.manifest import load_manifest

RESULTS = Path(__file__).parent / "results" / "memory.json"
NODES, VALUES, CALLS, BODY = 3000, 512, 240, 14
AT_ONCE = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(2**17))
"""What Android's and Apple's allocators do with large blocks, in glibc's words."""
METER = """
import sys
from turbopocket.runtimes.onnx.memory import resident_bytes
from turbopocket.runtimes.onnx.session import open_session
import numpy as np
start = resident_bytes()["RssAnon"]
session = open_session(sys.argv[1], threads=1)
session.run(None, {"x": np.ones((1, int(sys.argv[2])), np.float32)})
print(resident_bytes()["RssAnon"] - start)
"""


def compared(artifact: Path) -> dict[str, Any]:
    """By component, bytes that were predicted and measured."""
    manifest = load_manifest(artifact)
    recipe = recipe_of(artifact, manifest)
    target, found = open_target(recipe.target), {}
    schemes = planned_schemes(manifest)
    for name, each in predicted(recipe, lambda name, shape: schemes.get(name)).items():
        ways = {"measured": AT_ONCE, "default": {}}
        measured = {way: measured_peak(target, artifact, name, limits) for way, limits in ways.items()}
        found[name] = {"predicted": each.peak, "held": each.held, "running": each.running, **measured}
    return {"target": manifest.target, "components": found}


def predicted(
    recipe: Recipe, scheme_of: Callable[[str, tuple[int, ...]], Scheme | None], only: Sequence[str] = ()
) -> dict[str, ComponentMemory]:
    """Of the recipe's components, or some of them, with each layer in its scheme; without one a layer is not run."""
    target, model = open_target(recipe.target), load_shapes(recipe.model.source, recipe.model.config)
    works = {name: work for name, work in drawing_works(recipe, model, target).items() if not only or name in only}
    layers = [layer for work in works.values() for layer in work.layers]
    asked = {layer.name: scheme_of(layer.name, layer.shape) for layer in layers}
    schemes = {
        layer.name: str(target.resolved(layer.name, scheme, kind_of(layer.shape)))
        for layer in layers
        if (scheme := asked[layer.name]) is not None
    }
    choices = {
        layer.name: LayerChoices(layer.name, layer.shape, (Candidate(schemes[layer.name], 0, 0.0),))
        for layer in layers
        if layer.name in schemes
    }
    return peak_memory(target, works, choices).of(schemes)


def recorded(sdxl: Path | None) -> dict[str, Any]:
    """By build and component, what was predicted and what other benchmarks recorded."""
    found: dict[str, Any] = {}
    figures = json.loads((RESULTS.parent / "unet.json").read_text())["unet_memory"]
    for name, (section, text, otherwise) in BUILDS.items():
        base = figures[f"{section.name} fp32"]
        told = {"unet": recorded_peak(figures[name], base["ran_file_bytes"] - base["start_file_bytes"])}
        target = open_target(section)

        def scheme(
            layer: str, shape: tuple[int, ...], target: Target = target, asked: Any = (text, otherwise)
        ) -> Scheme:
            first, other = map(parse_scheme, asked)
            return other if target.storable(first, kind_of(shape), shape) else first

        recipe = make_recipe({"target": section.model_dump(), "sampler": {"steps": 4, "guidance": 0.0}}, name)
        found[name] = beside(predicted(recipe, scheme, ["unet"]), told)
    for row in json.loads((RESULTS.parent / "sdxl_builds.json").read_text()) if sdxl else ():
        if row["folder"] == "sdxl-full" and "," not in row["formats"]:
            code = min(each["ran_file_bytes"] - each["start_file_bytes"] for each in row["memory"].values())
            told = {name: recorded_peak(each, code) for name, each in row["memory"].items()}
            values = {"model": {"source": str(sdxl)}, "target": {"name": row["target"]}}
            drawn = {"image": {"sizes": [row["size"]]}, "sampler": {"steps": 1, "guidance": 0.0}}
            one = parse_scheme(row["formats"])
            expected = predicted(make_recipe({**values, **drawn}, "recorded"), lambda name, shape, one=one: one)
            found[f"{row['folder']} {row['target']} {row['formats']}"] = beside(expected, told)
    return found


def recorded_peak(figures: Mapping[str, int], code_bytes: int) -> int:
    """What a component held at its peak, of a runtime that has so many bytes of pages of its own files."""
    return figures["peak_bytes"] - figures["start_anon_bytes"] - figures["start_file_bytes"] - code_bytes


def beside(expected: Mapping[str, ComponentMemory], told: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Predictions beside what was recorded."""
    return {
        name: {"predicted": each.peak, "held": each.held, "running": each.running, "default": told[name]}
        for name, each in expected.items()
    }


def measured_peak(target: Target, artifact: Path, component: str, limits: Mapping[str, str]) -> int | None:
    """Bytes; None where only a device can tell."""
    for name in AT_ONCE:
        os.environ.pop(name, None)
    os.environ.update(limits)  # of the process that is measured
    found = target.memory(artifact, component)
    return None if found is None else found.component_peak_bytes


def terms() -> dict[str, float]:
    """Bytes of a session, and of a node and a tensor more."""
    with tempfile.TemporaryDirectory() as folder:
        one, plain, named, tensors = (
            grown(Path(folder), *asked)
            for asked in ((1, False, False), (NODES, False, False), (NODES, True, False), (NODES, True, True))
        )
        called = grown(Path(folder), CALLS, True, False, BODY)
    return {
        "session": one,
        "node": (plain - one) / NODES,
        "named_node": (named - one) / NODES,
        "tensor": (tensors - named) / NODES,
        "inlined_node": (called - one) / (CALLS * BODY),
    }


def grown(folder: Path, count: int, named: bool, own_tensors: bool, body: int = 0) -> int:
    """Bytes of a session of a chain of additions, after one run; with a `body`, of calls of a function of so many."""
    path = f"{count}-{named}-{own_tensors}-{body}.onnx"
    inner = [f"t{at}" for at in range(body - 1)]
    steps = zip(["x", *inner], [*inner, "y"], strict=True)
    additions = [helper.make_node("Add", [each, "w"], [to]) for each, to in steps]
    opset, own = helper.make_opsetid("", 21), helper.make_opsetid("turbopocket", 1)
    function = helper.make_function(own.domain, "Several", ["x", "w"], ["y"], additions, [opset])
    operator = {"op_type": "Several", "domain": own.domain} if body else {"op_type": "Add"}
    nodes, tensors, x = [], {}, "x"
    for at in range(count):
        layer = f"down_blocks.1.attentions.0.transformer_blocks.{at}.ff.net.0.proj"
        y = layer if named else f"v{at}"
        tensor = f"{layer}.scale" if own_tensors else "scale"
        tensors[tensor] = numpy_helper.from_array(np.full(VALUES, at, np.float32), tensor)
        nodes.append(helper.make_node(inputs=[x, tensor], outputs=[y], name=layer if named else "", **operator))
        x = y
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", VALUES]) for name in ("x", x)]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], list(tensors.values()))
    functions = [function] if body else []
    model = helper.make_model(graph, opset_imports=[opset, own], functions=functions, ir_version=10)
    onnx.save(model, folder / path, save_as_external_data=True, location=f"{path}.data", size_threshold=0)
    return int(run([sys.executable, "-c", METER, str(folder / path), str(VALUES)], path))


def main() -> None:
    """Measures, prints a line a component, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--terms", action="store_true")
    parser.add_argument("--recorded", action="store_true")
    parser.add_argument("--sdxl", type=Path)
    asked = parser.parse_args()
    known: dict[str, Any] = json.loads(asked.out.read_text()) if asked.out.is_file() else {}
    if asked.terms:
        known["onnxruntime_terms"] = {name: round(nbytes) for name, nbytes in terms().items()}
        print(json.dumps(known["onnxruntime_terms"], indent=1))
    if asked.recorded:
        known["recorded"] = recorded(asked.sdxl)
        for build, components in known["recorded"].items():
            show(build, components)
    for artifact in asked.artifacts:
        known.setdefault("artifacts", {})[artifact.name] = compared(artifact)
        show(artifact.name, known["artifacts"][artifact.name]["components"])
        asked.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    asked.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def show(artifact: str, components: Mapping[str, Mapping[str, int]]) -> None:
    """Prints a line a component: predicted, measured with each allocator, and predicted over measured."""
    for name, each in components.items():
        told = [each.get("measured"), each["default"]]
        ratios = " ".join(f"{each['predicted'] / bytes:6.3f}" for bytes in told if bytes)
        print(f"{artifact:28} {name:16} {each['predicted']:>14,} {told[0]!s:>12} {told[1]!s:>12} {ratios}", flush=True)


if __name__ == "__main__":
    main()
