# SPDX-License-Identifier: Apache-2.0
"""The folder that stands for SDXL-Turbo where only sizes count: small here, in the layout of the published one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from turbopocket.export.checkpoint.load import load, load_shapes

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "synthetic_sdxl.py"


def write(folder: Path, *options: str) -> None:
    subprocess.run([sys.executable, str(SCRIPT), str(folder), *options], check=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("synthetic") / "sdxl"
    write(made, "--width", "eighth")
    return made


def test_it_loads_with_all_depths_of_sdxl(folder: Path) -> None:
    model = load(str(folder))
    assert (model.family.name, model.text_tokens, tuple(model.image_size)) == ("sdxl", 77, (512, 512))
    published = load_shapes(str(folder)).modules
    for name, module in model.modules.items():
        assert [n for n, _ in module.named_parameters()] == [n for n, _ in published[name].named_parameters()]
    unet = model.modules["unet"]
    blocks = [name for name, _ in unet.named_modules() if name.split(".")[-2:-1] == ["transformer_blocks"]]
    assert len(blocks) == 70


def test_diffusers_draws_finite_pictures_in_half_precision_range(folder: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    largest: dict[str, float] = {}

    def look(name: str, output: object) -> None:
        if isinstance(output, torch.Tensor):
            largest[name] = max(largest.get(name, 0.0), float(output.abs().max()))

    for component in ("text_encoder", "text_encoder_2", "unet", "vae"):
        for name, module in getattr(pipeline, component).named_modules():
            module.register_forward_hook(lambda _m, _i, output, at=f"{component}.{name}": look(at, output))
    noise = torch.Generator().manual_seed(0)
    drawn = [
        pipeline(
            prompt,
            num_inference_steps=1,
            guidance_scale=0.0,
            height=64,
            width=64,
            generator=noise.manual_seed(0),
            output_type="np",
        ).images[0]
        for prompt in ("a large red circle on a white background", "zyx, qwerty: two words nobody has seen")
    ]
    assert all(np.isfinite(picture).all() and picture.std() > 0.01 for picture in drawn)
    assert np.abs(drawn[0] - drawn[1]).mean() > 1e-3, "the prompt is heard"
    assert max(largest.values()) < 65504 / 8
    assert largest["text_encoder.encoder.layers.10"] > 25, "the start token's outlier reaches the last states"


def test_values_have_the_statistics_that_are_said(folder: Path) -> None:
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in unet.values()} == {torch.float16}
    weight_OK = unet["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"].float()
    row_scale_O = weight_OK.square().mean(1).sqrt() * weight_OK.shape[1] ** 0.5
    assert 0.25 < float(row_scale_O.log().std()) < 0.4
    assert 0.8 < float(row_scale_O.median()) < 1.2
    norm_K = unet["mid_block.attentions.0.transformer_blocks.0.norm1.weight"].float()
    assert abs(float(norm_K.mean()) - 1) < 0.05
    token_VK = load_file(folder / "text_encoder" / "model.safetensors")["text_model.embeddings.token_embedding.weight"]
    assert sorted(torch.nonzero(token_VK.abs() > 5)[:, 0].tolist()) == [49406, 49406]


def test_the_same_seed_gives_the_same_bytes_and_another_other_ones(folder: Path, tmp_path: Path) -> None:
    name = Path("vae") / "diffusion_pytorch_model.safetensors"
    write(tmp_path / "same", "--width", "eighth")
    write(tmp_path / "other", "--width", "eighth", "--seed", "1")
    assert (tmp_path / "same" / name).read_bytes() == (folder / name).read_bytes()
    assert (tmp_path / "other" / name).read_bytes() != (folder / name).read_bytes()
