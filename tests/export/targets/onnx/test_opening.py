# SPDX-License-Identifier: Apache-2.0
"""What makes ONNX Runtime open a graph of codebooks in time that grows with its layers, not with their square."""

from pathlib import Path

import onnx
import onnx.inliner
import pytest
import torch
from onnx import FunctionProto, ModelProto
from torch import Tensor, nn

from turbopocket.export.families.graphs import Component, ComponentModule
from turbopocket.export.targets.onnx import program
from turbopocket.quant.formats import parse_format

from .test_bodies_by_name import CODEBOOKS, WIDTH, Part, Wrapped
from .test_lower_onnx import stored

MOST_NODES = 21
"""Of a body of two codebooks: each is one of a graph for every layer, over which dozens of passes go."""


class Rows(ComponentModule):
    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def lowered(component: Component, formats: dict[str, str], folder: Path) -> ModelProto:
    traced = program.trace(component)
    weights = {
        name: stored(parse_format(formats[layer.path.rpartition(".")[2]]), torch.randn(layer.shape))
        for name, layer in traced.layers.items()
    }
    return onnx.load(folder / program.lower(traced, weights, folder).file, load_external_data=False)


@pytest.fixture(scope="module")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> list[FunctionProto]:
    sample = {"sample": torch.zeros(2, 4, 6, 6)}
    component = Component("part", Wrapped("part", Part().eval()), sample, ("row",), role="denoiser")
    found = list(lowered(component, CODEBOOKS, tmp_path_factory.mktemp("bodies")).functions)
    assert len(found) == 6
    return found


def test_nothing_in_a_body_is_ready_before_its_input_is(bodies: list[FunctionProto]) -> None:
    """ONNX Runtime sorts the graph for each pass, and walks through all that is ready for each node that becomes so."""
    for body in bodies:
        waiting = {"x"}
        for node in body.node:
            if node.op_type != "Constant":
                assert waiting.intersection(node.input), f"{body.name}: {node.op_type} of {list(node.input)}"
                waiting.update(node.output)
        assert "y" in waiting


def test_bodies_have_few_nodes(bodies: list[FunctionProto]) -> None:
    assert max(len(body.node) for body in bodies) <= MOST_NODES


def test_no_shape_is_known_of_what_a_linear_layer_makes(tmp_path: Path) -> None:
    """ONNX Runtime's memory planner compares a tensor whose rank is known with every free one there is."""
    layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)).eval()
    component = Component("rows", Rows("rows", layers), {"x": torch.zeros(2, WIDTH)}, ("y",), role="denoiser")
    model = lowered(component, {"0": "avq2x8-d8", "1": "vq8-d4"}, tmp_path)
    inlined = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(model))
    types = [value.type.tensor_type for value in inlined.graph.value_info]
    known = [[dim.dim_value for dim in of.shape.dim] for of in types if of.HasField("shape")]
    assert len(types) > 20
    assert known
    assert all(shape in ([], [1]) for shape in known), known
