# SPDX-License-Identifier: Apache-2.0
"""What `export.lower.onnx` writes computes what PyTorch computes, has the predicted size and the promised names."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from turbopocket.export.families.graphs import (
    Component,
    ComponentModule,
    text_encoder_component,
    unet_component,
    vae_decoder_component,
)
from turbopocket.export.targets.onnx import program as target
from turbopocket.export.targets.onnx.target import Onnx
from turbopocket.quant.fit import ABSMAX
from turbopocket.quant.fit.universal import universal_codebooks
from turbopocket.quant.formats import Additive, Codebook, CompressedTensor, LayerFormat, parse_format
from turbopocket.quant.scheme import Scheme, parse_scheme

FORMATS = ("fp16", "int4-row-asym", "int4-g32", "avq2x8-d8-shared")
MOST_ERROR = 2e-5
"""Relative; single precision in another order of summation gives about 1e-6, one wrong code about 1e-2."""


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
        eos_token_id=2,
    )
    return CLIPTextModelWithProjection(config)


Traced = tuple[Component, target.TracedGraph]


@pytest.fixture(scope="module")
def traced() -> dict[str, Traced]:
    torch.manual_seed(0)
    components = (
        text_encoder_component(small_text_encoder().eval(), "text_encoder_2"),
        unet_component(small_unet().eval(), text_tokens=5),
        vae_decoder_component(small_vae().eval(), latent_size=(6, 10)),
    )
    return {component.name: (component, target.trace(component)) for component in components}


def first_storable(names: tuple[str, ...], kind: str, shape: tuple[int, ...]) -> LayerFormat:
    return next(f for f in map(parse_format, names) if Onnx().storable(Scheme(f), kind, shape) is None)


def compressed(component: Component, graph: target.TracedGraph, *names: str) -> dict[str, CompressedTensor]:
    """Every layer in the first format of `names` that fits it, else in fp32."""
    return {
        name: stored(
            first_storable((*names, "fp32"), layer.kind, layer.shape),
            component.module.get_parameter(f"{name}.weight"),
        )
        for name, layer in graph.layers.items()
    }


def stored(format: LayerFormat, weight: Tensor) -> CompressedTensor:
    """The weight in that format; in a codebook format random vectors of its size, for k-means would take minutes."""
    if not isinstance(format, Codebook | Additive):
        return format.compress(weight, ABSMAX)
    shape, size = tuple(weight.shape), float(weight.detach().std())
    parts = {
        part: torch.randint(0, 256, spec.shape, dtype=torch.uint8)
        if spec.dtype == torch.uint8
        else (torch.rand(spec.shape) * size if part == "scale" else torch.randn(spec.shape)).to(spec.dtype)
        for part, spec in format.part_specs(shape).items()
    }
    if isinstance(format, Additive) and format.shared:
        parts["codebooks"] = universal_codebooks(format.length)[: format.count]
    return CompressedTensor(format, shape, parts)


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
    generator = torch.Generator().manual_seed(batch)
    shapes = {name: (batch, *t.shape[1:]) if t.ndim else () for name, t in component.example_inputs.items()}
    return {
        name: torch.randint(0, 64, shapes[name], generator=generator)
        if tensor.dtype == torch.int64
        else torch.randn(shapes[name], generator=generator)
        for name, tensor in component.example_inputs.items()
    }


def torch_outputs(component: Component, inputs: Mapping[str, Tensor]) -> list[NDArray[np.float32]]:
    with torch.inference_mode():
        outputs = component.module(*inputs.values())
    return [output.numpy() for output in ((outputs,) if isinstance(outputs, Tensor) else outputs)]


def onnx_outputs(
    model: Path | bytes, inputs: Mapping[str, Tensor], names: list[str], folder: Path | None = None
) -> list[NDArray[np.float32]]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})


def relative_error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("part", "name"),
    [*((part, name) for part in ("unet", "vae_decoder") for name in FORMATS), ("text_encoder_2", "int4-g32")],
)
def test_a_lowered_component_computes_what_pytorch_does_with_the_stored_weights(
    traced: dict[str, Traced], part: str, name: str, tmp_path: Path
) -> None:
    component, graph = traced[part]
    weights = compressed(component, graph, name, "int8-row")
    assert any(str(weight.format) == name for weight in weights.values())
    spec = target.lower(graph, weights, tmp_path)
    outputs = [output.name for output in spec.outputs]
    with stored_weights(component, weights):
        for batch in (1, 3):
            inputs = example(component, batch)
            expected = torch_outputs(component, inputs)
            found = onnx_outputs(tmp_path / spec.file, inputs, outputs)
            errors = [relative_error(*pair) for pair in zip(found, expected, strict=True)]
            assert max(errors) <= MOST_ERROR


@pytest.mark.parametrize("name", ["fp16", "int8-row", "int4-g32", "int4-row-asym", "avq2x8-d4", "avq4x8-d2"])
def test_files_have_exactly_the_predicted_bytes(traced: dict[str, Traced], name: str, tmp_path: Path) -> None:
    for component, graph in traced.values():
        weights = compressed(component, graph, name, "int8-row")
        target.lower(graph, weights, tmp_path)
        on_disk = sum(file.stat().st_size for file in (tmp_path / component.name).iterdir())
        formats = {layer: Scheme(weight.format) for layer, weight in weights.items()}
        assert on_disk == target.lowered_bytes(graph, formats)
        in_layers = sum(weight.nbytes for weight in weights.values())
        exact_candidates = target.fixed_bytes(graph, dict.fromkeys(formats, frozenset(formats.values()))) + in_layers
        assert on_disk <= exact_candidates <= 1.01 * on_disk


def test_shared_codebooks_are_no_layers_overhead(traced: dict[str, Traced]) -> None:
    _, graph = traced["unet"]
    names = "avq2x8-d8-shared", "avq2x8-d8"
    shared, own = (target.fixed_bytes(graph, dict.fromkeys(graph.layers, (parse_scheme(name),))) for name in names)
    assert shared <= own <= shared + 300 * len(graph.layers)  # codebooks have 8,192 bytes, their entry a few


def test_a_file_holds_one_body_per_operator_and_number_of_codebooks(traced: dict[str, Traced], tmp_path: Path) -> None:
    component, graph = traced["vae_decoder"]
    target.lower(graph, compressed(component, graph, "avq2x8-d8", "vq8-d4"), tmp_path)
    model = onnx.load(tmp_path / "vae_decoder" / "model.onnx", load_external_data=False)
    called = {node.op_type for node in model.graph.node if node.domain == "turbopocket"}
    assert called == {function.name for function in model.functions}
    assert len(model.functions) == len(called)
    assert called == {"CodebookLinear2Biased", "CodebookConv2d1Biased", "CodebookConv2d2Biased"}


def test_shared_codebooks_are_in_the_file_once_and_their_bytes_are_planned(
    traced: dict[str, Traced], tmp_path: Path
) -> None:
    component, graph = traced["unet"]
    weights = compressed(component, graph, "avq2x8-d8-shared", "int8-row")
    sharing = [name for name, weight in weights.items() if weight.format.shared_parts]
    assert len(sharing) > 5
    target.lower(graph, weights, tmp_path)
    formats = {layer: Scheme(weight.format) for layer, weight in weights.items()}
    on_disk = sum(file.stat().st_size for file in (tmp_path / "unet").iterdir())
    assert on_disk == target.lowered_bytes(graph, formats)
    own = parse_scheme("avq2x8-d8")
    apart = {name: own if scheme.weight.shared_parts else scheme for name, scheme in formats.items()}
    codebooks = 2 * 256 * 8 * 2
    assert target.lowered_bytes(graph, apart) - on_disk > (len(sharing) - 1) * codebooks
    assert own.nbytes((64, 64)) - parse_format("avq2x8-d8-shared").nbytes((64, 64)) == codebooks


@pytest.mark.parametrize("name", ["int8-row", "fp16", "avq2x8-d4"])
def test_every_layers_output_is_found_by_its_module_path(traced: dict[str, Traced], name: str, tmp_path: Path) -> None:
    component, graph = traced["unet"]
    weights = compressed(component, graph, name)
    target.lower(graph, weights, tmp_path)
    seen: dict[str, NDArray[np.float32]] = {}
    model = component.module.model
    paths = {layer.path for layer in graph.layers.values()} | {"conv_norm_out", "mid_block.resnets.0.norm1"}
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda *call, path=path: seen.update({path: call[2].numpy()}))
        for path in paths
    ]
    inputs = example(component, 2)
    with stored_weights(component, weights):
        torch_outputs(component, inputs)
    for hook in hooks:
        hook.remove()
    lowered = onnx.load(tmp_path / "unet" / "model.onnx", load_external_data=False)
    assert {node.name for node in lowered.graph.node} >= paths
    lowered.graph.output.extend(onnx.ValueInfoProto(name=path) for path in seen)
    found = onnx_outputs(lowered.SerializeToString(), inputs, list(seen), folder=tmp_path / "unet")
    for path, value in zip(seen, found, strict=True):
        assert relative_error(value, seen[path]) <= MOST_ERROR, path


def test_equal_parameters_stay_apart(traced: dict[str, Traced]) -> None:
    component, graph = traced["unet"]
    norms = [n for n, _ in component.module.model.named_parameters() if "norm" in n]
    assert norms  # all ones or zeros in a fresh model
    assert set(norms) <= set(graph.rest)


def test_graphs_carry_no_notes_of_the_exporter(traced: dict[str, Traced]) -> None:
    for _, graph in traced.values():
        found = graph.skeleton.graph
        notes = [*found.metadata_props, *(note for node in found.node for note in node.metadata_props)]
        assert not notes
        assert not any(node.doc_string for node in found.node)
        assert found.ByteSize() < 250 * len(found.node)


def test_values_that_fp16_holds_exactly_are_stored_in_fp16(tmp_path: Path) -> None:
    torch.manual_seed(2)
    component = text_encoder_component(small_text_encoder().half().float().eval())
    graph = target.trace(component)
    weights = compressed(component, graph, "int8-row")
    target.lower(graph, weights, tmp_path)
    path = tmp_path / "text_encoder" / "model.onnx"
    stored = {i.name: i.data_type for i in onnx.load(path, load_external_data=False).graph.initializer}
    table = "text_model.embeddings.token_embedding.weight"
    assert stored[f"{table}.fp16"] == onnx.TensorProto.FLOAT16
    assert table not in stored
    inputs = example(component, 2)
    with stored_weights(component, weights):
        expected = torch_outputs(component, inputs)
    found = onnx_outputs(path, inputs, list(component.output_names))
    assert max(relative_error(*pair) for pair in zip(found, expected, strict=True)) <= MOST_ERROR


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Wrapped(ComponentModule):
    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def test_a_layer_that_runs_twice_is_stored_once(tmp_path: Path) -> None:
    component = Component("unet", Wrapped("unet", _Twice()), {"x": torch.zeros(2, 32)}, ("y",), role="denoiser")
    graph = target.trace(component)
    weights = compressed(component, graph, "int8-row")
    assert list(weights) == ["unet.layer"]
    spec = target.lower(graph, weights, tmp_path)
    inputs = example(component, 4)
    with stored_weights(component, weights):
        expected = torch_outputs(component, inputs)
    assert relative_error(onnx_outputs(tmp_path / spec.file, inputs, ["y"])[0], expected[0]) <= MOST_ERROR
    assert (tmp_path / "unet" / "model.onnx.data").stat().st_size < 1.3 * 32 * 32


class _Factors(nn.Module):
    """Products with the number 1 and with tensors of ones, of which only the first changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.register_buffer("ones", torch.ones(1, 1))
        self.register_buffer("nearly", torch.tensor(1.000005))

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.layer(x / 1.0) / 1.0, t * self.ones + 0.5, x * self.nearly - x


class _WrappedFactors(ComponentModule):
    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.model(x, t)


def test_only_factors_that_change_nothing_are_dropped(tmp_path: Path) -> None:
    inputs = {"x": torch.zeros(2, 32), "t": torch.tensor(3.0)}
    component = Component("unet", _WrappedFactors("unet", _Factors()), inputs, ("y", "row", "rest"), role="denoiser")
    graph = target.trace(component)
    spec = target.lower(graph, compressed(component, graph, "fp32"), tmp_path)
    kinds = [node.op_type for node in onnx.load(tmp_path / spec.file, load_external_data=False).graph.node]
    assert (kinds.count("Mul"), kinds.count("Div")) == (2, 1)  # an output has to come from somewhere
    given = example(component, 2)
    found = onnx_outputs(tmp_path / spec.file, given, ["y", "row", "rest"])
    for value, expected in zip(found, torch_outputs(component, given), strict=True):
        assert relative_error(value, expected) <= MOST_ERROR


def test_a_graph_is_traced_without_weights() -> None:
    with torch.device("meta"):
        component = vae_decoder_component(small_vae().eval(), latent_size=(6, 10))
    graph = target.trace(component)
    with_weights = vae_decoder_component(small_vae().eval(), latent_size=(6, 10))
    assert graph.skeleton == target.trace(with_weights).skeleton


@pytest.mark.parametrize("name", ["fp16", "int8-row", "int4-g32", "avq2x8-d4"])
def test_a_session_takes_what_the_manifest_says_and_warns_of_nothing(
    traced: dict[str, Traced], name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """At the level of ONNX Runtime's warnings, which is the default of every app."""
    component, graph = traced["unet"]
    spec = target.lower(graph, compressed(component, graph, name), tmp_path)
    session = ort.InferenceSession(tmp_path / spec.file, ort.SessionOptions(), providers=["CPUExecutionProvider"])
    assert not session.get_overridable_initializers()
    assert [each.name for each in session.get_inputs()] == [each.name for each in spec.inputs]
    assert capfd.readouterr().err == ""


def test_fp16_weights_are_not_made_dense_when_the_graph_is_opened(traced: dict[str, Traced], tmp_path: Path) -> None:
    component, graph = traced["unet"]
    spec = target.lower(graph, compressed(component, graph, "fp16"), tmp_path)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "opened.onnx")
    ort.InferenceSession(tmp_path / spec.file, options, providers=["CPUExecutionProvider"])
    opened = onnx.load(tmp_path / "opened.onnx", load_external_data=False).graph
    kept = {each.name for each in opened.initializer if each.data_type == onnx.TensorProto.FLOAT16}
    assert {f"{layer.path}.weight16" for layer in graph.layers.values()} <= kept
