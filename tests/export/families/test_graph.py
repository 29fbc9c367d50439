# SPDX-License-Identifier: Apache-2.0
"""Components have the tensor names of optimum-onnx's pipelines and compute what the wrapped modules compute."""

from typing import Any

import pytest
import torch
from torch import nn

from turbopocket.export.families.graphs import text_encoder_component, unet_component, vae_decoder_component


def clip(kind: str) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        projection_dim=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=20,
        eos_token_id=2,
    )
    return getattr(transformers, kind)(config).eval()


def unet(**options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=48,
        norm_num_groups=8,
        **options,
    ).eval()


def sdxl_unet() -> Any:
    return unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + 40,
    )


def vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8).eval()


def test_the_first_text_encoder_has_optimums_names_and_values() -> None:
    model = clip("CLIPTextModel")
    component = text_encoder_component(model)
    hidden = tuple(f"hidden_states.{index}" for index in range(4))
    assert component.name == "text_encoder"
    assert component.output_names == ("last_hidden_state", "pooler_output", *hidden)
    assert list(component.example_inputs) == ["input_ids"]
    ids = torch.randint(0, 64, (3, 20))
    expected = model(ids, output_hidden_states=True)
    found = component.module(ids)
    assert torch.equal(found[0], expected.last_hidden_state)
    assert torch.equal(found[1], expected.pooler_output)
    assert all(map(torch.equal, found[2:], expected.hidden_states))


def test_the_second_text_encoder_gives_its_projection_first() -> None:
    model = clip("CLIPTextModelWithProjection")
    component = text_encoder_component(model, "text_encoder_2")
    assert component.output_names[:2] == ("text_embeds", "last_hidden_state")
    ids = torch.randint(0, 64, (3, 20))
    assert torch.equal(component.module(ids)[0], model(ids).text_embeds)


def test_an_sdxl_unet_takes_the_pooled_text_and_the_sizes() -> None:
    model = sdxl_unet()
    component = unet_component(model, latent_size=(4, 6), text_tokens=7)
    shapes = {name: tuple(tensor.shape) for name, tensor in component.example_inputs.items()}
    assert shapes == {
        "sample": (2, 4, 4, 6),
        "timestep": (),
        "encoder_hidden_states": (2, 7, 48),
        "text_embeds": (2, 40),
        "time_ids": (2, 6),
    }
    inputs = [torch.randn(shape) for shape in shapes.values()]
    added = {"text_embeds": inputs[3], "time_ids": inputs[4]}
    expected = model(*inputs[:3], added_cond_kwargs=added).sample
    assert component.output_names == ("out_sample",)
    assert torch.equal(component.module(*inputs), expected)


def test_an_sd_unet_takes_three_inputs_and_the_size_it_was_trained_for() -> None:
    component = unet_component(unet())
    assert list(component.example_inputs) == ["sample", "timestep", "encoder_hidden_states"]
    assert component.example_inputs["sample"].shape == (2, 4, 8, 8)
    assert component.module(*component.example_inputs.values()).shape == (2, 4, 8, 8)


def test_the_vae_decoder_is_the_half_that_draws() -> None:
    model = vae()
    component = vae_decoder_component(model, latent_size=(4, 6))
    latent = torch.randn(1, 4, 4, 6)
    assert list(component.example_inputs) == ["latent_sample"]
    assert component.output_names == ("sample",)
    assert torch.equal(component.module(latent), model.decode(latent).sample)
    assert not any("encoder" in name for name, _ in component.module.named_parameters())


@pytest.mark.parametrize(
    "component",
    [
        text_encoder_component(clip("CLIPTextModel")),
        unet_component(sdxl_unet()),
        vae_decoder_component(vae(), (4, 4)),
    ],
    ids=lambda component: component.name,
)
def test_parameters_are_named_by_component_and_module_path(component: Any) -> None:
    for path, module in component.module.model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            assert component.module.get_submodule(component.layer_prefix + path) is module
