# SPDX-License-Identifier: Apache-2.0
"""Pictures as a differentiable function of the layers: those that the loop draws, and SSIM to second order."""

from pathlib import Path

import numpy as np
import pytest
import torch

from turbopocket.export.build import walk as walks
from turbopocket.export.build.content import SsimForm
from turbopocket.export.build.walk import make_walk
from turbopocket.export.families.components import components_of
from turbopocket.export.verify.gaps import Session, torch_runner
from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.output_gradients import BlockTape
from turbopocket.runtimes.compare.metrics import ssim
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers

from ..drawer import drawer

PROMPTS = ["a red circle on the blue square", "the blue square"]


def session_of(folder: Path, out: Path, **sampler: object) -> tuple[Session, list[object]]:
    made = drawer(folder, out, **sampler)
    session = Session(made.manifest, open_tokenizers(made.artifact, made.manifest), PROMPTS, 3)
    return session, components_of(made.model)


@pytest.mark.parametrize(
    "sampler",
    [
        {"steps": 2, "guidance": 3.0},
        {"steps": 3, "guidance": 0.0, "kind": "euler_ancestral"},
        {"steps": 3, "guidance": 2.0, "kind": "dpmpp_2m"},
    ],
    ids=lambda sampler: str(sampler.get("kind", "model")),
)
def test_the_walk_draws_the_sessions_pictures(tiny_sdxl: Path, tmp_path: Path, sampler: dict[str, object]) -> None:
    session, components = session_of(tiny_sdxl, tmp_path, **sampler)
    walk = make_walk(session, components)
    runner = torch_runner(components)
    with torch.no_grad():
        both, second = walk.pictures(slice(0, 2)), walk.pictures(slice(1, 2))
    for index, picture in enumerate(both):
        expected = session.draw(runner, index)
        found = np.round(picture.permute(1, 2, 0).numpy() * 255)
        assert expected.std() > 1
        assert np.abs(found - expected.astype(np.float32)).max() <= 1
    torch.testing.assert_close(second[0], both[1], atol=1e-5, rtol=0)


def test_gradients_reach_text_encoders_through_every_step(tiny_sdxl: Path, tmp_path: Path) -> None:
    session, components = session_of(tiny_sdxl, tmp_path, steps=2, guidance=3.0)
    walk = make_walk(session, components)
    layers = {
        "unet.conv_in": walk.components["unet"].module.model.conv_in,
        "text_encoder.fc1": walk.components["text_encoder"].module.model.get_submodule("encoder.layers.0.mlp.fc1"),
    }
    output = walk.output()
    tape = BlockTape(layers, output.blocks)
    with tape.recording():
        y = output.run(slice(0, 2))
    calls = [call.layer for call in tape.backward(y, [torch.randn(y.shape)])]
    assert sorted(calls) == ["text_encoder.fc1", *["unet.conv_in"] * 4]


def test_a_long_walk_is_refused(tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, components = session_of(tiny_sdxl, tmp_path, steps=2, guidance=3.0)
    monkeypatch.setattr(walks, "MOST_CALLS", 3)
    with pytest.raises(TurbopocketError, match="takes 4 calls of the denoiser: gradients are taken through 3 at most"):
        make_walk(session, components)


@pytest.mark.parametrize(("side", "stride"), [(40, 1), (160, 3)])
def test_the_squared_length_is_what_ssim_lacks(side: int, stride: int) -> None:
    random = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(2, 3, 6, 6, generator=random), side, mode="bilinear")
    pictures = (0.8 * smooth + 0.2 * torch.rand(2, 3, side, side, generator=random)).clamp(0, 1)
    error = 2e-3 * torch.randn(pictures.shape, generator=random)
    form = SsimForm(pictures)
    assert form.stride == stride
    found = float((form(pictures + error) - form(pictures)).square().sum() / form.energy)
    pairs = zip((pictures + error).double(), pictures.double(), strict=True)
    lost = np.mean([1 - ssim(one.permute(1, 2, 0).numpy(), other.permute(1, 2, 0).numpy()) for one, other in pairs])
    assert found == pytest.approx(lost, rel=0.03)
    torch.testing.assert_close(form(pictures[1:], slice(1, 2)), form(pictures)[1:])
