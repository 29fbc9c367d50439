# SPDX-License-Identifier: Apache-2.0
"""T5's encoder and PixArt's transformer as graphs: the numbers of their libraries, in PyTorch and in ONNX files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from turbopocket.export.families.graphs import Component
from turbopocket.export.families.t5 import bucket_bounds, t5_encoder_component
from turbopocket.export.families.transformer import transformer_component
from turbopocket.export.targets.onnx import program as target
from turbopocket.export.targets.onnx.target import Onnx
from turbopocket.quant.fit import ABSMAX
from turbopocket.quant.formats import parse_format
from turbopocket.quant.layers import compressible_layers
from turbopocket.quant.scheme import Scheme
from turbopocket.runtimes.compare.metrics import relative_error
from turbopocket.runtimes.image_size import ImageSize
from turbopocket.runtimes.onnx.runner import OnnxRunner

from ...pixart_checkpoints import t5_encoder, transformer

TOKENS, SIZE = 21, ImageSize(12, 20)
TOLD = {"resolution": torch.tensor([[96.0, 160.0], [512.0, 300.0]]), "aspect_ratio": torch.tensor([[0.6], [1.7]])}


def text_component() -> Component:
    torch.manual_seed(0)
    return t5_encoder_component(t5_encoder().eval(), "text_encoder", TOKENS)


def denoiser_component(told: bool, size: ImageSize = SIZE) -> Component:
    torch.manual_seed(0)
    return transformer_component(transformer(use_additional_conditions=told).eval(), size, TOKENS)


def inputs_of(component: Component) -> dict[str, torch.Tensor]:
    """Random inputs of two pictures, whose prompts are 9 ids and 1 id long."""
    torch.manual_seed(1)
    mask = (torch.arange(TOKENS)[None] < torch.tensor([[9], [1]])).long()
    known = {"input_ids": torch.randint(3, 150, (2, TOKENS)), "timestep": torch.tensor(731.5)} | TOLD
    known |= {"attention_mask": mask, "encoder_attention_mask": mask}
    return {
        name: known[name] if name in known else torch.randn_like(value)
        for name, value in component.example_inputs.items()
    }


@torch.no_grad()
def test_the_encoder_gives_transformers_states_where_a_prompt_is() -> None:
    component = text_component()
    inputs = inputs_of(component)
    torch.manual_seed(0)
    expected = t5_encoder().eval()(**inputs).last_hidden_state
    found = component.module(*inputs.values())
    kept = inputs["attention_mask"].bool()
    assert relative_error(found[kept].numpy(), expected[kept].numpy()) < 1e-6


def test_distances_fall_into_the_buckets_that_transformers_finds() -> None:
    attention = t5_encoder().encoder.block[0].layer[0].SelfAttention
    bounds = bucket_bounds(attention, 300)
    assert bounds == [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    far = torch.arange(-299, 300)
    expected = attention._relative_position_bucket(far)
    found = (far > 0).long() * 16 + sum((far.abs() >= bound).long() for bound in bounds)
    assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("size", [SIZE, ImageSize(16, 16)], ids=str)
def test_the_transformer_predicts_what_diffusers_predicts_at_any_one_size(told: bool, size: ImageSize) -> None:
    component = denoiser_component(told, size)
    inputs = inputs_of(component)
    torch.manual_seed(0)
    options = dict(inputs)
    added = {name: options.pop(name, None) for name in TOLD}
    options["timestep"] = options["timestep"].expand(2)
    expected = transformer(use_additional_conditions=told).eval()(**options, added_cond_kwargs=added).sample
    found = component.module(*inputs.values())
    assert found.shape == (2, 8, *size)
    assert relative_error(found.numpy(), expected.numpy()) < 1e-6


@torch.no_grad()
def test_what_stands_at_padding_changes_no_prediction() -> None:
    component = denoiser_component(told=False)
    inputs = inputs_of(component)
    expected = component.module(*inputs.values())
    hidden = ~inputs["encoder_attention_mask"].bool()
    inputs["encoder_hidden_states"][hidden] = 100.0
    assert torch.equal(component.module(*inputs.values()), expected)
    inputs["encoder_hidden_states"][0, 0] += 1
    assert not torch.equal(component.module(*inputs.values()), expected)


def test_layers_have_the_names_that_they_have_in_the_checkpoint() -> None:
    for component, whole in ((text_component(), t5_encoder()), (denoiser_component(told=True), transformer())):
        names = set(compressible_layers(component.name, component.module.model))
        told = {name for name in names if "resolution_embedder" in name or "aspect_ratio_embedder" in name}
        assert names - told == set(compressible_layers(component.name, whole))


def test_a_tied_embedding_is_one_parameter() -> None:
    component = text_component()
    tables = [name for name, value in component.module.named_parameters() if tuple(value.shape) == (192, 32)]
    assert tables == ["text_encoder.encoder.embed_tokens.weight"]
    assert list(target.trace(component).rest).count("encoder.embed_tokens.weight") == 1


@torch.no_grad()
@pytest.mark.parametrize("formats", [("fp32",), ("int8-g32", "fp16")], ids="+".join)
@pytest.mark.parametrize("name", ["text_encoder", "transformer"])
def test_the_onnx_file_computes_what_pytorch_computes_with_the_stored_weights(
    name: str, formats: tuple[str, ...], tmp_path: Path
) -> None:
    component = text_component() if name == "text_encoder" else denoiser_component(told=True)
    inputs, graph = inputs_of(component), target.trace(component)
    weights = {}
    for layer_name, layer in graph.layers.items():
        fitting = [f for f in map(parse_format, formats) if Onnx().storable(Scheme(f), layer.kind, layer.shape) is None]
        weight = component.module.get_parameter(f"{layer_name}.weight")
        weights[layer_name] = fitting[0].compress(weight, ABSMAX)
        weight.copy_(fitting[0].decompress(weights[layer_name]))
    planned = target.lowered_bytes(graph, {layer_name: Scheme(weight.format) for layer_name, weight in weights.items()})
    spec = target.lower(graph, weights, tmp_path)
    assert planned == sum(path.stat().st_size for path in (tmp_path / name).iterdir())
    manifest: Any = type("OneComponent", (), {"components": {name: spec}, "plan": None})()
    expected = component.module(*inputs.values()).numpy()
    fed = {input_name: value.numpy() for input_name, value in inputs.items()}
    found = OnnxRunner(tmp_path, manifest).run(name, fed)[component.output_names[0]]
    kept = np.ones(2, bool) if name == "transformer" else inputs["attention_mask"].bool().numpy()
    assert relative_error(found[kept], expected[kept]) < 1e-4
