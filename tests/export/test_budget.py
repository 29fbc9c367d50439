# SPDX-License-Identifier: Apache-2.0
"""Which formats each layer may have, and what is said when none is left."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from turbopocket.export.build.candidates import candidate_schemes, resolved, with_schemes
from turbopocket.export.build.fixed_bytes import fixed_bytes
from turbopocket.export.checkpoint.load import load_shapes
from turbopocket.export.families.components import layers_of, parameter_count, shapes_of
from turbopocket.export.plan import plan
from turbopocket.export.recipe import make_recipe
from turbopocket.export.sampling.spec import image_spec
from turbopocket.export.target_options import ExecuTorchOptions
from turbopocket.export.targets.executorch.target import ExecuTorch
from turbopocket.export.targets.onnx.target import Onnx
from turbopocket.export.targets.registry import open_target
from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.plan import plan as least_loss
from turbopocket.quant.ranges import Ranges
from turbopocket.quant.scheme import parse_scheme
from turbopocket.quant.sensitivity import estimate_from_shapes

from .published_sdxl import FILES, write_configs

CONFIG_NAMES = ("model_index.json", "config.json")
SHAPES = {"unet.conv_in": (64, 4, 3, 3), "unet.mid.to_q": (64, 64), "unet.mid.to_k": (64, 96)}


def test_a_pinned_layer_is_tried_as_its_pin_alone() -> None:
    pins = {"unet.mid.*": "int4-g32", "unet.conv_*": "fp16", "unet.mid.to_k": "int8-row"}
    found = candidate_schemes(Onnx(), SHAPES, ["int8-g32", "int8-row+a8-static", "fp16"], pins)
    assert {name: [str(each) for each in formats] for name, formats in found.items()} == {
        "unet.conv_in": ["fp16"],
        "unet.mid.to_q": ["int4-g32"],
        "unet.mid.to_k": ["int8-row", "int8-row+a8-static"],  # the weight alone is pinned
    }


def test_a_pin_that_a_layer_can_not_have_is_named_with_its_reason() -> None:
    with pytest.raises(TurbopocketError, match=r"unet.conv_in: no format left .* vector length 8 in avq2") as refused:
        candidate_schemes(Onnx(), SHAPES, ["int8-row"], {"unet.*": "avq2x8-d8"})
    assert refused.value.hint == "pin it to fp16"


def test_candidates_are_resolved_for_what_each_layer_saw() -> None:
    target, narrow, wide = ExecuTorch(ExecuTorchOptions(activations="static")), (-4.0, 4.0), (-400.0, 4.0)
    asked = candidate_schemes(target, SHAPES, ["int8-row", "fp32"], {})
    asked["unet.mid.to_k"].insert(0, parse_scheme("int8-row+a8-static"))
    seen = {name: Ranges(wide if "mid" in name else narrow, narrow, 1.0, 1.0) for name in SHAPES}
    found = resolved(target, SHAPES, asked, seen)
    assert {name: [str(each) for each in schemes] for name, schemes in found.items()} == {
        "unet.conv_in": ["int8-row+a8-static", "fp32"],
        "unet.mid.to_q": ["int8-row+a8-dynamic", "fp32"],
        "unet.mid.to_k": ["int8-row+a8-static", "int8-row+a8-dynamic", "fp32"],  # asked for, whatever it saw
    }
    assert resolved(target, SHAPES, found) == found
    shapes = {name: list(dict.fromkeys(each.weight for each in schemes)) for name, schemes in found.items()}
    choices = with_schemes(estimate_from_shapes(SHAPES, shapes), found)
    for name, schemes in found.items():
        assert [each.scheme for each in choices[name].candidates] == list(map(str, schemes))
        assert len({each.loss for each in choices[name].candidates}) == 2
    pins = {"unet.*": "int8-row", "unet.mid.to_k": "int8-row+a8-static"}
    decided = least_loss(list(choices.values()), None, 0, pins)
    scales = [scheme.is_static for scheme in decided.schemes.values()]
    assert scales == [True, False, True]


def test_layer_without_any_format_is_named_with_every_reason() -> None:
    with pytest.raises(TurbopocketError, match=r"unet.conv_in: no format left .*multiple of .*32") as refused:
        candidate_schemes(Onnx(), SHAPES, ["int8-g32"], {})
    assert refused.value.hint == "allow fp16 as well"


def test_a_layer_without_any_format_is_told_of_one_that_its_target_stores() -> None:
    with pytest.raises(TurbopocketError, match=r"unet.conv_in: no format left .*; XNNPACK would widen fp16") as refused:
        candidate_schemes(ExecuTorch(), SHAPES, ["int8-g32", "fp16"], {})
    assert refused.value.hint == "allow fp32 as well"
    assert candidate_schemes(ExecuTorch(), SHAPES, ["int8-g32", "fp32"], {})


def test_parts_of_a_plan_and_its_fixed_bytes_are_its_total() -> None:
    recipe = make_recipe({"compress": {"formats": ["int4-g32", "fp16"], "pin": {"unet.conv_in": "fp16"}}}, "test")
    planned = plan(recipe)
    assert planned.fixed_bytes + sum(planned.parts.values()) == planned.total_bytes
    weights = sum(each.weights for each in planned.components.values())
    assert sum(each.bytes for each in planned.components.values()) == sum(planned.parts.values())
    assert planned.average_bits == pytest.approx(8 * sum(planned.parts.values()) / weights)
    assert "unet.conv_in" in planned.kept


README = Path(__file__).parents[2] / "README.md"


def test_readmes_example_of_a_folder_with_nothing_but_configs(
    turbopocket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command as it stands there, in a folder that holds what its sentence promises: configs of SDXL."""
    text = README.read_text()
    command = re.search(r"give `plan` a folder with nothing but its configs:\n\n```sh\n(.*)\n```", text)
    assert command is not None
    _, verb, folder, *options = command[1].split()
    configs = {name: content for name, content in FILES.items() if name.split("/")[-1] in CONFIG_NAMES}
    write_configs(tmp_path / folder, configs)
    monkeypatch.chdir(tmp_path)
    ran = turbopocket(verb, folder, *options)
    assert ran.code == 0, ran.err
    assert "of 2.000 GB allowed" in ran.out
    assert "estimated: tokenizer_2 3.28 MB (no vocabulary here: 66.3 bytes for each of 49,408" in ran.out
    assert "estimated: scheduler 500 B (" in ran.out


@pytest.mark.parametrize(
    ("target", "megabytes"), [("onnx", 2 * 3.277), ("coreml", 2 * 1.685 + 1.591), ("executorch", 2 * 1.685)]
)
def test_tokenizers_that_are_not_there_count_as_long_as_clips_own(
    target: str, megabytes: float, tmp_path: Path
) -> None:
    configs = {name: content for name, content in FILES.items() if name.split("/")[-1] in CONFIG_NAMES}
    values = {"model": {"source": str(write_configs(tmp_path, configs))}, "target": {"name": target}}
    formats = {"compress": {"formats": ["int8-row", "fp16"]}}
    estimated = {each.what: each for each in plan(make_recipe(values | formats, "test")).estimates}
    found = estimated["tokenizer"].bytes + estimated["tokenizer_2"].bytes
    assert found / 1e6 == pytest.approx(megabytes, abs=0.01)
    assert set(estimated) == {"graphs", "manifest", "tokenizer", "tokenizer_2", "scheduler"}
    assert "49,408 ids" in estimated["tokenizer"].why


@pytest.mark.parametrize("target", ["onnx", "coreml", "executorch"])
def test_small_files_that_are_there_are_counted_to_the_byte(target: str, tiny_sdxl: Path, tmp_path: Path) -> None:
    opened = open_target(make_recipe({"target": {"name": target}}, "test").target)
    model = load_shapes(str(tiny_sdxl))
    components = opened.components(model, ())
    names = {component.name: component for component in components}
    opened.write_side_files(model, names, model.image_size, tmp_path / "out")
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    shapes = shapes_of(layers_of(components))
    found = fixed_bytes(opened, model, components, model.image_size, dict.fromkeys(shapes, ()))
    weights = sum(math.prod(shape) for shape in shapes.values())
    tensors = opened.graph_share.value * (sum(map(parameter_count, components)) - weights)
    image = image_spec(model, model.image_size)
    latents = image.latent_channels * image.latent_height * image.latent_width
    self_check = 4 * latents + 3 * image.height * image.width
    assert found.counted == tensors + written + self_check
    assert {each.what for each in found.estimates} == {"graphs", "manifest"}


def test_a_larger_tokenizer_makes_a_larger_plan(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "model"))
    before = plan(make_recipe({"model": {"source": str(folder)}}, "test")).fixed_bytes
    file = folder / "tokenizer/vocab.json"
    file.write_text(json.dumps(json.loads(file.read_text()), ensure_ascii=False, indent=100))
    after = plan(make_recipe({"model": {"source": str(folder)}}, "test")).fixed_bytes
    assert after > before + 50_000
