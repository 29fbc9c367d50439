# SPDX-License-Identifier: Apache-2.0
"""Kinds of model beside the plain ones: from folder through ONNX files to diffusers' own picture."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turbopocket.export.checkpoint.load import load_shapes
from turbopocket.export.verify.diffusers_reference import compare_with_diffusers
from turbopocket.export.verify.gaps import Session
from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.drawing import conditioning
from turbopocket.runtimes.drawing.conditioning import guidance_embedding
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers

from .drawer import LCM, PROMPT, SDXL, checkpoint, drawer, tiny_vae, unet

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own


def test_an_lcm_that_is_told_its_guidance(tiny_sd: Path, tmp_path: Path) -> None:
    """LCM_Dreamshaper_v7: told the guidance, and asked once a step whatever it is."""
    own_class = {"_class_name": "LatentConsistencyModelPipeline"}
    folder = checkpoint(tiny_sd, tmp_path / "model", own_class, unet=unet(time_cond_proj_dim=256), scheduler=LCM)
    told = drawer(folder, tmp_path / "art", "unet", guidance=8.5)
    told.assert_draws_like_diffusers()
    assert list(told.inputs("unet")) == ["sample", "timestep", "encoder_hidden_states", "timestep_cond"]
    assert told.inputs("unet")["timestep_cond"] == [256]


def test_another_guidance_is_another_picture_of_an_lcm_and_a_negative_prompt_is_refused(
    tiny_sd: Path, tmp_path: Path
) -> None:
    folder = checkpoint(tiny_sd, tmp_path / "model", unet=unet(time_cond_proj_dim=33), scheduler=LCM)
    told = drawer(folder, tmp_path / "art")
    assert np.abs(told.draw(guidance=2.0) - told.draw(guidance=9.0)).max() > 1e-3
    with pytest.raises(TurbopocketError, match="no effect on model: its denoiser is told the guidance, and asked once"):
        told.draw(negative_prompt="green")


@pytest.mark.parametrize(("guidance", "off", "passes"), [(8.5, 0.0, True), (50.0, 0.0, True), (8.5, 0.01, False)])
def test_a_build_compares_what_an_lcm_is_told(
    guidance: float, off: float, passes: bool, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sines of large numbers, which two right programs round apart: 3.5e-4 at a guidance of 50."""
    folder = checkpoint(tiny_sd, tmp_path / "model", unet=unet(time_cond_proj_dim=256), scheduler=LCM)
    told = drawer(folder, tmp_path / "art", guidance=guidance, steps=1)
    monkeypatch.setattr(conditioning, "guidance_embedding", lambda scale, width: guidance_embedding(scale + off, width))
    tokenizers = open_tokenizers(told.artifact, told.manifest)
    found = compare_with_diffusers(told.model, told.runner, Session(told.manifest, tokenizers, [PROMPT], 7))
    assert (found.failure is None) == passes
    if not passes:
        assert "input timestep_cond of call 1 of unet" in str(found.failure)


def test_an_sdxl_lcm_that_is_told_its_guidance(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = checkpoint(tiny_sdxl, tmp_path / "model", unet=unet(**SDXL, time_cond_proj_dim=64), scheduler=LCM)
    told = drawer(folder, tmp_path / "art", "unet", guidance=7.5)
    told.assert_draws_like_diffusers()
    assert list(told.inputs("unet"))[3:] == ["timestep_cond", "text_embeds", "time_ids"]  # optimum's order


@pytest.mark.parametrize("base", ["tiny_sd", "tiny_sdxl"])
def test_a_tiny_autoencoder_decodes(base: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """TAESD and TAESDXL: latents squashed by a tanh, no scaling, pictures in -1..1."""
    folder = checkpoint(request.getfixturevalue(base), tmp_path / "model", vae=tiny_vae(scaling_factor=0.9))
    drawn = drawer(folder, tmp_path / "art", "vae_decoder", guidance=1.0)
    drawn.assert_draws_like_diffusers()
    assert drawn.manifest.image.vae_scaling_factor == 0.9
    config = json.loads((tmp_path / "art" / "vae_decoder" / "config.json").read_text())
    assert (config["_class_name"], config["block_out_channels"]) == ("AutoencoderTiny", [16, 16])


def test_a_tiny_autoencoder_that_does_not_double_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    folder = checkpoint(tiny_sd, tmp_path / "model", vae=tiny_vae(upsampling_scaling_factor=3))
    with pytest.raises(TurbopocketError, match="upsampling_scaling_factor is 3; supported: 2"):
        load_shapes(str(folder))


def test_a_unet_without_a_middle(tiny_sd: Path, tmp_path: Path) -> None:
    """BK-SDM-Small and -Tiny."""
    folder = checkpoint(tiny_sd, tmp_path / "model", unet=unet(mid_block_type=None))
    drawer(folder, tmp_path / "art", "unet", guidance=3.0).assert_draws_like_diffusers()


def test_transformers_of_different_depths_and_a_middle_without_attention(tiny_sdxl: Path, tmp_path: Path) -> None:
    """SSD-1B."""
    own = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": [2, 4],
        "transformer_layers_per_block": [1, [2]],
        "reverse_transformer_layers_per_block": [[2, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    }
    folder = checkpoint(tiny_sdxl, tmp_path / "model", unet=unet(**SDXL | own))
    drawer(folder, tmp_path / "art", "unet", guidance=1.0).assert_draws_like_diffusers()


def test_a_teacher_that_is_told_its_guidance_is_refused(
    tiny_sd: Path, tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    folder = checkpoint(tiny_sd, tmp_path / "model", unet=unet(time_cond_proj_dim=32))
    ran = turbopocket("distill", folder, "--out", tmp_path / "student", "--iterations", 1)
    assert ran.code == 1
    assert "model can not be distilled: its UNet is told the guidance (time_cond_proj_dim is 32)" in ran.err
    assert not (tmp_path / "student").exists()
