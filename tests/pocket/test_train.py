# SPDX-License-Identifier: Apache-2.0
"""Training: exact resume, caption sharing, folded scales."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from turbopocket.pocket.train.loop import cosine_with_warmup, fit, step_generator
from turbopocket.pocket.train.muon import Muon, orthogonalised
from turbopocket.pocket.train.shared_captions import folded_state, share_captions
from turbopocket.pocket.train.unet import WeightAverage, denoising_weights


class InterruptedRunError(Exception):
    pass


def run(folder: Path, steps: int, stop_at: int | None = None) -> tuple[list[float], nn.Module]:
    """Losses and weights of a toy run that saves at every step and may be interrupted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    average = WeightAverage(model)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimisers = {"muon": Muon(matrices, lr=0.02), "adamw": torch.optim.AdamW(others, lr=0.02)}
    losses: list[float] = []

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        if step == stop_at:
            raise InterruptedRunError
        inputs = torch.randn(16, 4, generator=step_generator(0, step))
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        losses.append(loss.item())
        return loss, {}

    states = {"model": model, "average": average}
    fit(
        folder,
        states,
        optimisers,
        loss_at,
        steps=steps,
        warmup_steps=3,
        after_step=average.update,
        checkpoint_every_s=-1.0,
        log_every=1,
    )
    return losses, model


def test_an_interrupted_run_resumes_to_the_same_losses_and_weights(tmp_path: Path) -> None:
    whole, model = run(tmp_path / "whole", 12)
    with pytest.raises(InterruptedRunError):
        run(tmp_path / "resumed", 12, stop_at=5)
    rest, resumed = run(tmp_path / "resumed", 12)
    assert rest == whole[5:]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    logs = [json.loads(line) for line in (tmp_path / "resumed" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logs] == list(range(1, 13))


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    run(tmp_path, 4)
    losses, _ = run(tmp_path, 4)
    assert losses == []


def test_the_learning_rate_rises_then_falls_to_nothing() -> None:
    shares = [cosine_with_warmup(step, 100, 10) for step in range(100)]
    assert shares.index(max(shares)) in (9, 10)
    assert max(shares) == 1.0
    assert shares[0] == 0.1
    assert shares[-1] < 0.001


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_orthogonalised_updates_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=step_generator(0, 0)) * 100
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert values.shape == (min(shape),)
    assert values.min() > 0.3
    assert values.max() < 1.3


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return tiny_unet()


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        use_linear_projection=True,
        cross_attention_dim=12,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=10 + 24,
        norm_num_groups=4,
    ).eval()


@torch.no_grad()
def predict(unet: UNet2DConditionModel, tokens: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    latents = torch.randn(6, 4, 4, 4, generator=step_generator(1, 0))
    added = {"text_embeds": pooled, "time_ids": torch.ones(6, 6)}
    output: torch.Tensor = unet(latents, torch.arange(6) * 100, tokens, added_cond_kwargs=added).sample
    return output


def conditions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = step_generator(2, 0)
    return torch.randn(2, 7, 12, generator=generator), torch.randn(6, 10, generator=generator)


def test_sharing_captions_changes_no_prediction(unet: UNet2DConditionModel) -> None:
    tokens, pooled = conditions()
    shared = tiny_unet()
    shared.load_state_dict(unet.state_dict())
    share_captions(shared)
    plain = predict(unet, tokens.repeat_interleave(3, 0), pooled)
    assert torch.allclose(predict(shared, tokens, pooled), plain, atol=1e-5)
    swapped = predict(shared, tokens.flip(0), pooled)
    assert not torch.allclose(swapped, plain, atol=1e-3)


def test_folded_weights_on_raw_states_predict_what_scaled_states_did(unet: UNet2DConditionModel) -> None:
    tokens, pooled = conditions()
    tokens = tokens.repeat_interleave(3, 0)
    scales = torch.linspace(0.5, 80.0, 12), torch.linspace(0.3, 3.0, 10)
    folded = tiny_unet()
    folded.load_state_dict(folded_state(unet, *scales))
    scaled = predict(unet, tokens / scales[0], pooled / scales[1])
    assert torch.allclose(predict(folded, tokens, pooled), scaled, atol=1e-5)
    assert not torch.allclose(predict(unet, tokens, pooled), scaled, atol=1e-3)


def test_loss_weights_are_capped_signal_to_noise() -> None:
    weights = denoising_weights(torch.tensor([0.99, 5 / 6, 0.5, 0.01]))
    assert weights.tolist() == pytest.approx([5 / 99, 1.0, 1.0, 1.0])
