# SPDX-License-Identifier: Apache-2.0
"""Losses that several processes measure, or one that was stopped, are those of one that was not."""

import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant import row_losses
from turbopocket.quant.calibrate import calibrate
from turbopocket.quant.fit import MSE
from turbopocket.quant.formats import parse_format
from turbopocket.quant.layers import StoredIn, TensorSource, compressible_layers, set_source
from turbopocket.quant.row_losses import SHARED_FILE, Question, RowwiseOutput, measure
from turbopocket.quant.sensitivity import compress_candidates
from turbopocket.quant.shared import SharedWork, keep_only, share
from turbopocket.quant.workers import SharedOut

FORMATS = [parse_format(name) for name in ("fp32", "int8-row", "int4-row")]
ROWS = 5


class Watched:
    """Runs a model, and leaves a file for each run: its rows, and the process that it was in."""

    def __init__(self, model: nn.Module, x: Tensor, folder: Path) -> None:
        self.model, self.x, self.folder = model, x, folder

    def __call__(self, rows: slice) -> Tensor:
        (self.folder / f"{rows.start}-{rows.stop}-{os.getpid()}").touch()
        y: Tensor = self.model(self.x[rows].clone())
        return y

    def ran(self) -> set[tuple[int, int]]:
        """First and last rows, and processes, of runs since this was asked last: the sizing run is not told of."""
        files = list(self.folder.iterdir())
        for file in files:
            file.unlink()
        return {(int(file.name.split("-")[0]), int(file.name.split("-")[2])) for file in files}


def watched_question(denoiser: nn.Module, folder: Path) -> tuple[Question, Watched]:
    """Five rows of a model of which one layer has its weight in a checkpoint's file, in half precision."""
    folder.mkdir()
    latents = torch.randn(ROWS, 4, 8, 8)
    named = compressible_layers("unet", denoiser)
    save_file(
        {"other": torch.randn(3), "down": named["unet.down"].get_parameter("weight").detach().half()},
        folder / "m.safetensors",
    )
    stored = StoredIn(folder / "m.safetensors", "down")
    set_source(named["unet.down"], TensorSource(load_file(stored.file)["down"], stored))
    layers = {name: named[name] for name in ("unet.conv_in", "unet.down", "unet.to_out")}
    formats = dict.fromkeys(layers, FORMATS)
    stats = calibrate({"unet": denoiser}, lambda: denoiser(latents))
    candidates = dict(compress_candidates(layers, stats, formats, MSE))
    (folder / "runs").mkdir()
    run = Watched(denoiser, latents, folder / "runs")
    return Question(layers, formats, candidates, RowwiseOutput(ROWS, run, [denoiser.down])), run


@pytest.fixture
def asked(denoiser: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Question, Watched]:
    monkeypatch.setattr(row_losses, "KEPT_BYTES", 1)
    monkeypatch.setattr(row_losses, "WORTH_SECONDS", 0.0)
    return watched_question(denoiser, tmp_path / "model")


class Twins:
    """A pool whose work is done at once, with twins of what is sent."""

    def submit(self, work: Callable[[Any], Any], job: Any) -> Any:
        twin, its_job = pickle.loads(pickle.dumps((work, job)))
        return twin(its_job)

    def wait(self, under_way: list[Any]) -> list[Any]:
        return []

    def result(self, handle: Any) -> Any:
        return handle


elsewhere = SharedOut(Twins(), 1)


class Stop(Exception):
    pass


def stopped_after(rows: int) -> Callable[[], None]:
    told = iter(range(rows))

    def advance() -> None:
        if next(told) == rows - 1:
            raise Stop

    return advance


@pytest.mark.parametrize(("workers", "runs"), [(1, 5), (2, 6), (3, 5), (4, 8), (16, 15), (64, 40)])
def test_twins_measure_the_same_whatever_they_share(
    workers: int, runs: int, asked: tuple[Question, Watched], tmp_path: Path
) -> None:
    """Last rows by vectors, of which there are eight: five rows of four workers are four and a fourth for each."""
    question, _ = asked
    here = measure([question, question])
    jobs: list[Any] = []

    class Counted(Twins):
        def submit(self, work: Callable[[Any], Any], job: Any) -> Any:
            jobs.append(job)
            return super().submit(work, job)

    assert measure([question, question], spread=SharedOut(Counted(), workers), folder=tmp_path) == here
    assert here[0] == here[1]
    assert len(jobs) == 2 * runs


def test_measuring_that_was_stopped_goes_on_where_it_was(asked: tuple[Question, Watched], tmp_path: Path) -> None:
    """To the same losses, without running again what is done, also with other workers than before."""
    question, run = asked
    undisturbed = measure([question])
    run.ran()
    with pytest.raises(Stop):
        measure([question], stopped_after(3), folder=tmp_path)
    assert {first for first, _ in run.ran()} == {0, 1, 2}
    told: list[None] = []
    again = {"spread": SharedOut(Twins(), 3), "folder": tmp_path}
    assert measure([question], lambda: told.append(None), **again) == undisturbed
    assert {first for first, _ in run.ran()} - {0} == {3, 4}  # the first tells what a row takes
    assert len(told) == ROWS
    assert measure([question], folder=tmp_path) == undisturbed
    assert run.ran() == set()


def test_sums_of_other_layers_are_refused(asked: tuple[Question, Watched], tmp_path: Path) -> None:
    question, _ = asked
    measure([question], folder=tmp_path)
    few = {name: question.candidates[name] for name in ("unet.down", "unet.to_out")}
    other = Question(question.layers, few, question.stored, question.output)
    with pytest.raises(TurbopocketError, match=r"measure-0\.json: not sums of losses: its losses are of other layers"):
        measure([other], folder=tmp_path)


def test_what_is_not_worth_it_is_not_shared(
    asked: tuple[Question, Watched], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    question, _ = asked
    monkeypatch.setattr(row_losses, "WORTH_SECONDS", 1000.0)
    measure([question], spread=elsewhere, folder=tmp_path)
    assert not (tmp_path / SHARED_FILE).exists()


def test_a_twin_maps_tensors_where_they_are(asked: tuple[Question, Watched], tmp_path: Path) -> None:
    model = asked[1].model
    shared = share(model, tmp_path / "shared.bin")
    twin = pickle.loads(pickle.dumps(shared)).opened()
    assert twin is not None
    assert shared.opened() is twin  # until there is other work
    keep_only(None)
    assert shared.opened() is not twin
    assert twin.down.source.stand_in is twin.down._parameters["weight"]
    own = {name: each for name, each in model.named_parameters() if name != "down.weight"}
    for name, parameter in own.items():
        found = twin.get_parameter(name)
        assert torch.equal(found, parameter), name
        assert found.data_ptr() % 64 == 0, name
    assert torch.equal(twin.down.weight, model.down.weight)
    # What the checkpoint holds is not written again; what both map is what the file says.
    padded = sum(-(-each.nbytes // 64) * 64 for each in own.values())
    assert shared.file.nbytes <= padded + 64
    with (tmp_path / "shared.bin").open("r+b") as file:
        file.write(bytes(shared.file.nbytes))
    assert not any(twin.get_parameter(name).any() for name in own)


def test_rows_whose_files_a_worker_does_not_reach_are_measured_here(
    asked: tuple[Question, Watched], tmp_path: Path
) -> None:
    question, _ = asked
    here = measure([question])

    def far(work: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        assert isinstance(work, SharedWork)
        content = (tmp_path / SHARED_FILE).read_bytes()
        (tmp_path / SHARED_FILE).replace(tmp_path / "moved")
        (tmp_path / SHARED_FILE).write_bytes(content)  # another file in the same place
        for found in elsewhere(work, jobs):
            assert found is None
            yield found

    assert measure([question], spread=far, folder=tmp_path) == here
