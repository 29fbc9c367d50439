# SPDX-License-Identifier: Apache-2.0
"""What a build is foreseen to take, what is refused before it starts, and what is kept to while it runs."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn

from turbopocket import Recipe, plan
from turbopocket.export.build import forecast as forecasting
from turbopocket.export.build import forecast_measuring as measuring
from turbopocket.export.build.forecast import (
    Forecast,
    StageForecast,
    drawing_works,
    forecast,
    require_disk,
    require_memory,
)
from turbopocket.export.build.forecast_rates import Rates
from turbopocket.export.build.forecast_work import ComponentWork, component_work
from turbopocket.export.build.probe import PROBE_PROMPTS
from turbopocket.export.checkpoint.load import load_shapes
from turbopocket.export.families.base import LoadedModel
from turbopocket.export.families.graphs import Component, ComponentModule
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import make_recipe
from turbopocket.export.sampling.spec import with_sampling
from turbopocket.export.targets.registry import open_target
from turbopocket.ground.errors import TurbopocketError
from turbopocket.ground.memory import PeakBytes, anonymous_bytes

RATES = Rates(1e11, 1e11, 1e10, 1e9, 1e-5)
QUICK = {"calibrate": {"pictures": 2}, "parity": {"pictures": 1}}
GB = 10**9


def foreseen(values: dict[str, object], workers: int = 1) -> Forecast:
    recipe = make_recipe(values, "test")
    model = load_shapes(recipe.model.source)
    drawn, _ = with_sampling(recipe, model)
    target = open_target(drawn.target)
    return forecast(drawn, model, target, drawing_works(drawn, model, target), workers)


def works_of_all(recipe: Recipe, model: LoadedModel) -> dict[str, ComponentWork]:
    return drawing_works(recipe, model, open_target(recipe.target))


class _Two(nn.Module):
    """Two layers that read the same, one after them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(64, 128, bias=False), nn.Linear(64, 128, bias=False)
        self.out = nn.Conv2d(128, 8, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.left(x) + self.right(x)
        return self.out(rows.transpose(1, 2).reshape(len(x), 128, 4, 4))


class _Wrapped(ComponentModule):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


def test_a_call_is_counted_without_numbers() -> None:
    module = _Wrapped("unet", _Two().to("meta"))
    work = component_work(Component("unet", module, {"x": torch.zeros(2, 16, 64)}, ("y",), role="denoiser"), {})
    layers = {layer.name: layer for layer in work.layers}
    # One picture, though the example is of two: 16 vectors of 64 numbers, and 4 x 4 of 9 x 128.
    assert work.work.flops == 2 * (2 * 16 * 64 * 128)
    assert work.work.conv_flops == 2 * 16 * 9 * 128 * 8
    assert (layers["unet.left"].vectors, layers["unet.left"].columns) == (16, 64)
    assert (layers["unet.out"].vectors, layers["unet.out"].columns) == (16, 9 * 128)
    assert layers["unet.left"].fed == layers["unet.right"].fed != layers["unet.out"].fed
    # What both layers give, and the weight of the second, which runs.
    assert work.peak_bytes == 4 * (2 * 16 * 128 + 64 * 128)
    # Both and their sum; while the second runs, what the first gave and what it gives.
    assert max(work.alive) == 4 * 3 * 16 * 128
    second = layers["unet.right"]
    assert work.alive[second.begins - 1] == 4 * 16 * 128
    assert max(work.alive[second.begins : second.ends]) == 4 * 2 * 16 * 128
    assert work.weights == 2 * 64 * 128 + 9 * 128 * 8


def test_what_fits_read_and_how_many_workers_there_are_is_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasting, "measured_rates", lambda threads: RATES)
    mse, gptq = (foreseen({**QUICK, "compress": {"fit": fit}}) for fit in ("mse", "gptq"))
    stages = {stage.name: stage for stage in gptq.stages}
    assert list(stages) == [
        *("load", "trace", "reference", "calibrate", "try formats", "probe", "measure", "compress"),
        *("lower", "compare", "self-check", "memory"),
    ]
    assert mse.scratch_bytes < gptq.scratch_bytes  # moments and what blocks were given
    assert len(stages["calibrate"].step_seconds) > 2 == sum(each > 0 for each in _calibrate(mse))
    several = foreseen({**QUICK, "compress": {"fit": "gptq"}}, workers=4)
    assert several.memory_bytes > gptq.memory_bytes + 4 * 3e8  # processes of their own
    pictures = foreseen({"calibrate": {"pictures": 32}, "compress": {"fit": "mse"}})
    assert sum(_calibrate(pictures)) == pytest.approx(16 * sum(_calibrate(mse)), rel=0.01)


def test_measuring_of_content_and_by_workers_is_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasting, "measured_rates", lambda threads: RATES)
    plain, pictures = foreseen(QUICK), foreseen({**QUICK, "compress": {"content": ["unet.*.ff.*"]}})
    assert [each.name for each in pictures.stages][6:8] == ["walk", "measure"]
    one, with_content = (_stage(each, "measure") for each in (plain, pictures))
    assert len(with_content.step_seconds) == PROBE_PROMPTS + len(one.step_seconds)
    assert with_content.seconds > 1.3 * one.seconds
    # Two workers share what takes long, and hold as much again each; what is done at once nobody shares.
    quick = _stage(foreseen(QUICK, 2), "measure")
    assert quick.step_seconds == one.step_seconds
    assert quick.memory_bytes < one.memory_bytes + 1e8  # what this process holds moves, too
    monkeypatch.setattr(measuring, "WORTH_SECONDS", 0.0)
    two, three = (_stage(foreseen(QUICK, count), "measure") for count in (2, 3))
    assert two.seconds == pytest.approx(one.seconds / 2)
    assert three.memory_bytes - two.memory_bytes > measuring.WORKER_BYTES + 4e7  # its weights in float32


def test_learned_rounding_is_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasting, "measured_rates", lambda threads: RATES)
    few, many = (
        foreseen({**QUICK, "compress": {"fit": "reconstruct"}, "reconstruct": {"iterations": count, "batch": batch}})
        for count, batch in ((100, 4), (1000, 64))
    )
    names = [stage.name for stage in few.stages]
    assert names.index("reconstruct") == names.index("compress") + 1
    one, other = (each.stages[names.index("reconstruct")] for each in (few, many))
    assert 5 * one.seconds < other.seconds
    assert one.memory_bytes < other.memory_bytes
    assert "reconstruct" not in [stage.name for stage in foreseen(QUICK).stages]


def _stage(each: Forecast, name: str) -> StageForecast:
    return next(stage for stage in each.stages if stage.name == name)


def _calibrate(each: Forecast) -> tuple[float, ...]:
    return _stage(each, "calibrate").step_seconds


def test_a_plan_says_what_a_build_takes_and_refuses_what_memory_can_not_hold() -> None:
    planned = plan(Recipe())
    told = planned.summary()["forecast"]
    assert json.loads(json.dumps(told)) == told
    assert 0.3 * GB < told["memory_bytes"] < 3 * GB
    with pytest.raises(
        TurbopocketError, match=r"this build takes .* and max_ram allows 200.00 MB: load .*, calibrate .*"
    ) as caught:
        plan(make_recipe({"machine": {"max_ram": "200MB"}}, "test"))
    assert "memory" in str(caught.value)


def test_fewer_workers_are_taken_where_more_do_not_fit(tmp_path: Path) -> None:
    one, four = (foreseen(QUICK, workers) for workers in (1, 4))
    between = (one.memory_bytes + four.memory_bytes) // 2
    recipe = make_recipe({**QUICK, "machine": {"max_ram": f"{between}B"}}, "test")
    model = load_shapes(recipe.model.source)
    drawn, _ = with_sampling(recipe, model)
    found = forecasting.foresee(drawn, model, works_of_all(drawn, model), 4, tmp_path)
    assert 1 <= found.workers < 4
    assert found.memory_bytes <= between
    with pytest.raises(TurbopocketError, match="max_ram allows"):
        require_memory(found, one.memory_bytes // 2, "max_ram allows")


def test_what_this_machine_can_not_hold_is_refused_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasting, "machine_bytes", lambda: 10**8)
    recipe = make_recipe({**QUICK}, "test")
    model = load_shapes(recipe.model.source)
    drawn, _ = with_sampling(recipe, model)
    with pytest.raises(TurbopocketError, match=r"this build takes .* of memory, and this machine has 100.00 MB: load "):
        forecasting.foresee(drawn, model, works_of_all(drawn, model), 1, tmp_path)


def test_a_disk_that_is_too_small_is_told_of_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 900))
    asked = Forecast((StageForecast("calibrate", 0, 1000, (1.0,)), StageForecast("lower", 0, 800, (1.0,))), 1)
    with pytest.raises(TurbopocketError, match=r"takes 1.00 kB of disk \(calibrate\), and .* has 900 B free"):
        require_disk(asked, tmp_path / "not yet")
    (tmp_path / "moments").write_bytes(bytes(100))  # of the same build, which was killed
    require_disk(asked, tmp_path)


def test_processes_that_are_started_count() -> None:
    code = "import sys; held = bytearray(b'x') * 200_000_000; print('there', flush=True); sys.stdin.read()"
    before = anonymous_bytes()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"there\n"
        assert 190e6 < anonymous_bytes() - before < 300e6
        assert 190e6 < anonymous_bytes(child.pid) < 300e6
        child.communicate(b"")
    assert anonymous_bytes() - before < 100e6


def test_a_process_that_was_not_made_another_yet_shows_no_memory_of_its_own() -> None:
    code = (
        "import os, sys; held = bytearray(b'x') * 200_000_000; child = os.fork()\n"
        "if child: print('there', flush=True)\n"
        "sys.stdin.read(); os._exit(0)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"there\n"
        assert 190e6 < anonymous_bytes(parent.pid) < 300e6
        parent.communicate(b"")


def test_a_stage_that_takes_more_than_is_allowed_ends_after_its_step(capsys: pytest.CaptureFixture[str]) -> None:
    held = [100]
    progress = StageProgress(peak=PeakBytes(lambda: held[0]))
    progress.hold_to(1000)
    with progress.stage("lower", 1) as advance:
        held[0] = 900
        advance()
    assert progress.stage_peak_bytes == {"lower": 900}
    done = 0
    with (
        pytest.raises(TurbopocketError, match="compare took 1.10 kB of memory, and max_ram allows 1.00 kB"),
        progress.stage("compare", 2) as advance,
    ):
        held[0] = 1100
        progress._peak.look()
        held[0] = 100
        advance()
        done = 1
    assert done == 0


METER = """
import json, sys, threading, time
from pathlib import Path

def anonymous(pid):
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        own = [int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")]
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = [each for task in tasks for each in (task / "children").read_text().split()]
        begun = [each for each in children if command(each) != command(pid)]  # else it shows its parent's memory
    except OSError:
        return 0
    return 1024 * sum(own) + sum(map(anonymous, begun))

def command(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes()

def look_on():
    while True:
        peak[0] = max(peak[0], anonymous("self"))
        time.sleep(0.02)

peak = [0]
threading.Thread(target=look_on, daemon=True).start()
from turbopocket.cli import app
app(sys.argv[1:], standalone_mode=False)
print(json.dumps({"peak": peak[0]}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_build_keeps_to_the_memory_that_it_is_given(tmp_path: Path) -> None:
    """The bundled model, native libraries and the processes that measure included; the meter is not the build's own."""
    said = ["pocket-turbo", "--set", "calibrate.pictures=2", "--set", "parity.pictures=1", "--json"]

    def run(*command: str) -> tuple[dict[str, object], dict[str, int]]:
        # Threads have arenas of their own to allocate from.
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        ran = subprocess.run([sys.executable, "-c", METER, *command], capture_output=True, text=True, env=env)
        assert ran.returncode == 0, ran.stderr
        *_, summary, measured = ran.stdout.splitlines()
        return json.loads(summary), json.loads(measured)

    planned, _ = run("plan", *said)
    foreseen: dict[str, int] = planned["forecast"]  # type: ignore[assignment]
    allowed = foreseen["memory_bytes"]
    _, measured = run("build", *said, "--out", str(tmp_path / "art"), "--max-ram", f"{round(allowed * 1.1)}B")
    assert measured["peak"] <= 1.1 * allowed
    assert 0.75 < measured["peak"] / allowed < 1.25


def test_what_may_be_taken_of_this_machine_is_not_shipped() -> None:
    recipe = make_recipe({"machine": {"max_ram": "8GB"}}, "test")
    assert recipe.machine.max_ram_bytes == 8 * GB
    assert recipe.without_places("model") == Recipe().without_places("model")
    with pytest.raises(TurbopocketError, match="max_ram '8' is not a number with a unit"):
        make_recipe({"machine": {"max_ram": "8"}}, "test")
