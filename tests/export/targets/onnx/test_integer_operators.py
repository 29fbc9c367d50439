# SPDX-License-Identifier: Apache-2.0
"""Which operators ONNX Runtime runs for layers that multiply integers, read from the graph that it made of the file."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from turbopocket.export.families.graphs import Component, ComponentModule
from turbopocket.export.targets.onnx.target import Onnx
from turbopocket.ground.names import at_place
from turbopocket.quant.calibrate import calibrate, ranges_of
from turbopocket.quant.fit import ABSMAX
from turbopocket.quant.formats import parse_format
from turbopocket.quant.scheme import parse_scheme
from turbopocket.runtimes.onnx.session import session_options

WIDTH, TEXT_WIDTH, TIME_WIDTH, SIDE = 64, 48, 48, 16
STEPS = (800.0, 400.0, 100.0)
CONVOLUTIONS, NORMS, ATTENTIONS = 3, 3, 2
BIASED = 3
"""Convolutions with a bias."""
LINEARS = 13
"""Of the time embedding, in and out, four of each attention, two of the feed-forward."""
LINEAR_INPUTS = 10
"""Queries, keys and values of self-attention have one, keys and values of cross-attention another."""
TRANSPOSED = 1
"""Inputs of a Linear that are pixels as rows: ONNX Runtime rounds before it transposes, and where scales are looked up
it can not tell that rounding once more behind it is for nothing."""
LARGEST_FLOATS = 2048
"""Elements. The largest bias has 512, with the sums of its weight's columns twice that; the least weight has 2048."""


class Level(nn.Module):
    """A residual block and a transformer block, as a level of SDXL's UNet has them."""

    def __init__(self) -> None:
        from diffusers.models.attention import BasicTransformerBlock
        from diffusers.models.resnet import ResnetBlock2D

        super().__init__()
        self.first = ResnetBlock2D(in_channels=32, out_channels=WIDTH, temb_channels=TIME_WIDTH, groups=8)
        self.norm = nn.GroupNorm(8, WIDTH)
        self.proj_in, self.proj_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.block = BasicTransformerBlock(WIDTH, 2, WIDTH // 2, cross_attention_dim=TEXT_WIDTH)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        pixels = self.first(x, time)
        rows = self.proj_in(self.norm(pixels).flatten(2).transpose(1, 2))
        rows = self.proj_out(self.block(rows, encoder_hidden_states=text))
        return rows.transpose(1, 2).unflatten(2, (SIDE, SIDE)) + pixels


class Wrapped(ComponentModule):
    def forward(self, x: Tensor, timestep: Tensor, time: Tensor, text: Tensor) -> Tensor:
        return self.model(x, time * timestep.reshape(1) / STEPS[0], text)


@cache
def level() -> Component:
    torch.manual_seed(0)
    inputs = {
        "x": torch.randn(2, 32, SIDE, SIDE),
        "timestep": torch.tensor(STEPS[0]),
        "time": torch.randn(2, TIME_WIDTH),
        "text": torch.randn(2, 7, TEXT_WIDTH),
    }
    return Component("unet", Wrapped("unet", Level().eval()), inputs, ("y",), role="denoiser")


def called_at_steps(component: Component) -> None:
    """A call at every timestep, with inputs that fall with it."""
    for timestep in STEPS:
        inputs = component.example_inputs | {"timestep": torch.tensor(timestep)}
        inputs["x"] = inputs["x"] * timestep / STEPS[0]
        with at_place(timestep=timestep):
            component.module(*inputs.values())


@dataclass(frozen=True)
class Optimized:
    """What ONNX Runtime made of a file."""

    model: onnx.ModelProto

    @property
    def kinds(self) -> Counter[str]:
        """How many nodes there are of each operator."""
        return Counter(node.op_type for node in self.model.graph.node)

    @property
    def largest_floats(self) -> int:
        """Elements of the largest floating-point initializer."""
        floats = (each for each in self.model.graph.initializer if each.data_type == onnx.TensorProto.FLOAT)
        return max(int(torch.tensor(tuple(each.dims)).prod()) for each in floats)


def optimized(folder: Path, file: str) -> Optimized:
    """The shipped file as ONNX Runtime runs it, opened as the runner opens it."""
    options = session_options(threads=1)
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
    return Optimized(onnx.load(folder / "optimized.onnx", load_external_data=False))


Lower = Callable[[str, str], Optimized]


@pytest.fixture(scope="module")
def lower(tmp_path_factory: pytest.TempPathFactory) -> Lower:
    """The level in one format and with one way of rounding activations, as optimized."""
    component = level()
    with torch.no_grad():
        stats = calibrate({"unet": component.module.model}, lambda: called_at_steps(component))
    ranges = ranges_of(stats)

    @cache
    def lowered(format: str, activations: str) -> Optimized:
        target = Onnx()
        graph = target.fitted(target.trace(component), component, ranges)
        weights = {
            name: parse_format(format).compress(component.module.get_parameter(f"{name}.weight"), ABSMAX)
            for name in graph.layers
        }
        folder = tmp_path_factory.mktemp(f"{format}-{activations}")
        rounded = {
            "static": {"conv2d": "a8-static", "linear": "a8-static+float"},
            "dynamic": {"conv2d": "a8-static", "linear": "a8-dynamic"},
            "step": {"conv2d": "a8-step", "linear": "a8-step+float"},
        }.get(activations, {})
        layers = graph.layers.items() if rounded else ()
        schemes = {name: parse_scheme(f"{format}+{rounded[layer.kind]}") for name, layer in layers}
        return optimized(folder, target.lower(graph, weights, folder, schemes).file)

    return lowered


@pytest.mark.parametrize("activations", ["static", "dynamic", "step"])
@pytest.mark.parametrize("format", ["int8-row", "int4-row"])
def test_integers_are_multiplied_and_nothing_else_of_a_layer_is_left(
    format: str, activations: str, lower: Lower
) -> None:
    found = lower(format, activations)
    kinds = found.kinds
    assert kinds["MatMulIntegerToFloat"] == LINEARS
    assert kinds["QLinearConv"] == CONVOLUTIONS
    twice = TRANSPOSED if activations == "step" else 0
    assert kinds["DequantizeLinear"] == CONVOLUTIONS + twice
    assert kinds["QuantizeLinear"] == CONVOLUTIONS + LINEAR_INPUTS + twice
    assert kinds["InstanceNormalization"] == kinds["LayerNormalization"] == NORMS
    assert kinds["MultiHeadAttention"] == ATTENTIONS
    assert kinds["ReduceMin"] == (LINEAR_INPUTS if activations == "dynamic" else 0)
    assert kinds["ReduceMax"] == kinds["ReduceMin"] + (activations == "step")  # of the timestep
    assert kinds["MatMul"] + kinds["Gemm"] + kinds["FusedMatMul"] == (LINEARS if activations == "dynamic" else 0)
    if activations == "step":  # one look-up for the whole graph, and a row of each bias
        assert kinds["ArgMin"] == 1
        assert kinds["Gather"] == 2 + BIASED
        assert kinds["Split"] == lower(format, "static").kinds["Split"] + 2
    for unwanted in ("Conv", "FusedConv", "ConvInteger", "MatMulInteger", "MatMulNBits", "Cast", "Softmax"):
        assert kinds[unwanted] == 0, unwanted
    assert found.largest_floats < LARGEST_FLOATS


def test_the_count_sees_what_is_left_in_floats(lower: Lower) -> None:
    """fp32 layers, and codes that are made dense: what the test above is to find."""
    found = lower("fp32", "float")
    assert found.kinds["MatMulIntegerToFloat"] == found.kinds["QLinearConv"] == 0
    assert found.largest_floats > LARGEST_FLOATS
    assert lower("int8-row", "float").kinds["DequantizeLinear"] == CONVOLUTIONS
    assert lower("int8-row", "float").kinds["MatMulNBits"] == LINEARS
