# SPDX-License-Identifier: Apache-2.0
"""The shipped model: what lies in its folder, and what it draws."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open

from turbopocket.pocket.evaluate import WEIGHTS, evaluate, pipeline_images
from turbopocket.pocket.judge import load_judge
from turbopocket.pocket.scenes import captions
from turbopocket.pocket.train.text import TextEncoders, start_ratio

BUDGET_BYTES = 30_000_000

pytestmark = pytest.mark.skipif(
    not (WEIGHTS / "model_index.json").exists(), reason="no shipped weights; `make train-pocket` trains them"
)


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(WEIGHTS, dtype=torch.float32)


def test_the_folder_is_within_budget_and_in_half_precision() -> None:
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) <= BUDGET_BYTES
    for path in WEIGHTS.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} <= {"F16", "I64"}, path.name  # noqa: SIM118


def test_the_topology_is_sdxl_s(pipeline: StableDiffusionXLPipeline) -> None:
    config = pipeline.unet.config
    assert config.down_block_types == ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    assert config.up_block_types == ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]
    assert config.addition_embed_type == "text_time"
    assert config.use_linear_projection is True
    assert pipeline.vae_scale_factor == 8
    assert pipeline.config.force_zeros_for_empty_prompt is True
    assert pipeline.scheduler.config.prediction_type == "epsilon"


def test_states_are_the_ones_the_pipeline_computes(pipeline: StableDiffusionXLPipeline) -> None:
    prompts = captions("test", 3, seed=0)
    tokens, _, pooled, _ = pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    states = TextEncoders.load(WEIGHTS).states(prompts)
    assert torch.allclose(tokens, states.tokens, atol=1e-4)
    assert torch.allclose(pooled, states.pooled, atol=1e-4)


def test_the_start_token_towers_over_the_others_as_clip_s_does() -> None:
    ratios = start_ratio(TextEncoders.load(WEIGHTS), seed=0)
    assert min(ratios.values()) >= 40


def test_held_out_prompts_are_drawn_about_as_well_as_the_results_say(pipeline: StableDiffusionXLPipeline) -> None:
    results = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "pocket_float.json").read_text())
    images_for = pipeline_images(pipeline, results["steps"], results["guidance"])
    measured = evaluate(images_for, load_judge(), split="test", prompts=32, seed=7)
    assert results["test"]["alignment"] >= 0.95
    assert measured.alignment >= results["test"]["alignment"] - 0.1
