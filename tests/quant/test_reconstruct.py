# SPDX-License-Identifier: Apache-2.0
"""Rounding learned block by block: it lowers what it is learned for, keeps scales, goes on where it was cut short."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from turbopocket.ground.errors import TurbopocketError
from turbopocket.ground.names import CallPlace, at_place
from turbopocket.quant.adaround import AdaptiveRounding
from turbopocket.quant.block_inputs import BlockInputs
from turbopocket.quant.fit import RECONSTRUCT
from turbopocket.quant.formats import CompressedTensor, parse_format
from turbopocket.quant.layer_rounding import Rounding
from turbopocket.quant.layers import compressible_layers
from turbopocket.quant.options import ReconstructOptions, Temporal
from turbopocket.quant.ranges import Ranges
from turbopocket.quant.reconstruct_blocks import (
    TEMPORAL,
    BlockUnit,
    FeatureUnit,
    TemporalUnit,
    errors_in,
    reconstruct_to_files,
    reconstructed_in,
)
from turbopocket.quant.scheme import parse_scheme
from turbopocket.quant.temporal import temporal_block
from turbopocket.quant.temporal_errors import TemporalCall

QUICK = ReconstructOptions(iterations=150, batch=4, learning_rate=3e-2)
TIMESTEPS = (900.0, 100.0)
PICTURES = 6


class Residual(nn.Module):
    """A block of a UNet: what it is given, and a feature of the timestep in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.time_emb_proj = nn.Linear(16, 8)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        hidden = self.conv1(x) + self.time_emb_proj(nn.functional.silu(temb))[:, :, None, None]
        return x + self.conv2(nn.functional.silu(hidden))


class Denoiser(nn.Module):
    """An embedding and two blocks that read it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(8, 16)
        self.blocks = nn.ModuleList([Residual(), Residual()])

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        frequencies = torch.arange(1.0, 9.0, device=timestep.device)
        temb = self.embed(torch.sin(timestep / 300 * frequencies)[None])
        for block in self.blocks:
            sample = block(sample, temb)
        return sample


def _latents(batch: int) -> Tensor:
    """Channels and neighbours that say much the same: of white noise there is nothing to learn, the nearest is best."""
    mixed = torch.einsum("oc,bcyx->boyx", torch.linspace(-1, 1, 16).reshape(8, 2), torch.randn(batch, 2, 2, 2))
    return mixed.repeat_interleave(2, 2).repeat_interleave(2, 3) + 0.05 * torch.randn(batch, 8, 4, 4)


class Subject:
    """The denoiser, its calls in a folder, and its layers in a format."""

    def __init__(self, folder: Path, form: str = "int4-row") -> None:
        self.model = Denoiser()
        self.layers = compressible_layers("unet", self.model)
        residual = {f"unet.blocks.{index}": block for index, block in enumerate(self.model.blocks)}
        self.blocks = {"unet.embed": self.model.embed, **residual}
        self.inputs = BlockInputs(folder / "inputs")
        self.calls = []
        torch.manual_seed(1)
        with self.inputs.recording(self.blocks, self.layers), torch.inference_mode():
            for picture in range(PICTURES):
                for step, timestep in enumerate(TIMESTEPS):
                    x = _latents(1) * (1 + step)
                    with at_place(component="unet", step=step, timestep=timestep, picture=picture):
                        self.model(x, torch.tensor(timestep))
        for step, timestep in enumerate(TIMESTEPS):
            place = CallPlace("unet", timestep, step)
            self.calls.append(TemporalCall(place, {"timestep": torch.tensor(timestep)}))
        examples = {"sample": torch.zeros(1, 8, 4, 4), "timestep": torch.tensor(1.0)}
        block = temporal_block("unet", self.model, examples, "sample", "timestep", self.model)
        self.temporal = TemporalUnit(block, self.model, self.layers, self.calls)
        self.stored = {
            name: parse_format(form).compress(layer.weight.detach(), RECONSTRUCT) for name, layer in self.layers.items()
        }

    def made(self, folder: Path, temporal: Temporal = "tiar", **how: object) -> dict[str, CompressedTensor]:
        options = ReconstructOptions(**{**QUICK.__dict__, "temporal": temporal})
        asked = self.blocks, self.temporal, self.inputs, self.stored, how.pop("roundings", {}), options, 0, folder
        reconstruct_to_files(*asked, **how)  # type: ignore[arg-type]
        return dict(reconstructed_in(folder))


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return Subject(tmp_path)


def _same(one: CompressedTensor, other: CompressedTensor) -> bool:
    return all(torch.equal(part, other.parts[name]) for name, part in one.parts.items())


@pytest.mark.parametrize("form", ["int4-row", "int8-g8", "int4-g8-asym", "int4-row-asym"])
@pytest.mark.parametrize("shape", [(6, 16), (6, 8, 3, 3)])
def test_rounding_begins_at_the_float_weight_and_at_the_nearest_codes(form: str, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    stored = parse_format(form).compress(weight, RECONSTRUCT)
    adaptive = AdaptiveRounding(weight, stored)
    nearest = stored.format.decompress(stored)
    assert ((adaptive() - weight).abs() <= (nearest - weight).abs() + 1e-5).all()
    assert ((adaptive() - weight).abs() < 1e-5).float().mean() > 0.7  # the others lie beyond the grid's ends
    assert _same(adaptive.hard(), stored)
    with torch.no_grad():
        adaptive.v_OGg.fill_(9.0)
    up = adaptive.hard()
    assert torch.allclose(up.format.decompress(up), adaptive(), atol=1e-6)
    moved = up.format.decompress(up) - nearest
    assert (moved > -1e-6).all()
    assert 0.2 < (moved > 1e-6).float().mean() < 0.8
    assert float(adaptive.undecided(2.0).detach()) == 0.0


@pytest.mark.parametrize("form", ["int4-row", "int4-g8-asym"])
def test_every_unit_gets_nearer_to_its_float_outputs(tmp_path: Path, form: str) -> None:
    subject = Subject(tmp_path, form)
    learned = subject.made(tmp_path / "out")
    assert learned.keys() == subject.layers.keys()
    errors = errors_in(tmp_path / "out")
    assert list(errors) == [TEMPORAL, "unet.blocks.0", "unet.blocks.1"]
    assert all(after < 0.8 * before for before, after in errors.values())
    assert all(before < 0.1 for before, _ in errors.values())
    for name, each in learned.items():
        codes = [one.format.unpack(one)[0].int() for one in (each, subject.stored[name])]
        assert int((codes[0] - codes[1]).abs().max()) == 1
        assert torch.equal(each.parts["scale"], subject.stored[name].parts["scale"])
    assert _relative_error(subject, learned) < 0.8 * _relative_error(subject, subject.stored)


def _relative_error(subject: Subject, stored: dict[str, CompressedTensor]) -> float:
    """Of the denoiser, on a call that nothing was learned from."""
    from turbopocket.quant.compress import decompressed

    torch.manual_seed(5)
    x, timestep = _latents(8), torch.tensor(900.0)
    with torch.no_grad():
        expected = subject.model(x, timestep)
        with decompressed({"unet": subject.model}, stored):
            found = subject.model(x, timestep)
    return float((found - expected).norm() / expected.norm())


def test_layers_of_the_temporal_block_are_learned_where_the_option_says(subject: Subject, tmp_path: Path) -> None:
    made: dict[Temporal, dict[str, CompressedTensor]] = {}
    for option in ("tiar", "inside", "frozen"):
        made[option] = subject.made(tmp_path / option, option)  # type: ignore[index]
    temporal = set(subject.temporal.block.layers)
    assert temporal == {"unet.embed", "unet.blocks.0.time_emb_proj", "unet.blocks.1.time_emb_proj"}
    assert made["frozen"].keys() == subject.layers.keys() - temporal
    assert made["inside"].keys() == made["tiar"].keys() == subject.layers.keys()
    unit = FeatureUnit(subject.temporal, torch.device("cpu"))

    def error(weights: dict[str, CompressedTensor]) -> float:
        expected = unit.run([0, 1])
        for name in temporal:
            unit.layers[name].weight.data = (weights.get(name) or subject.stored[name]).format.decompress(
                weights.get(name) or subject.stored[name]
            )
        found = unit.run([0, 1])
        for name in temporal:
            unit.layers[name].weight.data = subject.layers[name].weight.data
        return sum(float((one - other).square().sum()) for one, other in zip(expected, found, strict=True))

    errors = {option: error(weights) for option, weights in made.items()}
    # What TIAR is for: features of the block learned by itself are nearer than of one that its blocks had a say in.
    assert errors["tiar"] < 0.5 * errors["frozen"]
    assert errors["tiar"] < errors["inside"]


def test_targets_of_tiar_do_not_depend_on_latents(subject: Subject) -> None:
    """Also where latents are among what a call was made with: nothing can be learned from them."""
    calls = [
        TemporalCall(each.place, {**each.inputs, "sample": torch.full((1, 8, 4, 4), value)})
        for value in (0.0, 1e3)
        for each in subject.calls
    ]
    unit = FeatureUnit(TemporalUnit(subject.temporal.block, subject.model, subject.layers, calls), torch.device("cpu"))
    outputs = unit.run([0, 1, 2, 3])
    assert all(torch.equal(output[:2], output[2:]) for output in outputs)
    assert not any(torch.equal(output[0], output[1]) for output in outputs)


def test_activations_are_rounded_while_rounding_is_learned(subject: Subject, tmp_path: Path) -> None:
    scheme = parse_scheme("int8-row+a4-static")
    ranges = {name: Ranges((-4.0, 4.0), (-4.0, 4.0), 1.0, 1.0) for name in subject.layers}
    roundings = {name: Rounding.of(name, scheme, ranges) for name in subject.layers}
    eight = Subject(tmp_path / "eight", "int8-row")
    eight.made(tmp_path / "float", "frozen")
    eight.made(tmp_path / "rounded", "frozen", roundings=roundings)
    plain, rounded = (errors_in(tmp_path / name) for name in ("float", "rounded"))
    assert all(rounded[name][0] > 20 * plain[name][0] for name in plain)  # 4 bits of activations


def test_one_that_was_cut_short_goes_on_and_ends_with_the_same_files(subject: Subject, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = subject.made(whole)

    def advance(done: list[int] = []) -> None:  # noqa: B006
        done.append(0)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        subject.made(cut, advance=advance)
    assert len(reconstructed_in(cut)) == 5
    files = {file: file.stat().st_mtime_ns for file in cut.rglob("*") if file.is_file()}
    found = subject.made(cut)
    assert all(_same(found[name], each) for name, each in expected.items())
    assert {file.name for file in cut.rglob("*")} == {file.name for file in whole.rglob("*")}
    assert all(file.stat().st_mtime_ns == then for file, then in files.items())  # nothing was made again


def test_integers_alone_are_learned(subject: Subject, tmp_path: Path) -> None:
    other = "unet.blocks.0.conv1"
    subject.stored[other] = parse_format("fp16").compress(subject.layers[other].weight.detach(), RECONSTRUCT)
    assert subject.made(tmp_path / "out", "frozen").keys() == {"unet.blocks.0.conv2", *_convolutions(1)}


def _convolutions(block: int) -> set[str]:
    return {f"unet.blocks.{block}.conv{index}" for index in (1, 2)}


def test_calls_of_one_step_are_one_batch(subject: Subject) -> None:
    unit = BlockUnit("unet.blocks.0", subject.model.blocks[0], subject.inputs, torch.device("cpu"))
    assert [len(group) for group in unit.groups] == [PICTURES] * len(TIMESTEPS)
    assert not unit.one_by_one
    (together,) = unit.run(unit.groups[1])
    apart = torch.cat([unit.run([call])[0] for call in unit.groups[1]])
    assert torch.allclose(together, apart, atol=1e-5)


class Coupled(nn.Module):
    """A block whose items see each other: a batch of two calls is not two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x - x.mean(0))


def test_calls_that_would_see_each_other_are_made_one_by_one(tmp_path: Path) -> None:
    model, inputs = Coupled(), BlockInputs(tmp_path)
    with inputs.recording({"unet.block": model}, {"unet.block.inner": model.inner}), at_place(step=0):
        for _ in range(3):
            model(torch.randn(2, 4))
    unit = BlockUnit("unet.block", model, inputs, torch.device("cpu"))
    assert unit.one_by_one
    assert unit.run([0, 1])[0].shape == (4, 4)


@contextmanager
def _refused(sentence: str) -> Iterator[None]:
    with pytest.raises(TurbopocketError, match=sentence):
        yield


def test_options_out_of_bounds_are_refused() -> None:
    with _refused(r"reconstruct: iterations = 0: allowed are 1 to"):
        ReconstructOptions(iterations=0)
    with _refused(r"reconstruct: beta_start = 1.0: allowed are 2 to"):
        ReconstructOptions(beta_start=1.0)


def test_beta_falls_after_the_warm_up() -> None:
    options = ReconstructOptions(iterations=100, warm_up=0.2, beta_start=20.0, beta_end=2.0)
    assert [options.beta(each) for each in (0, 19, 20, 60)] == [None, None, 20.0, 11.0]


def test_an_error_that_is_not_finite_is_named(subject: Subject, tmp_path: Path) -> None:
    with torch.no_grad():
        subject.model.blocks[0].conv2.bias[0] = torch.inf
    with _refused("the error of its block is nan of weights rounded to the nearest"):
        subject.made(tmp_path / "out", "frozen")
