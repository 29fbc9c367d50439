# SPDX-License-Identifier: Apache-2.0
"""The numpy loop against diffusers' pipelines, from the same latents and the same noise."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.drawing.conditioning import PromptCut, feed, guidance_embedding
from turbopocket.runtimes.drawing.text_to_image import NotFinite, draw, draw_batch, generate, seeded_noise
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers
from turbopocket.runtimes.manifest import Manifest
from turbopocket.runtimes.onnx.runner import OnnxRunner

from ..conftest import TinyModel, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
PROMPT, NEGATIVE = "a red circle on the blue square", "green triangle"


def assert_draws_like_diffusers(model: TinyModel, negative_prompt: str | None = None) -> None:
    """Both draw PROMPT; latents and every later noise come from one torch generator each, equally seeded."""
    ours, theirs = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    expected = model.pipeline(
        PROMPT,
        negative_prompt=negative_prompt,
        num_inference_steps=model.manifest.sampler.steps,
        guidance_scale=model.manifest.sampler.guidance_scale,
        height=32,
        width=model.manifest.image.width,
        generator=theirs,
        output_type="np",
    ).images[0]
    found = draw(
        model.runner,
        model.manifest,
        model.tokenizers,
        PROMPT,
        lambda shape: torch.randn(shape, generator=ours).numpy(),
        negative_prompt=negative_prompt,
    )
    assert expected.std() > 0.01, "a flat picture would prove nothing"
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.fixture
def sdxl(tiny_sdxl: Path) -> Any:
    return diffusers.StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)


@pytest.fixture
def sd(tiny_sd: Path) -> Any:
    return diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd)


def test_sdxl_turbo_draws_what_diffusers_draws(sdxl: Any, tmp_path: Path) -> None:
    scheduler = diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing", **BETAS)
    assert_draws_like_diffusers(tiny_model(sdxl, "sdxl", tmp_path, scheduler, guidance=0.0, steps=3))


def test_sdxl_is_told_height_before_width(sdxl: Any, tmp_path: Path) -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=False, **BETAS)
    assert_draws_like_diffusers(tiny_model(sdxl, "sdxl", tmp_path, scheduler, 1.0, steps=2, width_px=16))


def test_guided_sdxl_without_a_negative_prompt_steers_away_from_zeros(sdxl: Any, tmp_path: Path) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **BETAS)
    model = tiny_model(sdxl, "sdxl", tmp_path, scheduler, guidance=5.0, steps=3)
    assert model.manifest.pipeline.without_prompt == "zeros"
    assert_draws_like_diffusers(model)


def test_guided_sdxl_steers_away_from_the_negative_prompt(sdxl: Any, tmp_path: Path) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **BETAS)
    assert_draws_like_diffusers(tiny_model(sdxl, "sdxl", tmp_path, scheduler, guidance=5.0, steps=3), NEGATIVE)


def test_guided_sdxl_without_zeros_steers_away_from_the_empty_prompt(sdxl: Any, tmp_path: Path) -> None:
    sdxl.register_to_config(force_zeros_for_empty_prompt=False)
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **BETAS)
    assert_draws_like_diffusers(tiny_model(sdxl, "sdxl", tmp_path, scheduler, guidance=5.0, steps=2))


@pytest.mark.parametrize("negative_prompt", [None, NEGATIVE])
def test_guided_stable_diffusion_draws_what_diffusers_draws(
    sd: Any, tmp_path: Path, negative_prompt: str | None
) -> None:
    model = tiny_model(sd, "sd", tmp_path, sd.scheduler, guidance=7.5, steps=4)
    assert_draws_like_diffusers(model, negative_prompt)


def test_stable_diffusion_with_lcm_draws_what_diffusers_draws(sd: Any, tmp_path: Path) -> None:
    assert_draws_like_diffusers(tiny_model(sd, "sd", tmp_path, diffusers.LCMScheduler(**BETAS), 1.0, steps=4))


def test_guided_stable_diffusion_with_pndm_draws_what_diffusers_draws(sd: Any, tmp_path: Path) -> None:
    """The scheduler of most Stable Diffusion folders: one call more than steps."""
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, **BETAS)
    assert_draws_like_diffusers(tiny_model(sd, "sd", tmp_path, scheduler, guidance=7.5, steps=6))


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_sdxl_with_dpm_solver_and_karras_sigmas_draws_what_diffusers_draws(
    sdxl: Any, tmp_path: Path, algorithm: str
) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True, algorithm_type=algorithm, **BETAS)
    assert_draws_like_diffusers(tiny_model(sdxl, "sdxl", tmp_path, scheduler, guidance=5.0, steps=5))


def test_pytorch_draws_several_pictures_at_once_as_one_by_one(sdxl: Any, tmp_path: Path) -> None:
    """But for the order of sums, which a batch changes."""
    scheduler = diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing", **BETAS)
    model = tiny_model(sdxl, "sdxl", tmp_path, scheduler, guidance=5.0, steps=3)
    drawing, prompts = (model.runner, model.manifest, model.tokenizers), [PROMPT, NEGATIVE, "red"]
    found = draw_batch(*drawing, prompts, [seeded_noise(seed) for seed in range(3)])
    for seed, prompt in enumerate(prompts):
        np.testing.assert_allclose(found[seed], draw(*drawing, prompt, seeded_noise(seed)), atol=1e-4)


def draw_toy(folder: Path, manifest: Manifest, prompt: str = "a red circle", **options: Any) -> np.ndarray:
    tokenizers = open_tokenizers(folder, manifest)
    return generate(OnnxRunner(folder, manifest), manifest, tokenizers, prompt, **{"seed": 0} | options)


def test_same_seed_draws_the_same_bytes_and_another_seed_does_not(toy_artifact: Path, toy_manifest: Manifest) -> None:
    first = draw_toy(toy_artifact, toy_manifest)
    assert first.dtype == np.uint8
    assert first.shape == (12, 12, 3)
    assert (draw_toy(toy_artifact, toy_manifest) == first).all()
    assert (draw_toy(toy_artifact, toy_manifest, seed=1) != first).any()


def test_steps_and_guidance_of_the_call_win_over_the_manifest(toy_artifact: Path, toy_manifest: Manifest) -> None:
    shipped = draw_toy(toy_artifact, toy_manifest)
    assert (draw_toy(toy_artifact, toy_manifest, steps=1) != shipped).any()
    assert (draw_toy(toy_artifact, toy_manifest, guidance=7.0) != shipped).any()


def test_empty_prompt_is_refused(toy_artifact: Path, toy_manifest: Manifest) -> None:
    with pytest.raises(TurbopocketError, match="the prompt is empty"):
        draw_toy(toy_artifact, toy_manifest, prompt="  ")


def test_negative_prompt_without_guidance_is_refused(toy_artifact: Path, toy_manifest: Manifest) -> None:
    with pytest.raises(TurbopocketError, match="no effect at guidance 1: it needs more than 1"):
        draw_toy(toy_artifact, toy_manifest, negative_prompt="blue")


def test_too_many_steps_are_refused_with_the_allowed_number(toy_artifact: Path, toy_manifest: Manifest) -> None:
    with pytest.raises(TurbopocketError, match="1001 steps were asked, 1 to 1000 are possible"):
        draw_toy(toy_artifact, toy_manifest, steps=1001)


def test_over_long_prompt_warns_with_the_words_that_were_cut(toy_artifact: Path, toy_manifest: Manifest) -> None:
    with pytest.warns(PromptCut, match="text_encoder reads 8 tokens, left out: 'on blue'"):
        draw_toy(toy_artifact, toy_manifest, prompt="a red circle a red circle on blue")


def test_picture_of_a_runtime_that_overflows_is_refused(toy_artifact: Path, toy_manifest: Manifest) -> None:
    with (
        np.errstate(all="ignore"),
        pytest.raises(NotFinite, match=r"toy: \d+ of 432 values of the picture are not finite"),
    ):
        draw_toy(toy_artifact, toy_manifest, guidance=1e38)


def test_fractional_timestep_for_a_whole_number_input_is_refused(toy_manifest: Manifest) -> None:
    with pytest.raises(TurbopocketError, match=r"text_encoder: input input_ids is int64, \[499.5\] is no whole"):
        feed(toy_manifest, "text_encoder", {"input_ids": np.array([499.5], dtype=np.float32)})


@pytest.mark.parametrize(("scale", "width"), [(8.5, 256), (1.0, 256), (0.0, 33), (12.25, 512)])
def test_a_guidance_is_embedded_as_diffusers_embeds_it(sd: Any, scale: float, width: int) -> None:
    """Two right roundings of a frequency are 6e-8 apart, times the 11,250 of the largest angle."""
    expected = sd.get_guidance_scale_embedding(torch.tensor([scale - 1]), embedding_dim=width)
    np.testing.assert_allclose(guidance_embedding(scale, width), expected.numpy(), atol=1e-3)
