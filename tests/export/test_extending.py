# SPDX-License-Identifier: Apache-2.0
"""ARCHITECTURE's table of what to touch, held to it: additions that live in this file, and no other file of ours knows.

Targets, families and samplers are not here yet: their names are spelled in recipes and manifests as well.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import pytest
import torch
from torch import Tensor, nn

import turbopocket
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import make_recipe
from turbopocket.export.targets.onnx.dense import DenseConv2d, DenseLinear
from turbopocket.export.targets.onnx.stores import STORES
from turbopocket.ground.names import CallPlace
from turbopocket.quant import fit as fits
from turbopocket.quant import formats
from turbopocket.quant.fit import SOLVERS, Fit
from turbopocket.quant.formats import CompressedTensor, LayerFormat, PartSpec
from turbopocket.quant.observe import OBSERVATIONS, Observation

ARCHITECTURE = Path(__file__).parents[2] / "ARCHITECTURE.md"


@dataclass(frozen=True)
class Coarse(LayerFormat):
    """fp16 with 4 bits of mantissa: a weight format on no grid that a fit knows."""

    syntax: ClassVar[str] = "coarse"
    bits: ClassVar[int] = 16

    def __str__(self) -> str:
        return "coarse"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        return cls() if text == "coarse" else None

    @property
    def weight_bits(self) -> float:
        return 16.0

    def fits(self, shape: tuple[int, ...]) -> str | None:
        return None if shape[0] % 2 == 0 else f"{shape[0]} outputs are odd"

    def part_specs(self, shape: tuple[int, ...]) -> dict[str, PartSpec]:
        return {"weight": PartSpec(torch.float16, shape)}

    def encode(self, weight: Tensor, fit: Fit, hessian_KK: Tensor | None) -> dict[str, Tensor]:
        mantissa, exponent = torch.frexp(weight)
        return {"weight": torch.ldexp((mantissa * 32).round() / 32, exponent).half().contiguous()}

    def decode(self, compressed: CompressedTensor) -> Tensor:
        return compressed.parts["weight"].float()


class LargestInput(Observation[float]):
    """The largest input value of a layer."""

    seen: ClassVar[list[float]] = []

    def begin(self, layer: nn.Module) -> None:
        self.largest = 0.0

    def see(self, place: CallPlace, x: Tensor, y: Tensor) -> None:
        self.largest = max(self.largest, float(x.abs().max()))

    def value(self) -> float:
        self.seen.append(self.largest)
        return self.largest


def test_a_format_a_fit_and_a_statistic_are_added_in_one_file_each(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, Coarse))
    monkeypatch.setattr(fits, "FITS", (*fits.FITS, Fit("plain", SOLVERS)))
    monkeypatch.setitem(OBSERVATIONS, "largest_input", LargestInput)
    monkeypatch.setattr(LargestInput, "seen", [])
    for kind, form in (("linear", DenseLinear), ("conv2d", DenseConv2d)):
        monkeypatch.setitem(STORES.forms, (Coarse, kind), form)
    recipe = make_recipe(
        {
            "model": {"source": str(tiny_sd)},
            "sampler": {"steps": 2},
            "calibrate": {"pictures": 1},
            "parity": {"pictures": 1},
            "compress": {"formats": ["coarse", "int8-row"], "fit": "plain", "pin": {"unet.*": "coarse"}},
        },
        "test",
    )
    planned = turbopocket.plan(recipe)
    built = turbopocket.build(recipe, tmp_path / "art", progress=StageProgress(quiet=True))
    used = {choice.scheme for choice in built.plan.choices}
    assert "coarse" in used & set(planned.layers.values())
    assert len(LargestInput.seen) == len(built.plan.choices)
    assert max(LargestInput.seen) > 0
    checked = turbopocket.check(tmp_path / "art", progress=StageProgress(quiet=True))
    assert checked.failure is None
    assert turbopocket.Artifact.open(tmp_path / "art").generate("a red circle").size == (32, 32)
    assert "coarse" in built.report.read_text()


def test_every_place_that_the_table_names_is_there() -> None:
    table = ARCHITECTURE.read_text().split("## Where do I add", 1)[1]
    root, missing = ARCHITECTURE.parent, []
    named = [each for each in re.findall(r"`([^`]+)`", table) if "/" in each]
    assert len(named) > 10
    for each in named:
        missing += [] if (root / each).exists() else [each]
    assert not missing
