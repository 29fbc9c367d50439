# SPDX-License-Identifier: Apache-2.0
"""A build for ONNX whose layers multiply integers of mixed widths, end to end: bytes, operators, parity by layer."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from turbopocket.export.build.build import build
from turbopocket.export.build.outcome import Built
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import make_recipe
from turbopocket.runtimes.manifest import load_manifest

PINS = {"unet.*attn*": "int4-row+a8-static+float", "unet.*.conv1": "int4-row+a8-static", "text*": "int8-row+a8-dynamic"}
FORMATS = ["int8-row+a8-static"]
EXPECTED = {"int4-row+a8-static+float", "int4-row+a8-static", "int8-row+a8-static", "int8-row+a8-dynamic"}


@pytest.fixture(scope="module")
def built(tiny_sd: Path, recipe_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Built:
    wanted = {
        "target": {"name": "onnx"},
        "compress": {"formats": FORMATS, "fit": "absmax", "pin": PINS},
        "model": {"source": str(tiny_sd)},
    }
    out = tmp_path_factory.mktemp("integers") / "art"
    recipe = make_recipe({**recipe_values, **wanted}, "test")
    return build(recipe, out, overwrite=False, progress=StageProgress(quiet=True))


def graphs(folder: Path) -> Iterator[onnx.GraphProto]:
    for spec in load_manifest(folder).components.values():
        yield onnx.load(folder / spec.file, load_external_data=False).graph


def test_the_plan_says_the_bytes(built: Built) -> None:
    assert built.total_bytes <= built.plan.total_bytes
    assert built.total_bytes == pytest.approx(built.plan.total_bytes, rel=0.01)


def test_every_layer_is_multiplied_in_integers_of_its_width(built: Built) -> None:
    schemes = built.plan.schemes
    assert {str(scheme) for scheme in schemes.values()} == EXPECTED
    kinds: Counter[str] = Counter()
    codes: Counter[int] = Counter()
    for graph in graphs(built.folder):
        kinds.update(node.op_type for node in graph.node)
        codes.update(each.data_type for each in graph.initializer if each.name.endswith(".codes"))
    assert kinds["MatMulIntegerToFloat"] + kinds["QLinearConv"] == len(schemes)
    assert kinds["Conv"] == kinds["MatMulNBits"] == 0
    four_bits = sum(str(scheme).startswith("int4") for scheme in schemes.values())
    assert codes == {onnx.TensorProto.INT4: four_bits, onnx.TensorProto.INT8: len(schemes) - four_bits}


def test_every_layer_is_held_against_pytorch_that_rounds(built: Built, turbopocket: Callable[..., Any]) -> None:
    ran = turbopocket("check", built.folder, "--json")
    assert ran.code == 0, ran.err
