# SPDX-License-Identifier: Apache-2.0
"""UNets that take more, or are cut in two, and encoders: packages whose inputs are not the usual ones."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from turbopocket.export.families.graphs import (
    unet_component,
    vae_encoder_component,
)
from turbopocket.export.targets.coreml import program as target
from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.scheme import Scheme
from turbopocket.runtimes.coreml.chain import run_chain
from turbopocket.runtimes.coreml.evaluate.evaluator import Evaluator
from turbopocket.runtimes.coreml.file.program import Program
from turbopocket.runtimes.coreml.interface import package_file, package_inputs

from .test_lower_coreml import (
    LEAST_SNR_DB,
    compressed,
    example,
    package_outputs,
    small_component,
    small_unet,
    small_vae,
    snr_db,
    spec_of,
    stored_weights,
    tensors,
    torch_outputs,
)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_unet_takes_as_many_items_as_are_asked_for_and_three_are_several_calls(batch: Any, tmp_path: Path) -> None:
    component = small_component("unet")
    graph = target.trace(component, target.CoreMLOptions(batch=batch))
    weights = compressed(component, graph, "int8-row")
    target.lower(graph, weights, tmp_path)
    program = Program.open(tmp_path / "Unet.mlpackage")
    assert {spec.name: spec.shape[0] for spec in program.inputs} == dict.fromkeys(
        ("sample", "timestep", "encoder_hidden_states", "time_ids", "text_embeds"), batch
    )
    inputs = example(component, 3)
    with stored_weights(component, weights):
        expected = torch_outputs(component, inputs)
    found = package_outputs(tmp_path / "Unet.mlpackage", "unet", inputs)
    assert snr_db(found["out_sample"], expected["out_sample"]) >= LEAST_SNR_DB


def test_ios17_packages_compute_the_same_without_fused_attention(tmp_path: Path) -> None:
    component = small_component("unet")
    graph = target.trace(component, target.CoreMLOptions(deployment="iOS17"))
    weights = compressed(component, graph, "lut6")
    target.lower(graph, weights, tmp_path)
    program = Program.open(tmp_path / "Unet.mlpackage")
    assert program.spec_version == 8
    assert "scaled_dot_product_attention" not in {op.kind for op in program.operations}
    inputs = example(component, 1)
    with stored_weights(component, weights):
        expected = torch_outputs(component, inputs)["out_sample"]
    found = package_outputs(tmp_path / "Unet.mlpackage", "unet", inputs)["out_sample"]
    assert snr_db(found, expected) >= LEAST_SNR_DB


class Late(nn.Module):
    """In a UNet's place: its second half alone reads the pooled text."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            in_channels=4,
            sample_size=8,
            cross_attention_dim=6,
            addition_embed_type="text_time",
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=6 * 16 + 4,
            time_cond_proj_dim=None,
        )
        self.first, self.second = nn.Conv2d(4, 256, 3, padding=1), nn.Conv2d(256, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, states: Tensor, added_cond_kwargs: Any, **_: Any) -> list[Tensor]:
        early = t + states.mean((1, 2)) + added_cond_kwargs["time_ids"].mean(1)
        x = self.first(x * early.reshape(-1, 1, 1, 1))
        return [self.second(x) + added_cond_kwargs["text_embeds"].reshape(-1, 4, 1, 1)]


def test_a_second_chunk_takes_what_crosses_and_the_inputs_that_it_reads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    component = unet_component(Late().eval(), text_tokens=5)
    graph = target.trace(component)
    weights = compressed(component, graph)
    whole = target.lowered_bytes(graph, {name: Scheme(weight.format) for name, weight in weights.items()})
    target.lower(graph, weights, tmp_path)
    target.lower(replace(graph, max_package_bytes=round(0.7 * whole)), weights, tmp_path)
    first, second = (Program.open(tmp_path / package_file("unet", chunk)) for chunk in (1, 2))
    everything = Program.open(tmp_path / "Unet.mlpackage")
    assert first.inputs == everything.inputs  # the Swift package reads their shapes from the first chunk
    text = [spec for spec in everything.inputs if spec.name == "text_embeds"]
    assert sorted(map(repr, second.inputs)) == sorted(map(repr, [*first.outputs, *text]))
    assert second.outputs == everything.outputs
    given = {name: tensor.numpy() for name, tensor in example(component, 1).items()}
    (call,) = package_inputs(spec_of(everything, "unet"), given)
    found, _ = run_chain([Evaluator(first), Evaluator(second)], call)
    expected = Evaluator(everything).run(call)
    assert snr_db(found["noise_pred"], expected["noise_pred"]) >= 55


def test_a_unet_that_is_told_its_guidance_takes_it_as_one_more_input(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    told: Any = UNet2DConditionModel(**{**small_unet().config, "time_cond_proj_dim": 12})
    component = unet_component(told.eval(), text_tokens=5)
    graph = target.trace(component)
    target.lower(graph, compressed(component, graph), tmp_path)
    program = Program.open(tmp_path / "Unet.mlpackage")
    assert tensors(program.inputs)["timestep_cond"] == ("float16", (2, 12))
    inputs = example(component, 1)
    found = package_outputs(tmp_path / "Unet.mlpackage", "unet", inputs)
    assert snr_db(found["out_sample"], torch_outputs(component, inputs)["out_sample"]) >= LEAST_SNR_DB
    without = package_outputs(
        tmp_path / "Unet.mlpackage", "unet", inputs | {"timestep_cond": torch.zeros_like(inputs["timestep_cond"])}
    )
    assert snr_db(without["out_sample"], found["out_sample"]) < LEAST_SNR_DB


@pytest.mark.parametrize("tiny", [False, True])
def test_a_package_reads_pictures_as_apples_encoder_expects(tiny: bool, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    levels = {"encoder_block_out_channels": (16,), "decoder_block_out_channels": (16,)}
    small = AutoencoderTiny(**levels, num_encoder_blocks=(1,), num_decoder_blocks=(1,)) if tiny else small_vae()
    component = vae_encoder_component(small.eval(), image_size=(6, 10))
    graph = target.trace(component)
    target.lower(graph, compressed(component, graph), tmp_path)
    program = Program.open(tmp_path / "VAEEncoder.mlpackage")
    assert tensors(program.inputs) == {"x": ("float32", (1, 3, 6, 10))}
    expected_output = {"latent_sample": (1, 4, 6, 10)} if tiny else {"latent": (1, 8, 6, 10)}
    assert tensors(program.outputs) == {name: ("float32", shape) for name, shape in expected_output.items()}
    spec = target.component_spec(graph)
    assert tensors(spec.loop_inputs) == {"sample": ("float32", ("batch", 3, 6, 10))}
    inputs = example(component, 2)
    found = package_outputs(tmp_path / "VAEEncoder.mlpackage", "vae_encoder", inputs)
    (name,) = component.output_names
    assert [output.name for output in spec.loop_outputs] == list(found) == [name]
    assert snr_db(found[name], torch_outputs(component, inputs)[name]) >= LEAST_SNR_DB


def test_an_output_that_can_not_hold_its_layer_is_refused_by_name() -> None:
    component = small_component("unet")
    with pytest.raises(TurbopocketError, match=r"unet\.conv_out reaches 70000, and output noise_pred is fp16"):
        target.trace(component, largest={"unet.conv_out": 70_000.0})


def test_a_component_that_apples_package_does_not_know_is_refused() -> None:
    with pytest.raises(TurbopocketError, match="no component safety_checker"):
        package_file("safety_checker")
