# SPDX-License-Identifier: Apache-2.0
"""Whole components as Core ML packages: Apple's names, planned bytes, the same bytes twice, PyTorch's numbers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from turbopocket.export.families.graphs import (
    Component,
    text_encoder_component,
    unet_component,
    vae_decoder_component,
)
from turbopocket.export.targets.coreml import program as target
from turbopocket.export.targets.coreml.stores import STORES
from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.fit import ABSMAX
from turbopocket.quant.formats import CompressedTensor, parse_format
from turbopocket.quant.scheme import Scheme
from turbopocket.runtimes.coreml.chain import run_chain
from turbopocket.runtimes.coreml.evaluate.evaluator import Evaluator
from turbopocket.runtimes.coreml.file.program import Program
from turbopocket.runtimes.coreml.interface import layer_value, loop_outputs, loop_spec, package_file, package_inputs
from turbopocket.runtimes.manifest import ComponentSpec

PARTS = ("text_encoder_2", "unet", "vae_decoder")
LEAST_SNR_DB = 60.0
"""fp32 arithmetic: what remains is that constants, inputs and outputs are rounded to fp16."""


def small_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(2, 4),
        cross_attention_dim=96,
        use_linear_projection=True,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + 64,
    )


def small_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8, layers_per_block=1)


def small_text_encoder() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=20,
        bos_token_id=0,
        eos_token_id=2,
    )
    return CLIPTextModelWithProjection(config)


Traced = tuple[Component, target.TracedProgram]


def small_component(part: str) -> Component:
    torch.manual_seed(0)
    match part:
        case "unet":
            return unet_component(small_unet().eval(), text_tokens=5)
        case "vae_decoder":
            return vae_decoder_component(small_vae().eval(), latent_size=(6, 10))
        case _:
            return text_encoder_component(small_text_encoder().eval(), part)


@pytest.fixture(scope="module")
def traced() -> dict[str, Traced]:
    components = {part: small_component(part) for part in PARTS}
    return {part: (component, target.trace(component)) for part, component in components.items()}


def compressed(component: Component, graph: target.TracedProgram, *names: str) -> dict[str, CompressedTensor]:
    """Every layer in the first format of `names` that it can be stored in, else in fp16."""
    weights = {}
    for name, layer in graph.layers.items():
        formats = map(parse_format, (*names, "fp16"))
        format = next(
            f for f in formats if STORES.storable(Scheme(f), layer.kind, layer.shape, graph.deployment) is None
        )
        weights[name] = format.compress(component.module.get_parameter(f"{name}.weight"), ABSMAX)
    return weights


@contextmanager
def stored_weights(component: Component, weights: Mapping[str, CompressedTensor]) -> Iterator[None]:
    """The PyTorch module computes with the weights as stored, while the context is open."""
    parameters = {name: component.module.get_parameter(f"{name}.weight") for name in weights}
    originals = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for name, weight in weights.items():
        parameters[name].data.copy_(weight.format.decompress(weight))
    yield
    for name, original in originals.items():
        parameters[name].data.copy_(original)


def example(component: Component, batch: int) -> dict[str, Tensor]:
    """Inputs of the drawing loop that fp16 holds exactly."""
    generator = torch.Generator().manual_seed(batch)
    inputs = {}
    for name, tensor in component.example_inputs.items():
        shape = (batch, *tensor.shape[1:])
        match name:
            case "input_ids":
                inputs[name] = torch.randint(0, 64, shape, generator=generator)
            case "timestep":
                inputs[name] = torch.tensor(999.0)
            case "time_ids":
                inputs[name] = torch.tensor([1024.0, 768.0, 16.0, 0.0, 1024.0, 768.0]).expand(shape)
            case _:
                inputs[name] = torch.randn(shape, generator=generator).half().float()
    return inputs


def torch_outputs(component: Component, inputs: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    with torch.inference_mode():
        outputs = component.module(*inputs.values())
    tensors = (outputs,) if isinstance(outputs, Tensor) else outputs
    found = dict(zip(component.output_names, (tensor.numpy() for tensor in tensors), strict=True))
    states = [value for name, value in found.items() if name.startswith("hidden_states.")]
    return found | ({"hidden_embeds": states[-2]} if states else {})


def package_outputs(package: Path, component: str, inputs: Mapping[str, Tensor], mode: Any = "fp32") -> dict[str, Any]:
    evaluator = Evaluator(Program.open(package), mode)
    spec = spec_of(evaluator.program, component)
    calls = package_inputs(spec, {name: tensor.numpy() for name, tensor in inputs.items()})
    count = max(len(tensor) for tensor in inputs.values() if tensor.ndim)
    return loop_outputs(spec, [evaluator.run(call) for call in calls], count)


def spec_of(program: Program, component: str) -> ComponentSpec:
    """What a manifest says of a package, from the package alone."""
    inputs, outputs = list(program.inputs), list(program.outputs)
    return ComponentSpec(file="package", inputs=inputs, outputs=outputs, loop=loop_spec(component, inputs, outputs))


def snr_db(found: NDArray[Any], expected: NDArray[Any]) -> float:
    assert found.shape == expected.shape
    error = np.square(found.astype(np.float64) - expected).sum()
    return float(10 * np.log10(np.square(expected.astype(np.float64)).sum() / error))


def bytes_on_disk(package: Path) -> int:
    return sum(file.stat().st_size for file in package.rglob("*") if file.is_file())


def tensors(specs: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {spec.name: (spec.dtype, tuple(spec.shape)) for spec in specs}


def test_packages_have_the_tensors_that_the_swift_package_asks_for(traced: dict[str, Traced], tmp_path: Path) -> None:
    expected = {
        "text_encoder_2": (
            {"input_ids": ("float32", (1, 20))},
            {
                "hidden_embeds": ("float16", (1, 20, 64)),
                "last_hidden_state": ("float16", (1, 20, 64)),
                "pooled_outputs": ("float16", (1, 32)),
            },
        ),
        "unet": (
            {
                "sample": ("float32", (2, 4, 8, 8)),
                "timestep": ("float32", (2,)),
                "encoder_hidden_states": ("float16", (2, 96, 1, 5)),
                "time_ids": ("float32", (2, 6)),
                "text_embeds": ("float16", (2, 64)),
            },
            {"noise_pred": ("float16", (2, 4, 8, 8))},
        ),
        "vae_decoder": ({"z": ("float16", (1, 4, 6, 10))}, {"image": ("float32", (1, 3, 6, 10))}),
    }
    files = {"text_encoder_2": "TextEncoder2", "unet": "Unet", "vae_decoder": "VAEDecoder"}
    for part, (component, graph) in traced.items():
        spec = target.lower(graph, compressed(component, graph), tmp_path)
        assert spec == target.component_spec(graph)
        assert spec.file == f"{files[part]}.mlpackage/Manifest.json"
        program = Program.open(tmp_path / package_file(part))
        assert (tensors(program.inputs), tensors(program.outputs)) == expected[part]
        assert (tensors(spec.inputs), tensors(spec.outputs)) == expected[part]
        on_disk = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
        assert set(target.package_files(spec)) <= on_disk
        assert len([path for path in on_disk if path.startswith(f"{files[part]}.")]) == 3


def test_the_loop_sees_the_tensors_of_every_other_target(traced: dict[str, Traced]) -> None:
    for component, graph in traced.values():
        spec = target.component_spec(graph)
        expected = {
            name: (str(tensor.dtype).removeprefix("torch."), ("batch", *tensor.shape[1:]) if tensor.ndim else ())
            for name, tensor in component.example_inputs.items()
        }
        assert tensors(spec.loop_inputs) == expected
        assert {output.name for output in spec.loop_outputs} <= {*component.output_names, "hidden_embeds"}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "names",
    [("fp16",), ("int8-row",), ("int4-g32", "int8-row"), ("lut4-r16", "lut6"), ("vq8-d4", "lut4"), ("vq6-d2-out",)],
    ids=lambda names: names[0],
)
def test_packages_compute_what_pytorch_does_with_the_stored_weights(
    traced: dict[str, Traced], part: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    component, graph = traced[part]
    weights = compressed(component, graph, *names)
    assert any(str(weight.format) == names[0] for weight in weights.values())
    target.lower(graph, weights, tmp_path)
    inputs = example(component, 2)
    with stored_weights(component, weights):
        expected = torch_outputs(component, inputs)
    found = package_outputs(tmp_path / package_file(part), part, inputs)
    rounded = package_outputs(tmp_path / package_file(part), part, inputs, "fp16")
    for name, value in found.items():
        assert snr_db(value, expected[name]) >= LEAST_SNR_DB, name
        assert snr_db(rounded[name], expected[name]) >= 45, name


@pytest.mark.parametrize(
    "name", ["fp16", "int8-row", "int4-row-asym", "int4-g32-asym", "lut4-r16", "vq8-d4", "avq2x8-d4"]
)
def test_packages_have_exactly_the_predicted_bytes(traced: dict[str, Traced], name: str, tmp_path: Path) -> None:
    for part, (component, graph) in traced.items():
        weights = compressed(component, graph, name, "int8-row")
        target.lower(graph, weights, tmp_path)
        formats = {layer: Scheme(weight.format) for layer, weight in weights.items()}
        on_disk = bytes_on_disk(tmp_path / package_file(part))
        assert on_disk == target.lowered_bytes(graph, formats)
        in_layers = sum(weight.nbytes for weight in weights.values())
        exact_candidates = target.fixed_bytes(graph, dict.fromkeys(formats, frozenset(formats.values()))) + in_layers
        assert on_disk <= exact_candidates
        assert exact_candidates - on_disk <= 220 * len(graph.layers) + 2500


def test_packages_carry_nothing_of_the_day_or_the_machine(traced: dict[str, Traced], tmp_path: Path) -> None:
    component, graph = traced["vae_decoder"]
    spec = target.lower(graph, compressed(component, graph), tmp_path)
    model = (tmp_path / target.package_files(spec)[1]).read_bytes()
    for word in (b"coremltools", b"torch", b"/tmp", b"turbopocket", b"date"):
        assert word not in model


@pytest.mark.parametrize("part", PARTS)
def test_every_layers_output_is_found_by_its_module_path(traced: dict[str, Traced], part: str, tmp_path: Path) -> None:
    component, graph = traced[part]
    weights = compressed(component, graph, "vq8-d4", "int8-row")
    target.lower(graph, weights, tmp_path)
    seen: dict[str, NDArray[np.float32]] = {}
    paths = [layer.path for layer in graph.layers.values()]
    hooks = [
        component.module.model.get_submodule(path).register_forward_hook(
            lambda *call, path=path: seen.update({path: call[2].numpy()})
        )
        for path in paths
    ]
    inputs = example(component, 1)
    with stored_weights(component, weights):
        torch_outputs(component, inputs)
    for hook in hooks:
        hook.remove()
    evaluator = Evaluator(Program.open(tmp_path / package_file(part)))
    given = {name: tensor.numpy() for name, tensor in inputs.items()}
    (call,) = package_inputs(spec_of(evaluator.program, part), given)
    found = evaluator.run(call, also=[layer_value(path) for path in paths])
    for path in paths:
        given_once = found[layer_value(path)][: len(seen[path])]  # a UNet's second item is the first again
        assert snr_db(given_once, seen[path]) >= 55, path


def test_every_linear_and_convolution_is_a_layer(traced: dict[str, Traced]) -> None:
    for part, (component, graph) in traced.items():
        modules = component.module.model.named_modules()
        assert set(graph.layers) == {
            f"{part}.{path}" for path, module in modules if isinstance(module, nn.Linear | nn.Conv2d)
        }


def test_only_layers_weights_are_compressed(traced: dict[str, Traced], tmp_path: Path) -> None:
    component, graph = traced["unet"]
    target.lower(graph, compressed(component, graph, "int8-row"), tmp_path)
    program = Program.open(tmp_path / "Unet.mlpackage")
    decoded = {op.name for op in program.function.operations if op.kind.startswith("constexpr_")}
    assert decoded == {f"{layer_value(layer.path)}_weight" for layer in graph.layers.values()}


def test_a_large_unet_becomes_two_packages_that_compute_the_same(traced: dict[str, Traced], tmp_path: Path) -> None:
    component, graph = traced["unet"]
    weights = compressed(component, graph, "int8-row")
    formats = {name: Scheme(weight.format) for name, weight in weights.items()}
    target.lower(graph, weights, tmp_path / "whole")
    whole_bytes = bytes_on_disk(tmp_path / "whole")
    cut = replace(graph, max_package_bytes=round(0.65 * whole_bytes))
    spec = target.lower(cut, weights, tmp_path / "cut")
    names = ["UnetChunk1.mlpackage", "UnetChunk2.mlpackage"]
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == names
    assert spec.file == "UnetChunk1.mlpackage/Manifest.json"
    assert spec.packages == names
    files = [path.relative_to(tmp_path / "cut") for path in (tmp_path / "cut").rglob("*") if path.is_file()]
    assert sorted(target.package_files(spec)) == sorted(path.as_posix() for path in files)
    sizes = [bytes_on_disk(tmp_path / "cut" / name) for name in names]
    assert sum(sizes) == target.lowered_bytes(cut, formats)
    assert sum(sizes) <= target.fixed_bytes(cut, dict.fromkeys(formats, frozenset(formats.values()))) + sum(
        weight.nbytes for weight in weights.values()
    )
    assert max(sizes) <= cut.max_package_bytes
    (call,) = package_inputs(spec, {name: tensor.numpy() for name, tensor in example(component, 1).items()})
    chunks = [Evaluator(Program.open(tmp_path / "cut" / name)) for name in names]
    assert (spec.inputs, spec.outputs) == (list(chunks[0].program.inputs), list(chunks[1].program.outputs))
    found = run_chain(chunks, call)[0]["noise_pred"]
    expected = Evaluator(Program.open(tmp_path / "whole" / "Unet.mlpackage")).run(call)["noise_pred"]
    assert snr_db(found, expected) >= LEAST_SNR_DB  # what crosses the cut is rounded to fp16


def test_chunks_that_are_still_too_large_are_refused(traced: dict[str, Traced], tmp_path: Path) -> None:
    component, graph = traced["unet"]
    weights = compressed(component, graph, "int8-row")
    cut = replace(graph, max_package_bytes=100_000)
    with pytest.raises(TurbopocketError, match=r"UnetChunk1\.mlpackage would have .* bytes, 100,000 are allowed"):
        target.lower(cut, weights, tmp_path)
    assert not list(tmp_path.iterdir())


def test_inputs_without_a_common_number_of_items_are_refused(traced: dict[str, Traced]) -> None:
    component, graph = traced["unet"]
    values = {name: tensor.numpy() for name, tensor in example(component, 2).items()}
    values["text_embeds"] = np.concatenate([values["text_embeds"], values["text_embeds"][:1]])
    with pytest.raises(TurbopocketError, match=r"sample has 2, .*text_embeds has 3"):
        package_inputs(target.component_spec(graph), values)
