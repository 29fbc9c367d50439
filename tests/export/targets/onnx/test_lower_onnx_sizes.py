# SPDX-License-Identifier: Apache-2.0
"""One ONNX graph for pictures of several sizes computes what PyTorch computes at each of them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from turbopocket.export.checkpoint.load import load
from turbopocket.export.families.components import components_of
from turbopocket.export.families.graphs import Component, unet_component, vae_decoder_component
from turbopocket.export.targets.onnx import program as target
from turbopocket.export.targets.onnx import translations
from turbopocket.quant.scheme import Scheme
from turbopocket.runtimes.image_size import ImageSize
from turbopocket.runtimes.kernels.library import onnx_operators
from turbopocket.runtimes.onnx.session import open_session

from .test_lower_onnx import (
    MOST_ERROR,
    Traced,
    compressed,
    example,
    relative_error,
    small_unet,
    stored_weights,
    torch_outputs,
)

EVEN, UNEVEN = 8, 9
"""Latent sides at which graphs are traced; a UNet of two levels doubles on its way up from the former only."""
LATENTS = ((8, 8), (4, 10), (2, 2), (16, 6), (1, 64))
UNEVEN_LATENTS = (*LATENTS, (7, 8), (8, 7), (5, 13), (1, 1))
FORMATS = ("fp32", "fp16", "int8-row", "int4-g32", "int4-row-asym", "vq8-d4", "avq2x8-d8", "avq2x8-d8-shared")


def vae_of_two_levels() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        layers_per_block=1,
    )


@pytest.fixture(scope="module")
def traced() -> dict[tuple[str, int], Traced]:
    torch.manual_seed(0)
    unet, vae = small_unet().eval(), vae_of_two_levels().eval()
    components = {("unet", side): unet_component(unet, (side, side), 5, free_size=True) for side in (EVEN, UNEVEN)}
    components["vae_decoder", EVEN] = vae_decoder_component(vae, (EVEN, EVEN), free_size=True)
    return {key: (component, target.trace(component)) for key, component in components.items()}


def at(component: Component, latent: tuple[int, int], batch: int) -> dict[str, Tensor]:
    """Inputs of the component for latents of that size."""
    first, tensor = next(iter(component.example_inputs.items()))
    inputs = component.example_inputs | {first: torch.zeros(*tensor.shape[:2], *latent)}
    return example(replace(component, example_inputs=inputs), batch)


def largest_error(
    component: Component, graph: Path, latents: Sequence[tuple[int, int]], operators: Path | None = None
) -> float:
    session, errors = open_session(str(graph), operators=operators), []
    for index, latent in enumerate(latents):
        inputs = at(component, latent, batch=1 + 2 * (index % 2))
        found = session.run(list(component.output_names), {name: value.numpy() for name, value in inputs.items()})
        errors += [relative_error(*pair) for pair in zip(found, torch_outputs(component, inputs), strict=True)]
    return max(errors)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("key", "latents"),
    [(("unet", EVEN), LATENTS[:4]), (("unet", UNEVEN), UNEVEN_LATENTS), (("vae_decoder", EVEN), LATENTS)],
)
def test_a_graph_of_free_size_computes_what_pytorch_does_at_every_size(
    traced: dict[tuple[str, int], Traced], key: tuple[str, int], latents: Any, name: str, tmp_path: Path
) -> None:
    component, graph = traced[key]
    weights = compressed(component, graph, name, "int8-row")
    assert any(str(weight.format) == name for weight in weights.values())
    spec = target.lower(graph, weights, tmp_path)
    with stored_weights(component, weights):
        assert largest_error(component, tmp_path / spec.file, latents) <= MOST_ERROR
    on_disk = sum(file.stat().st_size for file in (tmp_path / component.name).iterdir())
    assert on_disk == target.lowered_bytes(graph, {layer: Scheme(weight.format) for layer, weight in weights.items()})


def test_kernels_take_every_size(traced: dict[tuple[str, int], Traced], tmp_path: Path) -> None:
    operators = onnx_operators()
    if operators is None:
        pytest.skip("the kernels are not built: make kernels")
    for component, graph in traced.values():
        weights = compressed(component, graph, "avq2x8-d8", "int8-row")
        spec = target.lower(graph, weights, tmp_path)
        with stored_weights(component, weights):
            assert largest_error(component, tmp_path / spec.file, LATENTS[:4], operators) <= MOST_ERROR


def test_free_dimensions_have_the_names_of_the_manifest(traced: dict[tuple[str, int], Traced]) -> None:
    def shapes(key: tuple[str, int]) -> dict[str, list[int | str]]:
        spec = target.component_spec(traced[key][1])
        return {tensor.name: tensor.shape for tensor in (*spec.inputs, *spec.outputs)}

    latent = ["batch", 4, "latent_height", "latent_width"]
    assert shapes(("unet", EVEN)) == {
        "sample": latent,
        "timestep": [],
        "encoder_hidden_states": ["batch", 5, 96],
        "text_embeds": ["batch", 64],
        "time_ids": ["batch", 6],
        "out_sample": latent,
    }
    assert shapes(("unet", UNEVEN)) == shapes(("unet", EVEN))
    assert shapes(("vae_decoder", EVEN)) == {"latent_sample": latent, "sample": ["batch", 3, "height", "width"]}


def test_layers_have_the_same_names_and_shapes_as_at_one_size(
    traced: dict[tuple[str, int], Traced], monkeypatch: pytest.MonkeyPatch
) -> None:
    component, graph = traced["unet", EVEN]
    monkeypatch.setattr(translations, "MANY_TOKENS", 0)  # a free size may have many
    fixed = target.trace(unet_component(component.module.model, (EVEN, EVEN), 5))
    assert graph.layers == fixed.layers
    assert graph.rest.keys() == fixed.rest.keys()
    extra = len(graph.skeleton.graph.node) - len(fixed.skeleton.graph.node)
    assert 0 < extra < 0.1 * len(fixed.skeleton.graph.node)


def test_a_graph_of_one_size_has_numbers_and_computes_uneven_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    component = unet_component(small_unet().eval(), (7, 10), text_tokens=5)
    graph = target.trace(component)
    spec = target.lower(graph, compressed(component, graph, "fp32"), tmp_path)
    assert spec.inputs[0].shape == spec.outputs[0].shape == ["batch", 4, 7, 10]
    assert largest_error(component, tmp_path / spec.file, [(7, 10)]) <= MOST_ERROR


def test_sizes_that_are_not_halved_evenly_decide_how_the_graph_goes_up_again(tiny_sdxl: Path) -> None:
    model = load(str(tiny_sdxl))

    def free(*sizes: ImageSize) -> tuple[bool, bool]:
        """Whether the UNet's size is free, and whether its graph takes uneven sides."""
        unet = next(each for each in components_of(model, sizes) if each.name == "unet")
        return bool(unet.free), unet.example_inputs["sample"].shape[2] % 4 > 0

    assert free() == free(ImageSize(32, 48)) == (False, False)
    assert free(ImageSize(32, 48), ImageSize(40, 64)) == (True, False)
    assert free(ImageSize(32, 48), ImageSize(40, 66)) == (True, True)


def test_doubling_where_the_way_down_was_uneven_would_be_wrong(
    traced: dict[tuple[str, int], Traced], tmp_path: Path
) -> None:
    component, graph = traced["unet", EVEN]
    spec = target.lower(graph, compressed(component, graph, "fp32"), tmp_path)
    with pytest.raises(Exception, match="Concat"):
        largest_error(component, tmp_path / spec.file, [(7, 8)])
