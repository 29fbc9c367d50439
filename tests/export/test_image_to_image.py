# SPDX-License-Identifier: Apache-2.0
"""Drawing that begins with a picture: diffusers' own result, the encoder in artifacts, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from turbopocket.export.build.build import build
from turbopocket.export.build.outcome import Built
from turbopocket.export.checkpoint.load import load, load_shapes
from turbopocket.export.families.components import layers_of
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import make_recipe
from turbopocket.export.targets.registry import default_targets
from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.drawing.text_to_image import FirstPicture

from .drawer import LCM, PROMPT, checkpoint, drawer, tiny_vae, unet

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULERS = {
    "euler": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
    "euler_ancestral": {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    "ddim": {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False},
    "lcm": LCM,
    "dpm": {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "linspace"},
    "pndm": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False},
}


def first_picture(strength: float, height: int = 32, width: int = 32) -> FirstPicture:
    """Colours that run over the picture, and a square."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([255 * rows / height, 255 * columns / width, 127 + 0 * rows], -1).astype(np.uint8)
    pixels[8:20, 8:20] = (255, 0, 0)
    return FirstPicture(pixels, strength)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_sampler_goes_on_from_a_picture_as_diffusers_does(
    kind: str, guidance: float, tiny_sd: Path, tmp_path: Path
) -> None:
    folder = checkpoint(tiny_sd, tmp_path / "model", scheduler=SCHEDULE | SCHEDULERS[kind])
    model = drawer(folder, tmp_path / "art", steps=5, guidance=guidance, image_to_image=True)
    for strength in (1.0, 0.7, 0.2):
        model.assert_draws_like_diffusers(first=first_picture(strength))


def test_sdxl_goes_on_from_a_picture_as_diffusers_does(tiny_sdxl: Path, tmp_path: Path) -> None:
    model = drawer(tiny_sdxl, tmp_path / "art", steps=4, guidance=3.0, image_to_image=True)
    model.assert_draws_like_diffusers(first=first_picture(0.5))
    model.assert_draws_like_diffusers(first=first_picture(0.5), negative_prompt="green")


def test_latents_of_a_vae_with_a_mean_of_its_own_are_moved_back(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = checkpoint(tiny_sdxl, tmp_path / "model")
    file = folder / "vae" / "config.json"
    moved = {"latents_mean": [0.3, -0.2, 0.1, 0.4], "latents_std": [0.7, 1.2, 0.9, 1.1]}
    file.write_text(json.dumps(json.loads(file.read_text()) | moved))
    model = drawer(folder, tmp_path / "art", guidance=1.0, image_to_image=True)
    model.assert_draws_like_diffusers(first=first_picture(0.7))


def test_an_lcm_that_is_told_its_guidance_goes_on_from_a_picture(tiny_sd: Path, tmp_path: Path) -> None:
    folder = checkpoint(tiny_sd, tmp_path / "model", unet=unet(time_cond_proj_dim=32), scheduler=LCM)
    drawer(folder, tmp_path / "art", guidance=8.0, image_to_image=True).assert_draws_like_diffusers(
        first=first_picture(0.7)
    )


def test_an_encoder_from_onnx_reads_what_pytorch_reads(tiny_sd: Path, tmp_path: Path) -> None:
    model = drawer(tiny_sd, tmp_path / "art", "vae_encoder", guidance=1.0, image_to_image=True)
    model.assert_draws_like_diffusers(first=first_picture(0.7))
    assert list(model.manifest.components) == ["text_encoder", "vae_encoder", "unet", "vae_decoder"]
    spec = model.manifest.components["vae_encoder"]
    assert [(each.name, each.shape[1:]) for each in (*spec.inputs, *spec.outputs)] == [
        ("sample", [3, 32, 32]),
        ("latent_parameters", [8, 16, 16]),
    ]
    index = json.loads((tmp_path / "art" / "model_index.json").read_text())
    assert index["vae_encoder"] == ["diffusers", "OnnxRuntimeModel"]
    assert json.loads((tmp_path / "art" / "vae_encoder" / "config.json").read_text())["scaling_factor"] == 0.13025


def test_a_tiny_autoencoder_reads_pictures_without_a_variance(tiny_sd: Path, tmp_path: Path) -> None:
    folder = checkpoint(tiny_sd, tmp_path / "model", vae=tiny_vae(scaling_factor=0.9))
    model = drawer(folder, tmp_path / "art", "vae_encoder", guidance=1.0, image_to_image=True)
    model.assert_draws_like_diffusers(first=first_picture(0.7))
    assert [each.name for each in model.manifest.components["vae_encoder"].outputs] == ["latent_sample"]


def test_a_picture_of_another_size_or_kind_is_refused_by_the_loop(tiny_sd: Path, tmp_path: Path) -> None:
    model = drawer(tiny_sd, tmp_path / "art", image_to_image=True)
    with pytest.raises(TurbopocketError, match=r"first picture is uint8 \[16, 32, 3\], uint8 \[32, 32, 3\] is needed"):
        model.draw(first=first_picture(0.5, height=16))
    with pytest.raises(TurbopocketError, match=r"first picture is float32 \[32, 32, 3\]"):
        model.draw(first=FirstPicture(first_picture(0.5).pixels.astype(np.float32), 0.5))


@pytest.fixture(scope="module")
def reading(tiny_sd: Path, recipe_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Built:
    values = {"sampler": {"steps": 3, "guidance": 1.0, "image_to_image": True}, "model": {"source": str(tiny_sd)}}
    recipe = make_recipe({**recipe_values, "compress": {"formats": ["int8-row"]}, **values}, "test")
    return build(recipe, tmp_path_factory.mktemp("reading") / "art", False, StageProgress(quiet=True))


def test_the_encoder_is_planned_compressed_and_compared(reading: Built) -> None:
    layers = {choice.layer: choice.scheme for choice in reading.plan.choices}
    assert {"vae_encoder.encoder.conv_in", "vae_encoder.quant_conv"} <= layers.keys()
    assert set(layers.values()) == {"int8-row"}
    for report in (reading.gaps.compression, *reading.gaps.lowering.values()):
        assert "vae_encoder" in {row.component for row in report.rows}
    compared = [each.array for each in reading.gaps.to_diffusers.differences]
    assert "input sample of call 1 of vae_encoder from a first picture" in compared
    assert reading.total_bytes <= reading.plan.total_bytes


def test_the_command_begins_with_a_picture(reading: Built, tmp_path: Path, turbopocket: Callable[..., Any]) -> None:
    Image.fromarray(first_picture(0.5, 40, 64).pixels).save(tmp_path / "in.png")
    begin = "generate", reading.folder, PROMPT, "--image", tmp_path / "in.png"
    drawn = {}
    for name, options in {"default": (), "weak": ("--strength", "0.34"), "strong": ("--strength", "1")}.items():
        ran = turbopocket(*begin, "-o", tmp_path / f"{name}.png", *options, "--json")
        assert ran.code == 0, ran.err
        assert json.loads(ran.out)["strength"] == {"default": 0.6, "weak": 0.34, "strong": 1.0}[name]
        drawn[name] = np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)
    assert drawn["default"].shape == (32, 32, 3)
    assert np.abs(drawn["weak"] - drawn["strong"]).mean() > 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--strength", "0.3"), "strength 0.3 leaves none of 3 steps: it must be 0.334 at least"),
        (("--strength", "0"), "strength 0 was asked: it must be above 0, and 1 at most"),
        (("--strength", "1.01"), "strength 1.01 was asked: it must be above 0, and 1 at most"),
        (("--strength", "nan"), "strength nan was asked: it must be above 0, and 1 at most"),
        (("--image", "none.png"), "image none.png does not exist"),
    ],
)
def test_what_leaves_nothing_to_draw_is_refused(
    options: tuple[str, ...], says: str, reading: Built, tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    Image.fromarray(first_picture(0.5).pixels).save(tmp_path / "in.png")
    ran = turbopocket(
        "generate", reading.folder, PROMPT, "--image", tmp_path / "in.png", "-o", tmp_path / "a.png", *options
    )
    assert (ran.code, ran.err.splitlines()[0]) == (1, f"error: {says}")
    assert not (tmp_path / "a.png").exists()


def test_strength_without_a_picture_is_refused(reading: Built, tmp_path: Path, turbopocket: Callable[..., Any]) -> None:
    ran = turbopocket("generate", reading.folder, PROMPT, "--strength", 0.5, "-o", tmp_path / "a.png")
    assert (ran.code, ran.err) == (1, "error: strength 0.5 was given, and no image that it could change\n")


def test_an_artifact_without_the_encoder_says_how_to_build_one(
    artifact: Path, tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    ran = turbopocket("generate", artifact, PROMPT, "--image", tmp_path / "in.png", "-o", tmp_path / "a.png")
    assert ran.code == 1
    assert "can not begin with a picture: this artifact was built without the VAE's encoder" in ran.err
    assert "image_to_image = true under [sampler]" in ran.err


def test_an_artifact_of_several_sizes_reads_pictures_of_each(tiny_sd: Path, tmp_path: Path) -> None:
    from turbopocket.export.families.graphs import vae_encoder_component
    from turbopocket.export.targets.onnx import program as target
    from turbopocket.export.verify.gaps import torch_runner
    from turbopocket.quant.fit import ABSMAX
    from turbopocket.quant.formats import parse_format
    from turbopocket.runtimes.onnx.runner import OnnxRunner

    component = vae_encoder_component(load(str(tiny_sd)).modules["vae"], (8, 12), free_size=True)
    graph = target.trace(component)
    weights = {
        name: parse_format("fp32").compress(component.module.get_parameter(f"{name}.weight"), ABSMAX)
        for name in graph.layers
    }
    spec = target.lower(graph, weights, tmp_path)
    assert [each.shape for each in (*spec.inputs, *spec.outputs)] == [
        ["batch", 3, "height", "width"],
        ["batch", 8, "latent_height", "latent_width"],
    ]
    manifest: Any = type("M", (), {"components": {"vae_encoder": spec}, "name": "test", "plan": None})
    for height, width in ((32, 32), (16, 40)):
        sample = {"sample": np.random.default_rng(1).uniform(-1, 1, (1, 3, height, width)).astype(np.float32)}
        found = OnnxRunner(tmp_path, manifest).run("vae_encoder", sample)["latent_parameters"]
        expected = torch_runner([component]).run("vae_encoder", sample)["latent_parameters"]
        assert found.shape == (1, 8, height // 2, width // 2)
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("target", default_targets(), ids=lambda target: target.name)
def test_every_target_has_the_encoder_when_it_is_asked_for(target: Any, tiny_sd: Path) -> None:
    model = load_shapes(str(tiny_sd))
    without, having = (target.components(model, [model.image_size], asked) for asked in (False, True))
    assert {each.name for each in having} - {each.name for each in without} == {"vae_encoder"}
    assert any(name.startswith("vae_encoder.encoder.down_blocks.0.") for name in layers_of(having))
