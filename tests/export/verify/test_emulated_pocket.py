# SPDX-License-Identifier: Apache-2.0
"""The bundled model on an emulated ARM CPU: what continuous integration knows about phones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from turbopocket.export.build.draft import pipeline_manifest
from turbopocket.export.checkpoint.load import load
from turbopocket.export.families.components import layers_of
from turbopocket.export.output.names import RANGES_FILE, WEIGHTS_FILE
from turbopocket.export.output.staging import report_folder
from turbopocket.export.recipe import make_recipe
from turbopocket.export.targets.layer import kind_of
from turbopocket.export.targets.registry import open_target
from turbopocket.quant.fit import parse_fit
from turbopocket.quant.formats import parse_format
from turbopocket.quant.ranges import save_ranges
from turbopocket.quant.scheme import Scheme
from turbopocket.quant.store import save_weights
from turbopocket.runtimes.manifest import file_entries, write_manifest

pytestmark = pytest.mark.timeout(1800)  # the first run sets up the emulated CPU
CPU = "arm64:cortex-a76"
FORMATS = ("int4-g32", "int8-g32", "fp16")


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pocket` lowered without a plan, which takes minutes: layers in turn in each format, values by absmax."""
    recipe = make_recipe(
        {"model": {"source": "pocket"}, "sampler": {"steps": 1, "guidance": 1.0}, "parity": {"pictures": 1}}, "test"
    )
    model, target = load("pocket", (), 1), open_target(recipe.target)
    components = target.components(model, [model.image_size])
    layers, traced = layers_of(components), {each.name: target.trace(each) for each in components}
    folder = tmp_path_factory.mktemp("arm64") / "pocket"
    folder.mkdir()
    target.write_side_files(model, traced, model.image_size, folder)
    weights = {}
    for index, name in enumerate(name for graph in traced.values() for name in graph.layers):
        weight: Any = layers[name].weight.detach()
        wanted = parse_format(FORMATS[index % len(FORMATS)])
        fits = target.storable(Scheme(wanted), kind_of(weight.shape), tuple(weight.shape)) is None
        weights[name] = (wanted if fits else parse_format("fp16")).compress(weight, parse_fit("absmax"))
    specs = {
        name: target.lower(graph, {layer: weights[layer] for layer in graph.layers}, folder)
        for name, graph in traced.items()
    }
    plan = {"schemes": {name: str(Scheme(weight.format)) for name, weight in weights.items()}}
    manifest = pipeline_manifest(model, recipe, specs, target.tools)
    write_manifest(folder, manifest.model_copy(update={"files": file_entries(folder), "plan": plan}))
    report_folder(folder).mkdir()
    save_weights(report_folder(folder) / WEIGHTS_FILE, weights)
    save_ranges(report_folder(folder) / RANGES_FILE, {})
    return folder


def test_bundled_model_computes_on_arm_what_it_computes_here(
    turbopocket: Callable[..., Any], pocket: Path, emulator_cache: Path
) -> None:
    ran = turbopocket("check", pocket, "--cpu", CPU, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    on_arm, compression = found["emulated"][CPU], found["parity"]["compression"]
    assert set(compression) == {"text_encoder", "text_encoder_2", "unet", "vae_decoder"}
    for other, limit in (("to_pytorch", 1e-4), ("to_native", 1e-5)):
        assert {row["component"] for row in on_arm[other]["rows"]} == set(compression)
        for row in on_arm[other]["rows"]:
            assert row["relative_error"] <= limit < compression[row["component"]] / 10
    (picture,) = on_arm["to_pytorch"]["pictures"]
    assert picture["psnr_db"] is None or picture["psnr_db"] > 45
    assert on_arm["instructions_by_kernel"]["fp32"] > 100
