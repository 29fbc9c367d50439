# SPDX-License-Identifier: Apache-2.0
"""ARCHITECTURE's table of what to touch, held to it: additions live in this file, and no other file of ours knows."""

import ast
import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import diffusers
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from torch import Tensor, nn

import turbopocket
from turbopocket.export.families.registry import FAMILIES
from turbopocket.export.families.sd import SD
from turbopocket.export.listings import format_rows
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import make_recipe, parse_recipe
from turbopocket.export.target_options import TARGET_ENTRIES, TargetEntry
from turbopocket.export.targets.onnx.dense import DenseConv2d, DenseLinear
from turbopocket.export.targets.onnx.stores import STORES
from turbopocket.export.targets.onnx.target import Onnx
from turbopocket.export.targets.registry import TARGETS
from turbopocket.ground.names import CallPlace
from turbopocket.quant import fit as fits
from turbopocket.quant import formats, names
from turbopocket.quant.fit import SOLVERS, Fit
from turbopocket.quant.fit.hessian import Hessian
from turbopocket.quant.formats import CompressedTensor, LayerFormat, PartSpec
from turbopocket.quant.observe import OBSERVATIONS, Observation
from turbopocket.runtimes.drawing.sampler import SAMPLERS, EulerSampler
from turbopocket.runtimes.onnx.runner import OnnxRunner
from turbopocket.runtimes.open import RUNNERS
from turbopocket.runtimes.scheduler_classes import SAMPLER_KINDS, SCHEDULER_CLASSES

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

    def encode(self, weight: Tensor, fit: Fit, hessian: Hessian | None) -> dict[str, Tensor]:
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


@dataclass(frozen=True)
class ToyOptions:
    """The toy target's section of a recipe."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    loudness: int = 1


@dataclass(frozen=True)
class Toy(Onnx):
    """Files for ONNX Runtime under another name."""

    toy: ToyOptions = ToyOptions()
    name = "toy"
    runtime_names = ("toy runtime",)

    @classmethod
    def opened(cls, options: ToyOptions) -> Self:
        return cls(toy=options)

    def memory(self, folder: Path, component: str) -> None:
        """Another process measures it for ONNX, where this file is not known."""


class ToyRunner(OnnxRunner):
    """What opens its artifacts."""


class Stroll(EulerSampler):
    """Euler's sampler under another name, which counts its steps."""

    steps_made: ClassVar[int] = 0

    def step(self, *asked: Any) -> Any:
        type(self).steps_made += 1
        return super().step(*asked)


TOY_FAMILY = replace(SD, name="toy-diffusion", pipeline_class="ToyPipeline", other_pipeline_classes=())
RECIPE = {
    "sampler": {"kind": "stroll", "steps": 2, "guidance": 2.0},
    "target": {"name": "toy", "toy": {"loudness": 11}},
    "calibrate": {"pictures": 1},
    "parity": {"pictures": 1},
    "compress": {"formats": ["coarse", "int8-row"], "fit": "plain", "pin": {"unet.*": "coarse"}},
}


@pytest.fixture
def toy_folder(tiny_sd: Path, tmp_path: Path) -> str:
    """A checkpoint of the toy family."""
    folder = tmp_path / "toy-model"
    shutil.copytree(tiny_sd, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "ToyPipeline"}))
    return str(folder)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """One toy of each kind, entered where ARCHITECTURE's table says, and nowhere else."""
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, Coarse))
    monkeypatch.setattr(names, "FORMAT_NAMES", (*names.FORMAT_NAMES, Coarse))
    monkeypatch.setattr(fits, "FITS", (*fits.FITS, Fit("plain", SOLVERS)))
    monkeypatch.setattr(names, "FIT_NAMES", (*names.FIT_NAMES, "plain"))
    monkeypatch.setitem(OBSERVATIONS, "largest_input", LargestInput)
    monkeypatch.setattr(LargestInput, "seen", [])
    for kind, form in (("linear", DenseLinear), ("conv2d", DenseConv2d)):
        monkeypatch.setitem(STORES.forms, (Coarse, kind), form)
    monkeypatch.setitem(TARGET_ENTRIES, "toy", TargetEntry("The Toy Runtime", ToyOptions))
    monkeypatch.setitem(TARGETS, "toy", Toy)
    monkeypatch.setitem(RUNNERS, "toy", ToyRunner)
    monkeypatch.setitem(FAMILIES, TOY_FAMILY.name, TOY_FAMILY)
    monkeypatch.setitem(SAMPLER_KINDS, "stroll", SAMPLER_KINDS["euler"])
    monkeypatch.setitem(SAMPLERS, "stroll", Stroll)
    own = SCHEDULER_CLASSES["EulerDiscreteScheduler"]
    monkeypatch.setitem(SCHEDULER_CLASSES, "ToyScheduler", replace(own, kind="stroll"))
    monkeypatch.setattr(Stroll, "steps_made", 0)
    for name, of in (("ToyPipeline", StableDiffusionPipeline), ("ToyScheduler", EulerDiscreteScheduler)):
        monkeypatch.setattr(diffusers, name, type(name, (of,), {"__module__": of.__module__}), raising=False)


@pytest.mark.usefixtures("registered")
def test_one_of_each_kind_is_added_in_one_file(toy_folder: str, tmp_path: Path) -> None:
    recipe = make_recipe(RECIPE | {"model": {"source": toy_folder}}, "test")
    assert recipe.target.options == ToyOptions(loudness=11)
    assert parse_recipe(recipe.to_toml(), "printed") == recipe
    planned = turbopocket.plan(recipe)
    built = turbopocket.build(recipe, tmp_path / "art", progress=StageProgress(quiet=True))
    used = {choice.scheme for choice in built.plan.choices}
    assert "coarse" in used & set(planned.layers.values())
    assert len(LargestInput.seen) == len(built.plan.choices)
    assert max(LargestInput.seen) > 0
    assert set(built.gaps.lowering) == {"toy runtime"}
    checked = turbopocket.check(tmp_path / "art", progress=StageProgress(quiet=True))
    assert checked.failure is None
    made = Stroll.steps_made
    artifact = turbopocket.Artifact.open(tmp_path / "art")
    assert artifact.generate("a red circle").size == (32, 32)
    assert Stroll.steps_made == made + 2
    manifest = artifact.manifest
    assert (manifest.target, manifest.family, manifest.sampler.kind) == ("toy", "toy-diffusion", "stroll")
    page = built.report.read_text()
    assert all(word in page for word in ("coarse", "The Toy Runtime"))


@pytest.mark.usefixtures("registered")
def test_listings_and_refusals_know_what_was_added() -> None:
    assert "toy" in {row["target"] for row in format_rows()}
    for wanted, known in (
        ({"target": {"name": "nothing"}}, "known are .*toy"),
        ({"target": {"tyo": {}}}, r"unknown key `tyo` in \[target\]: known are .*`toy`"),
        ({"target": {"toy": {"loud": 1}}}, r"unknown key `loud` in \[target.toy\]: known are `loudness`"),
        ({"target": {"toy": {"loudness": "very"}}}, "target.toy.loudness = 'very': input should be a valid integer"),
        ({"sampler": {"kind": "nothing"}}, "known are .*stroll"),
        ({"target": {"name": "toy"}, "image": {"sizes": ["32x32", "64x32"]}}, "toy takes one size in an artifact"),
    ):
        with pytest.raises(turbopocket.TurbopocketError, match=known):
            make_recipe(wanted, "test")


OWN = ("export/target_options.py", "export/targets/", "export/families/", "runtimes/open.py", "runtimes/executorch/")
OWN += ("runtimes/scheduler_classes.py", "runtimes/drawing/sampler.py")
CHOICES = {
    "export/recipe.py": "the default target",
    "export/distill/teacher.py": "the sampler that TDM's walk is",
    "export/sampling/defaults.py": "the sampler that LCMs were made for",
    "runtimes/upgrade.py": "what manifests of schema 1 could hold",
    "runtimes/arm64/setup.py": "a package of that name",
}


def test_no_other_file_tells_targets_families_and_samplers_by_name() -> None:
    names = {*TARGETS, *FAMILIES, *SAMPLER_KINDS}
    root, found = ARCHITECTURE.parent, set()
    for top in ("api", "export", "quant", "runtimes", "ground"):
        for file in sorted((root / top).rglob("*.py")):
            path = file.relative_to(root).as_posix()
            constants = (each.value for each in ast.walk(ast.parse(file.read_text())) if isinstance(each, ast.Constant))
            if not path.startswith(OWN) and any(isinstance(value, str) and value in names for value in constants):
                found.add(path)
    assert found == set(CHOICES)


def test_every_place_that_the_table_names_is_there() -> None:
    table = ARCHITECTURE.read_text().split("## Where do I add", 1)[1]
    root, missing = ARCHITECTURE.parent, []
    named = [each for each in re.findall(r"`([^`]+)`", table) if "/" in each]
    assert len(named) > 10
    for each in named:
        missing += [] if (root / each).exists() else [each]
    assert not missing
