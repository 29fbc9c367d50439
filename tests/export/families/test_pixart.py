# SPDX-License-Identifier: Apache-2.0
"""PixArt, which shares no graph but the VAE with Stable Diffusion: from folder to picture, held to diffusers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from turbopocket.export.build.build import build
from turbopocket.export.build.outcome import Built
from turbopocket.export.checkpoint.load import load
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import make_recipe
from turbopocket.export.verify.diffusers_reference import diffusers_picture
from turbopocket.runtimes.drawing.text_to_image import draw, seeded_noise
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers
from turbopocket.runtimes.manifest import load_manifest
from turbopocket.runtimes.open import open_runner

from ...pixart_checkpoints import write_alpha, write_sigma
from ..drawer import PROMPT, drawer

WRITERS = {"sigma": write_sigma, "alpha": write_alpha}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny checkpoints, PixArt-Sigma with DPM-Solver++, PixArt-Alpha with Euler and sizes that it is told."""
    base = tmp_path_factory.mktemp("pixart")
    for name, write in WRITERS.items():
        write(base / name)
    return {name: base / name for name in WRITERS}


@pytest.fixture(scope="module")
def built(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Built:
    """PixArt-Sigma in fp32, so that its picture has to be that of diffusers."""
    values = {
        "model": {"source": str(folders["sigma"])},
        "sampler": {"steps": 3, "guidance": 4.5},
        "calibrate": {"pictures": 1},
        "parity": {"pictures": 1},
        "compress": {"formats": ["fp32"]},
    }
    out = tmp_path_factory.mktemp("built") / "art"
    return build(make_recipe(values, "test"), out, overwrite=False, progress=StageProgress(quiet=True))


@pytest.mark.parametrize("negative_prompt", [None, "green triangle"])
@pytest.mark.parametrize("name", WRITERS)
def test_the_loop_draws_what_diffusers_own_pipeline_draws(
    name: str, negative_prompt: str | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = drawer(folders[name], tmp_path / "art", steps=3, guidance=4.5)
    model.assert_draws_like_diffusers(negative_prompt=negative_prompt)


def test_a_manifest_says_all_that_is_special_about_it(built: Built) -> None:
    pipeline = json.loads((built.folder / "manifest.json").read_text())["pipeline"]
    assert pipeline["denoiser"]["component"] == "transformer"
    assert pipeline["denoiser"]["channels"] == "first half"
    assert pipeline["denoiser"]["inputs"] == {
        "encoder_hidden_states": {
            "kind": "text",
            "join": [{"component": "text_encoder", "output": "last_hidden_state"}],
        },
        "encoder_attention_mask": {"kind": "attention_mask", "component": "text_encoder"},
    }
    assert pipeline["text_encoders"] == {"text_encoder": {"ids": "input_ids", "attention_mask": "attention_mask"}}


def test_the_artifact_alone_draws_what_diffusers_draws(built: Built, folders: dict[str, Path]) -> None:
    manifest = load_manifest(built.folder)
    tokenizers = open_tokenizers(built.folder, manifest)
    found = draw(open_runner(built.folder, manifest), manifest, tokenizers, PROMPT, seeded_noise(7))
    expected = diffusers_picture(load(str(folders["sigma"])), manifest, PROMPT, 7)
    assert expected.std() > 0.01, "a flat picture would prove nothing"
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_it_is_checked_and_drawn_by_the_commands(built: Built, tmp_path: Path, turbopocket: Callable[..., Any]) -> None:
    checked = turbopocket("check", built.folder, "--json")
    assert checked.code == 0, checked.err
    assert json.loads(checked.out)["parity"]["to_diffusers"] < 1e-4
    ran = turbopocket("generate", built.folder, PROMPT, "-o", tmp_path / "a.png")
    assert ran.code == 0, ran.err
    assert np.asarray(Image.open(tmp_path / "a.png")).std() > 1


def test_it_is_compressed_to_a_budget_by_blocks(
    folders: dict[str, Path], tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    planned = turbopocket("plan", folders["sigma"], "--formats", "int4-g32,int8-g32,fp16", "--json")
    assert planned.code == 0, planned.err
    assert {"transformer.transformer_blocks.1", "text_encoder.encoder.block.0"} <= set(
        json.loads(planned.out)["blocks"]
    )
    asked = ("--steps", 2, "--guidance", 3, "--formats", "int4-g32,int8-g32,fp16", "--budget", "800kB")
    ran = turbopocket("build", folders["sigma"], "--target", "onnx", *asked, "--out", tmp_path / "art")
    assert ran.code == 0, ran.err
    assert sum(path.stat().st_size for path in (tmp_path / "art").rglob("*") if path.is_file()) <= 800_000
