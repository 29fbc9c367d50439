# SPDX-License-Identifier: Apache-2.0
"""Operators with bodies in the file, for ONNX Runtime before 1.27, which knows a body by its name alone."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto
from torch import Tensor, nn

from turbopocket.export.families.graphs import Component, ComponentModule
from turbopocket.export.target_options import OnnxOptions
from turbopocket.export.targets.onnx.target import Onnx
from turbopocket.quant.formats import parse_format
from turbopocket.runtimes.onnx.session import open_session

from .test_lower_onnx import stored

WIDTH = 32
CODEBOOKS = {  # each operator with one and two codebooks, with and without a bias
    "conv": "vq8-d4",
    "deep_conv": "avq2x8-d8",
    "bare_conv": "vq8-d4",
    "linear": "vq8-d4",
    "deep_linear": "avq2x8-d8",
    "bare_linear": "vq8-d4",
}
ROUNDED = {layer: "int8-row" if "linear" in layer else "fp16" for layer in CODEBOOKS}


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.deep_conv = nn.Conv2d(4, WIDTH, 3), nn.Conv2d(WIDTH, WIDTH, 1)
        self.bare_conv = nn.Conv2d(WIDTH, WIDTH, 1, bias=False)
        self.linear, self.deep_linear = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bare_linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.bare_conv(self.deep_conv(self.conv(x))).flatten(2).transpose(1, 2)
        return self.bare_linear(self.deep_linear(self.linear(rows)))


class Wrapped(ComponentModule):
    def forward(self, sample: Tensor) -> Tensor:
        return self.model(sample)


def as_known_by_name(model: ModelProto) -> ModelProto:
    """The model as a runtime has it that does not look at overloads: the last body of a name is everyone's."""
    bodies = {function.name: function for function in model.functions}
    del model.functions[:]
    model.functions.extend(bodies.values())
    for each in (*model.functions, *model.graph.node):
        each.ClearField("overload")
    return model


def rows_of(model: ModelProto, folder: Path) -> np.ndarray:
    sample = np.random.default_rng(1).standard_normal((2, 4, 6, 6), dtype=np.float32)
    session = open_session(model.SerializeToString(), threads=1, weights=str(folder))
    return np.asarray(session.run(None, {"sample": sample})[0])


@pytest.mark.parametrize(("activations", "formats"), [("float", CODEBOOKS), ("dynamic", ROUNDED)])
def test_files_compute_the_same_where_bodies_are_known_by_name_alone(
    activations: str, formats: dict[str, str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    part = Part().eval()
    sample = {"sample": torch.zeros(2, 4, 6, 6)}
    component = Component("part", Wrapped("part", part), sample, ("row",), role="denoiser")
    target = Onnx(OnnxOptions(activations=activations))  # type: ignore[arg-type]
    weights = {
        f"part.{layer}": stored(parse_format(format), part.get_parameter(f"{layer}.weight"))
        for layer, format in formats.items()
    }
    file = tmp_path / target.lower(target.trace(component), weights, tmp_path).file
    model = onnx.load(file, load_external_data=False)
    assert len(model.functions) > 4
    found = rows_of(model, file.parent)
    assert np.array_equal(rows_of(as_known_by_name(model), file.parent), found)
    assert np.ptp(found) > 0
