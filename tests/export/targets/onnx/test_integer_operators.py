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
from turbopocket.export.target_options import OnnxOptions
from turbopocket.export.targets.onnx.target import Onnx
from turbopocket.quant.calibrate import calibrate, ranges_of
from turbopocket.quant.fit import ABSMAX
from turbopocket.quant.formats import parse_format
from turbopocket.quant.scheme import parse_scheme
from turbopocket.runtimes.onnx.session import session_options

WIDTH, TEXT_WIDTH, SIDE = 64, 48, 16
CONVOLUTIONS = ("first.conv1", "first.conv2", "first.conv_shortcut")
LINEARS = 13  # time_emb_proj; of the block: 4 and 4 of the attentions, 2 of the feed-forward; in, out and one of text
LARGEST_FLOATS = 4096


class Level(nn.Module):
    """A residual block and a transformer block, as a level of SDXL's UNet has them."""

    def __init__(self) -> None:
        from diffusers.models.attention import BasicTransformerBlock
        from diffusers.models.resnet import ResnetBlock2D

        super().__init__()
        self.first = ResnetBlock2D(in_channels=32, out_channels=WIDTH, temb_channels=40, groups=8)
        self.norm = nn.GroupNorm(8, WIDTH)
        self.proj_in, self.proj_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.block = BasicTransformerBlock(WIDTH, 2, WIDTH // 2, cross_attention_dim=TEXT_WIDTH)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        pixels = self.first(x, time)
        rows = self.proj_in(self.norm(pixels).flatten(2).transpose(1, 2))
        rows = self.proj_out(self.block(rows, encoder_hidden_states=text))
        return rows.transpose(1, 2).unflatten(2, (SIDE, SIDE)) + pixels


class Wrapped(ComponentModule):
    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        return self.model(x, time, text)


@cache
def level() -> Component:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 32, SIDE, SIDE), "time": torch.randn(2, 40), "text": torch.randn(2, 7, TEXT_WIDTH)}
    return Component("unet", Wrapped("unet", Level().eval()), inputs, ("y",), role="denoiser")


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


def optimized(folder: Path, file: str, **entries: str) -> Optimized:
    """The shipped file as ONNX Runtime runs it, opened as the runner opens it."""
    options = session_options(threads=1)
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    for key, value in entries.items():
        options.add_session_config_entry(key.replace("__", "."), value)
    ort.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
    return Optimized(onnx.load(folder / "optimized.onnx"))


Lower = Callable[[str, str], Optimized]


@pytest.fixture(scope="module")
def lower(tmp_path_factory: pytest.TempPathFactory) -> Lower:
    """The level in one format and with one way of rounding activations, as optimized."""
    component = level()
    with torch.no_grad():
        stats = calibrate(
            {"unet": component.module.model}, lambda: component.module(*component.example_inputs.values())
        )
    ranges = ranges_of(stats)

    @cache
    def lowered(format: str, activations: str) -> Optimized:
        target = Onnx(OnnxOptions(activations=activations))  # type: ignore[arg-type]
        graph = target.fitted(target.trace(component), component, ranges)
        weights = {
            name: parse_format(format).compress(component.module.get_parameter(f"{name}.weight"), ABSMAX)
            for name in graph.layers
        }
        folder = tmp_path_factory.mktemp(f"{format}-{activations}")
        schemes = (
            {}
            if format == "int8-row"
            else {
                name: parse_scheme(f"{format}+a8-{'static' if layer.kind == 'conv2d' else activations}")
                for name, layer in graph.layers.items()
            }
        )
        return optimized(folder, target.lower(graph, weights, folder, schemes).file)

    return lowered


@pytest.mark.parametrize("activations", ["static", "dynamic"])
@pytest.mark.parametrize("format", ["int8-row", "int4-row"])
def test_integers_are_multiplied_and_nothing_else_of_a_layer_is_left(
    format: str, activations: str, lower: Lower
) -> None:
    found = lower(format, activations)
    kinds = found.kinds
    print(format, activations, dict(kinds), found.largest_floats)
