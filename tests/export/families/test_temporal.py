# SPDX-License-Identifier: Apache-2.0
"""The temporal information block of each kind of denoiser, found without its names."""

from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from turbopocket.export.checkpoint.load import load
from turbopocket.export.families.components import components_of
from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.layers import compressible_layers
from turbopocket.quant.temporal import TemporalBlock, temporal_block

from ...checkpoints import CHECKPOINTS

EMBEDDING = ["unet.time_embedding.linear_1", "unet.time_embedding.linear_2"]
ADDED = ["unet.add_embedding.linear_1", "unet.add_embedding.linear_2"]
ADALN = "transformer.adaln_single"
ALPHA = [
    f"{ADALN}.emb.{what}_embedder.linear_{index}"
    for what in ("timestep", "resolution", "aspect_ratio")
    for index in (1, 2)
]
EXPECTED: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "sd15": (EMBEDDING, ("timestep",)),
    "sdxl-turbo": ([*EMBEDDING, *ADDED], ("timestep", "text_embeds", "time_ids")),
    "lcm": (["unet.time_embedding.cond_proj", *EMBEDDING], ("timestep", "timestep_cond")),
    "pixart-sigma": ([*ALPHA[:2], f"{ADALN}.linear"], ("timestep",)),
    "pixart-alpha": ([*ALPHA, f"{ADALN}.linear"], ("timestep", "resolution", "aspect_ratio")),
}


@pytest.fixture(scope="module", params=list(EXPECTED))
def denoiser(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Any, TemporalBlock]:
    folder = tmp_path_factory.mktemp(request.param)
    next(each for each in CHECKPOINTS if each.name == request.param).make(folder)
    component = next(each for each in components_of(load(str(folder))) if each.role == "denoiser")
    inputs = {name: tensor[:1] if tensor.ndim else tensor for name, tensor in component.example_inputs.items()}
    latents, model = next(iter(inputs)), component.module.model
    block = temporal_block(component.name, component.module, inputs, latents, "timestep", model)
    return request.param, component, block


def test_the_block_is_the_embedding_and_every_projection_of_it(denoiser: Any) -> None:
    name, component, block = denoiser
    layers = compressible_layers(component.name, component.module.model)
    expected, inputs = EXPECTED[name]
    projections = [each for each in layers if fnmatch(each, "*.time_emb_proj")]
    assert sorted(block.layers) == sorted([*expected, *projections])
    assert block.inputs == inputs
    # What the rest of a PixArt reads is its adaLN layer's output and, at its end, the embedding itself.
    rest = [each for each in expected if each.startswith(ADALN) and not each.endswith("linear_1")]
    assert set(block.ends) == {*projections, *rest}
    weights = {each: layer.get_parameter("weight").numel() for each, layer in layers.items()}
    assert block.share == pytest.approx(sum(weights[each] for each in block.layers) / sum(weights.values()))


def test_features_are_those_of_the_model_whatever_the_latents(denoiser: Any) -> None:
    _, component, block = denoiser
    layers = compressible_layers(component.name, component.module.model)
    for timestep in (999.0, 12.5):
        for _ in range(2):  # other latents, text and mask
            inputs = _random(component, timestep)
            with torch.no_grad():
                seen = _outputs({each: layers[each] for each in block.ends}, component, inputs)
                found = block.features(component.module, layers, {name: inputs[name] for name in block.inputs})
            assert list(found) == list(block.ends)
            assert all(torch.equal(found[each], seen[each]) for each in block.ends)


def test_inputs_of_another_shape_are_refused(denoiser: Any) -> None:
    _, component, block = denoiser
    layers = compressible_layers(component.name, component.module.model)
    inputs = _random(component, 1.0) | {"timestep": torch.ones(3)}
    with pytest.raises(TurbopocketError, match=r"timestep of shape \[3\]"):
        block.features(component.module, layers, inputs)


class _Mixed(nn.Module):
    """A denoiser whose embedding is of the timestep and, when it is asked to, of the latents."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.mixed = mixed
        self.time, self.project, self.conv = nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv2d(4, 4, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        embedding = self.time(torch.sin(timestep * torch.arange(4.0, device=timestep.device))[None])
        if self.mixed:
            embedding = embedding + sample.mean((2, 3))
        return self.conv(sample) + self.project(embedding.relu())[:, :, None, None]


@pytest.mark.parametrize(("mixed", "expected"), [(False, ("unet.time", "unet.project")), (True, ("unet.time",))])
def test_a_layer_that_sees_the_latents_is_not_in_the_block(mixed: bool, expected: tuple[str, ...]) -> None:
    model, inputs = _Mixed(mixed), {"sample": torch.zeros(1, 4, 2, 2), "timestep": torch.tensor(1.0)}
    block = temporal_block("unet", model, inputs, "sample", "timestep", model)
    assert (block.layers, block.ends) == (expected, expected[-1:])


def _outputs(layers: dict[str, nn.Module], component: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What these layers give in a call of the component."""
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _m, _i, y, name=name: seen.setdefault(name, y))
        for name, layer in layers.items()
    ]
    component.module(*inputs.values())
    for hook in hooks:
        hook.remove()
    return seen


def _random(component: Any, timestep: float) -> dict[str, Tensor]:
    return {
        name: torch.randn(1, *tensor.shape[1:]).to(tensor.dtype) if tensor.ndim else torch.tensor(timestep)
        for name, tensor in component.example_inputs.items()
    }
