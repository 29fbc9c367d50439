# SPDX-License-Identifier: Apache-2.0
"""A build for Core ML, end to end: packages, parity in three arithmetics, drawing from the packages alone."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turbopocket.export.build.build import build
from turbopocket.export.build.outcome import Built
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import make_recipe
from turbopocket.export.targets.coreml.target import CoreML
from turbopocket.ground.errors import ParityFailed
from turbopocket.runtimes.coreml.file.package import load_model, open_package
from turbopocket.runtimes.coreml.file.program import Program
from turbopocket.runtimes.manifest import file_entries, load_manifest, write_manifest

pytest.importorskip("coremltools")

FORMATS = ["fp16", "int8-row", "int4-g8", "lut4", "lut2", "vq6-d4"]


def recipe_of(values: dict[str, Any], model: Path, **compress: Any) -> Any:
    wanted = {"target": {"name": "coreml"}, "compress": {"formats": FORMATS} | compress}
    return make_recipe({**values, **wanted, "model": {"source": str(model)}}, "test")


@pytest.fixture(scope="module")
def built(tiny_sdxl: Path, recipe_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Built:
    out, model = tmp_path_factory.mktemp("coreml") / "art", tmp_path_factory.mktemp("carded") / "model"
    shutil.copytree(tiny_sdxl, model)
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: sai-nc\nauthor: Jürgen Vogt\n---\n", "utf-8")
    recipe = recipe_of(recipe_values, model, budget="1700kB")
    return build(recipe, out, overwrite=False, progress=StageProgress(quiet=True))


@pytest.fixture(scope="module")
def guided(tiny_sdxl: Path, recipe_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Built:
    out = tmp_path_factory.mktemp("coreml") / "guided"
    recipe = recipe_of({**recipe_values, "sampler": {"steps": 1, "guidance": 3.0}}, tiny_sdxl, formats=["fp16"])
    return build(recipe, out, overwrite=False, progress=StageProgress(quiet=True))


def test_the_folder_is_the_one_that_the_swift_package_reads(built: Built) -> None:
    names = {path.name for path in built.folder.iterdir()}
    packages = {f"{name}.mlpackage" for name in ("TextEncoder", "TextEncoder2", "Unet", "VAEDecoder")}
    assert names == packages | {"vocab.json", "merges.txt", "tokenizer", "tokenizer_2", "manifest.json", "self_check"}


def test_packages_say_who_made_the_model_and_under_which_licence(built: Built, guided: Built) -> None:
    for folder, told in ((built.folder, ("Jürgen Vogt", "sai-nc")), (guided.folder, ("", ""))):
        packages = list(folder.glob("*.mlpackage"))
        assert len(packages) == 4
        for package in packages:
            metadata = load_model(open_package(package)).description.metadata
            assert (metadata.author, metadata.license) == told
            assert package.stem in metadata.shortDescription
    origin = load_manifest(built.folder).model
    assert origin is not None
    assert (origin.author, origin.license) == ("Jürgen Vogt", "sai-nc")


def test_all_three_arithmetics_are_in_the_parity_table(built: Built) -> None:
    assert list(built.gaps.lowering) == ["evaluator fp32", "evaluator fp16", "evaluator acc16"]
    exact, halves, pessimistic = built.gaps.lowering.values()
    assert exact.passed
    assert exact.worst is not None
    assert exact.worst.relative_error < 1e-3  # 60 dB
    assert {row.component for row in exact.rows} == {"text_encoder", "text_encoder_2", "unet", "vae_decoder"}
    worst = [max(row.relative_error for row in report.rows) for report in (exact, halves, pessimistic)]
    assert worst == sorted(worst)


def test_the_plan_says_the_bytes(built: Built) -> None:
    assert built.total_bytes <= built.plan.total_bytes <= 1_700_000
    assert built.total_bytes == pytest.approx(built.plan.total_bytes, rel=0.01)
    used = {choice.scheme for choice in built.plan.choices}
    assert len(used) >= 3


def test_a_picture_is_drawn_from_the_packages_alone(
    built: Built, tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    from PIL import Image

    ran = turbopocket("generate", built.folder, built.gaps.total.pictures[0].prompt, "-o", tmp_path / "a.png")
    assert ran.code == 0, ran.err
    drawn = np.asarray(Image.open(tmp_path / "a.png"))
    assert np.array_equal(drawn, built.gaps.pictures.artifact[0])


def test_on_a_mac_core_ml_is_one_more_runtime_and_draws_the_picture(
    built: Built, tmp_path: Path, turbopocket: Callable[..., Any], mac: Any
) -> None:
    from PIL import Image

    target = CoreML()
    runtimes = target.runtimes(built.folder, load_manifest(built.folder), {}, target.max_lowering_error)
    assert tuple(runtimes) == target.runtime_names  # by which the manifest's bytes are planned
    assert target.runtime_names[-1] == "Core ML on this Mac"
    ran = turbopocket("generate", built.folder, built.gaps.total.pictures[0].prompt, "-o", tmp_path / "a.png")
    assert ran.code == 0, ran.err
    apart = np.asarray(Image.open(tmp_path / "a.png")).astype(int) - built.gaps.pictures.artifact[0]
    assert 0 < np.abs(apart).max() <= 16  # fp16 rounds


def test_check_passes_and_finds_a_changed_weight_and_names_its_layer(
    built: Built, tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    whole = turbopocket("check", built.folder)
    assert whole.code == 0
    assert "not verified on device: that Apple's compiler accepts it" in whole.out
    art = tmp_path / "art"
    shutil.copytree(built.folder, art)
    shutil.copytree(built.report.parent, tmp_path / "art.report")
    weights = art / "VAEDecoder.mlpackage" / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    content = bytearray(weights.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(byte ^ 0x55 for byte in content[middle : middle + 64])
    weights.write_bytes(content)
    changed = turbopocket("check", art)
    assert changed.code == 1
    assert "weight.bin was changed" in changed.err
    manifest = load_manifest(art)
    write_manifest(art, manifest.model_copy(update={"files": file_entries(art)}))
    ran = turbopocket("check", art)
    assert ran.code == 3
    assert "evaluator fp32: vae_decoder: relative error" in ran.err
    assert "the first layer to diverge is vae_decoder." in ran.err


@pytest.mark.parametrize("folder", ["built", "guided"])
def test_an_app_can_open_the_packages_by_the_manifest_alone(folder: str, request: pytest.FixtureRequest) -> None:
    """Names, shapes and types are those that the packages' own descriptions give, in their order."""
    artifact: Path = request.getfixturevalue(folder).folder
    components = json.loads((artifact / "manifest.json").read_text())["components"]
    for component in components.values():
        programs = [Program.open(artifact / package) for package in component["packages"]]
        assert component["inputs"] == [each.model_dump() for each in programs[0].inputs]
        assert component["outputs"] == [each.model_dump() for each in programs[-1].outputs]
        for side in ("inputs", "outputs"):
            own = {each["name"]: each for each in component[side]}
            assert [each["tensor"] for each in component["loop"][side]] == list(own)
    states = components["unet"]["loop"]["inputs"][2]
    assert (states["name"], states["layout"], states["shape"]) == (
        "encoder_hidden_states",
        "B D 1 T",
        ["batch", 77, 96],
    )


@pytest.mark.parametrize("name", ["built", "guided"])
def test_the_unet_takes_two_items_as_apples_pipelines_give(name: str, request: pytest.FixtureRequest) -> None:
    made: Built = request.getfixturevalue(name)
    for spec in Program.open(made.folder / "Unet.mlpackage").inputs:
        assert spec.shape[0] == 2, spec.name
    assert made.gaps.failure is None


@pytest.fixture
def loud(tiny_sd: Path, tmp_path: Path) -> Path:
    """A checkpoint whose decoder carries numbers beyond fp16 from its first convolution to its last norm."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_sd, tmp_path / "loud"))
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name in ("decoder.conv_in.weight", "decoder.conv_in.bias"):
        tensors[name] = tensors[name] * 3e4
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def build_loud(loud: Path, values: dict[str, Any], out: Path) -> Built:
    recipe = recipe_of(
        {**values, "sampler": {"steps": 1, "guidance": 1.0}},
        loud,
        formats=["fp16"],
        pin={"vae_decoder.decoder.conv_in": "int8-row"},
    )
    return build(recipe, out, overwrite=False, progress=StageProgress(quiet=True))


def test_what_calibration_saw_beyond_fp16_is_computed_in_fp32(
    loud: Path, recipe_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = build_loud(loud, recipe_values, tmp_path / "art")
    errors = {name: max(row.relative_error for row in report.rows) for name, report in out.gaps.lowering.items()}
    assert errors["evaluator fp32"] < 1e-3
    assert errors["evaluator fp16"] < 0.01
    assert all(math.isfinite(error) for error in errors.values())
    program = Program.open(out.folder / "VAEDecoder.mlpackage")
    widths = {name: program.function.types[name].dtype.name for name in ("decoder_conv_in", "decoder_conv_out")}
    assert widths == {"decoder_conv_in": "FLOAT32", "decoder_conv_out": "FLOAT16"}
    monkeypatch.setattr(CoreML, "fitted", lambda target, traced, component, largest: traced)
    damage = r"evaluator fp16: vae_decoder: .* the first layer to diverge is vae_decoder\.decoder\.conv_in \(inf\)"
    with pytest.raises(ParityFailed, match=damage):
        build_loud(loud, recipe_values, tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


def test_formats_that_the_system_can_not_read_are_refused(
    tiny_sdxl: Path, tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    ran = turbopocket(
        *("build", tiny_sdxl, "--target", "coreml", "--set", "target.coreml.deployment=iOS17"),
        *("--formats", "int4-g8", "--out", tmp_path / "art"),
    )
    assert ran.code == 1
    assert "iOS17" in ran.err
    assert not (tmp_path / "art").exists()


def test_without_coremltools_the_message_says_what_to_install(
    tiny_sdxl: Path, tmp_path: Path, turbopocket: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ["coremltools", *(name for name in sys.modules if name.startswith("coremltools."))]:
        monkeypatch.setitem(sys.modules, name, None)  # what Python's import then finds absent
    ran = turbopocket("build", tiny_sdxl, "--target", "coreml", "--out", tmp_path / "art")
    assert ran.code == 1
    assert "hint: pip install coremltools==" in ran.err
    assert not (tmp_path / "art").exists()


def test_a_component_that_gives_zeros_passes_in_no_arithmetic(built: Built) -> None:
    """Zeros have a relative error of exactly 1."""
    manifest = load_manifest(built.folder)
    for runtime in CoreML().runtimes(built.folder, manifest, {}, CoreML.max_lowering_error).values():
        assert runtime.limits.max_relative_error < 1
