# SPDX-License-Identifier: Apache-2.0
"""What stages made is used again: after kills, for another budget, another target, another place; never for another
model."""

import json
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from turbopocket.export.build import build as module
from turbopocket.export.build import calibration, journal, measuring
from turbopocket.export.build.bench import Workbench
from turbopocket.export.build.build import build, make_stage
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import Recipe, make_recipe
from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant import compress
from turbopocket.quant.workers import Spread
from turbopocket.runtimes.manifest import load_manifest


@pytest.fixture
def values(recipe_values: dict[str, Any], tiny_sd: Path) -> dict[str, Any]:
    return {**recipe_values, "model": {"source": str(tiny_sd)}, "compress": {"formats": ["int4-g32", "fp16"]}}


@pytest.fixture
def recipe(values: dict[str, Any]) -> Recipe:
    return make_recipe(values, "test")


@pytest.fixture(scope="module")
def benches() -> dict[str, Workbench]:
    """What builds of this file loaded and traced, by recipe: most of the time of so short ones, and never kept."""
    return {}


@pytest.fixture(autouse=True)
def traced_once(benches: dict[str, Workbench], monkeypatch: pytest.MonkeyPatch) -> None:
    honest = module.make_workbench

    def make(recipe: Recipe, assumed: Sequence[str], progress: StageProgress, spread: Spread) -> Workbench:
        unbounded = recipe.compress.model_copy(update={"budget": None})
        key = recipe.model_copy(update={"compress": unbounded}).to_toml()
        if key not in benches:
            benches[key] = honest(recipe, assumed, progress, spread)
        asked = benches[key].recipe.model_copy(update={"compress": recipe.compress})
        return replace(benches[key], recipe=asked, progress=progress, spread=spread)

    monkeypatch.setattr(module, "make_workbench", make)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each costly thing was done, not taken from the journal; and of layers, how many were fitted."""
    counted = Counter[str]()

    def counting(place: Any, name: str) -> None:
        honest = getattr(place, name)

        def call(*arguments: Any, **named: Any) -> Any:
            counted[name] += 1
            return honest(*arguments, **named)

        monkeypatch.setattr(place, name, call)

    counting(module, "compare_with_diffusers")
    counting(calibration, "calibrate_to_files")
    counting(measuring, "make_probe")
    counting(compress, "save_weights")
    return counted


class Said(StageProgress):
    """Keeps what it is told to say."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def remark(self, text: str) -> None:
        self.lines.append(text)


def built(recipe: Recipe, out: Path, **how: Any) -> dict[str, str]:
    """Files of a build, and their hashes."""
    made = build(recipe, out, progress=how.pop("progress", StageProgress(quiet=True)), **how)
    return {each.path: each.sha256 for each in load_manifest(made.folder).files}


def staged(recipe: Recipe, out: Path, last: Any, **how: Any) -> Path:
    return make_stage(recipe, out, last, StageProgress(quiet=True), **how)


def with_budget(values: dict[str, Any], budget: str) -> Recipe:
    return make_recipe({**values, "compress": {**values["compress"], "budget": budget}}, "test")


def test_each_stage_is_done_once_whatever_command_needs_it(recipe: Recipe, tmp_path: Path, done: Counter[str]) -> None:
    whole = built(recipe, tmp_path / "whole", keep=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole", "whole.report"]
    expected = Counter(done)
    for last in ("calibrate", "measure", "compress", "lower", "lower"):
        assert staged(recipe, tmp_path / "art", last) == tmp_path / "art.run"
        assert not (tmp_path / "art").exists()
    assert built(recipe, tmp_path / "art") == whole
    assert done == expected + expected
    assert done["calibrate_to_files"] == 2


def test_another_budget_makes_the_layers_whose_format_changes(
    values: dict[str, Any], tmp_path: Path, done: Counter[str]
) -> None:
    run = staged(with_budget(values, "3MB"), tmp_path / "art", "compress")
    before = Counter(done)
    files = {path.name: path.stat().st_mtime_ns for path in run.glob("compress-*/*@*")}
    staged(with_budget(values, "1.3MB"), tmp_path / "art", "compress")
    after = {path.name: path.stat().st_mtime_ns for path in run.glob("compress-*/*@*")}
    new = set(after) - set(files)
    assert new
    assert files.items() <= after.items()
    assert done - before == Counter(save_weights=len(new))
    assert len(new) < len(files)


def test_another_target_in_another_folder_draws_nothing_for_calibration_again(
    values: dict[str, Any], tmp_path: Path, done: Counter[str]
) -> None:
    staged(make_recipe({**values, "compress": {"formats": ["int8-row"]}}, "test"), tmp_path / "one", "measure")
    before = Counter(done)
    other = {**values, "compress": {"formats": ["int8-row"]}, "target": {"name": "executorch"}}
    staged(make_recipe(other, "test"), tmp_path / "two", "measure", run=tmp_path / "one.run")
    assert not (done - before) - Counter(make_probe=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.run"]


def test_a_journal_that_was_moved_with_its_model_goes_on(
    values: dict[str, Any], tiny_sd: Path, tmp_path: Path, done: Counter[str]
) -> None:
    moved = shutil.copytree(tiny_sd, tmp_path / "elsewhere" / "model")
    whole = built(make_recipe(values, "test"), tmp_path / "whole", keep=True)
    run = (tmp_path / "whole.run").rename(tmp_path / "elsewhere" / "art.run")
    done.clear()
    there = make_recipe({**values, "model": {"source": str(moved)}}, "test")
    assert built(there, run.with_name("art")) == whole
    assert not done


def test_a_model_that_has_changed_is_measured_anew_and_said_once(
    values: dict[str, Any], tiny_sd: Path, tmp_path: Path, done: Counter[str], benches: dict[str, Workbench]
) -> None:
    model = shutil.copytree(tiny_sd, tmp_path / "model")
    asked = make_recipe({**values, "model": {"source": str(model)}}, "test")
    before = built(asked, tmp_path / "before", keep=True)
    file = next((model / "unet").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["conv_in.weight"] *= 1.01
    save_file(tensors, file, metadata={"format": "pt"})
    benches.clear()
    done.clear()
    said = Said()
    after = built(asked, tmp_path / "after", progress=said, run=tmp_path / "before.run", keep=True)
    assert sum("not used" in line for line in said.lines) == 1
    assert done["calibrate_to_files"] == 1
    assert after != before
    assert after == built(asked, tmp_path / "fresh")
    told = [json.loads(path.read_text())["model"] for path in (tmp_path / "before.run").glob("*/key.json")]
    assert len(set(told)) == 1  # what nobody can use any more is gone


@contextmanager
def small_files(nbytes: int) -> Iterator[None]:
    """While the block runs, no file grows over so many bytes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("nbytes", [100, 3_000, 100_000])
def test_a_full_disk_is_said_in_one_sentence_and_nothing_is_lost(nbytes: int, recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "art"
    staged(recipe, out, "calibrate")
    kept = {path: path.read_bytes() for path in (tmp_path / "art.run").rglob("*") if path.is_file()}
    with pytest.raises(TurbopocketError, match="can not write"), small_files(nbytes):
        staged(recipe, out, "lower")
    assert {path: path.read_bytes() for path in kept} == kept
    assert not [path for path in (tmp_path / "art.run").rglob("*.partial") if path.is_file()]
    staged(recipe, out, "lower")


def test_two_builds_do_not_work_in_one_folder(tmp_path: Path) -> None:
    quiet = StageProgress(quiet=True)
    with (
        journal.opened(tmp_path / "art.run", True, quiet),
        pytest.raises(TurbopocketError, match=r"art\.run is in use by another build"),
        journal.opened(tmp_path / "art.run", True, quiet),
    ):
        pass
    with journal.opened(tmp_path / "art.run", True, quiet) as held:
        with pytest.raises(TurbopocketError), journal.opened(held.path, True, quiet):
            pass
        assert held.path.is_dir()  # the one who is refused takes nothing away
    assert not (tmp_path / "art.run").exists()


@pytest.mark.parametrize(
    ("keep", "limit", "stays", "said"),
    [
        (None, 10, False, "were removed; --keep keeps them"),
        (None, 10**9, True, "`turbopocket clean` removes it"),
        (True, 10, True, None),
        (False, 10**9, False, None),
    ],
)
def test_what_a_finished_build_leaves_is_said(
    keep: bool | None, limit: int, stays: bool, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "KEPT_BYTES", limit)
    told, run = Said(), tmp_path / "art.run"
    with journal.opened(run, keep, told):
        made = journal.Journal(run, "a model").product("measure", {"a": 1}, lambda folder: _put(folder, 30))
        assert made.name.startswith("measure-")
    assert run.exists() == stays
    assert [said in line for line in told.lines] == ([] if said is None else [True])


def _put(folder: Path, count: int) -> None:
    (folder / "choices.json").write_text("x" * count)


def test_clean_removes_what_builds_left_and_nothing_else(tmp_path: Path, turbopocket: Callable[..., Any]) -> None:
    run = tmp_path / "art.run"
    journal.Journal(run, "a model").product("measure", {"a": 1}, lambda folder: _put(folder, 30))
    (run / "thesis.txt").write_text("precious")
    ran = turbopocket("clean", tmp_path / "art", "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["freed_bytes"] > 30
    assert [path.name for path in run.iterdir()] == ["thesis.txt"]
    assert json.loads(turbopocket("clean", tmp_path / "none", "--json").out)["freed_bytes"] == 0


def test_clearing_up_needs_no_pytorch(tmp_path: Path) -> None:
    journal.Journal(tmp_path / "art.run", "a model").product("measure", {}, lambda folder: _put(folder, 30))
    code = "import sys; sys.modules['torch'] = None; from turbopocket.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "clean", tmp_path / "art"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_product_is_made_of_all_its_inputs_and_half_of_one_is_none(tmp_path: Path) -> None:
    one, other = journal.Journal(tmp_path, "a model"), journal.Journal(tmp_path, "another")
    keys = {one.key("measure", {"a": 1}), one.key("measure", {"a": 2}), one.key("lower", {"a": 1})}
    assert len(keys | {other.key("measure", {"a": 1})}) == 4
    with pytest.raises(ZeroDivisionError):
        one.product("measure", {}, lambda folder: 1 / 0)
    assert one.product("measure", {}, lambda folder: _put(folder, 3)).joinpath("choices.json").is_file()
    one.product("measure", {}, lambda folder: pytest.fail("made again"))
    assert other.unusable() == sorted(tmp_path.iterdir())
    assert one.unusable() == []
