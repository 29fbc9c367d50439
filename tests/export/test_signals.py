# SPDX-License-Identifier: Apache-2.0
"""Told to stop, a command clears up, says so and ends with the code that shells expect."""

import importlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from turbopocket.export.signals import REMINDING_S, Stopped, stopped_by_signals

MAIN = "from turbopocket.cli import main; main()"


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Signals end processes, however these tests were started: `nohup make test` ignores one."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_becomes_an_exception_once_and_only_in_the_block(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as raised, stopped_by_signals():
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), number)  # a terminal that closes sends it twice: clearing up goes on
    assert raised.value.signal == number
    assert signal.getsignal(number) is before


def test_what_a_library_swallows_is_raised_again() -> None:
    swallowed = []
    with pytest.raises(Stopped), stopped_by_signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Stopped as stop:
            swallowed.append(stop)
        wait_for_ever()
    assert len(swallowed) == 1


def test_what_a_library_makes_another_error_of_is_raised_as_what_it_was() -> None:
    with pytest.raises(Stopped) as raised, stopped_by_signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Stopped:
            raise ValueError("the module can not be imported") from None
    assert raised.value.signal == signal.SIGTERM


def test_an_error_without_a_signal_is_that_error() -> None:
    with pytest.raises(ValueError, match="mine"), stopped_by_signals():
        raise ValueError("mine")


def test_clearing_up_is_not_reminded() -> None:
    """Not in a block of its own, not where it meets an error, not in a generator that is closed."""
    cleared = []

    @contextmanager
    def held() -> Iterator[None]:
        try:
            yield
        finally:
            time.sleep(6 * REMINDING_S)
            cleared.append("held")

    with pytest.raises(Stopped), stopped_by_signals(), held():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            try:
                raise FileNotFoundError
            except FileNotFoundError:
                time.sleep(6 * REMINDING_S)
            cleared.append("block")
    assert cleared == ["block", "held"]


def test_after_the_block_nobody_is_reminded() -> None:
    for _ in range(20):
        with suppress(Stopped), stopped_by_signals():
            os.kill(os.getpid(), signal.SIGINT)
    time.sleep(4 * REMINDING_S)  # the handler of before would raise KeyboardInterrupt


def test_an_import_ends_before_the_command_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a library whose import was cut off the rest of the process has a half."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "stopped_in_the_middle.py").write_text(
        f"import os, time\nos.kill(os.getpid(), {int(signal.SIGTERM)})\ntime.sleep({4 * REMINDING_S})\nwhole = True\n"
    )
    with pytest.raises(Stopped), stopped_by_signals():
        with suppress(BaseException):  # as native code does that imports what it can do without
            importlib.import_module("stopped_in_the_middle")
        wait_for_ever()
    assert sys.modules["stopped_in_the_middle"].whole


def test_a_tracer_that_native_code_called_is_not_left_by_it() -> None:
    left = []

    class Traced(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *asked: Any, **options: Any) -> Any:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(4 * REMINDING_S)
            except BaseException as error:
                left.append(error)
            return super().__torch_function__(*asked, **options)

    with pytest.raises(Stopped), stopped_by_signals():
        torch.zeros(1).as_subclass(Traced) + 1
        wait_for_ever()
    assert not left


def test_a_tracer_that_never_comes_back_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbopocket.export.signals.PATIENCE_S", 4 * REMINDING_S)

    class Tracer:
        def __torch_dispatch__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for_ever()

    with pytest.raises(Stopped), stopped_by_signals():
        Tracer().__torch_dispatch__()


def wait_for_ever() -> None:
    for _ in range(600):
        time.sleep(0.1)


def test_what_the_process_was_started_to_ignore_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stopped_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_runs_as_it_is() -> None:
    done = []

    def run() -> None:
        with stopped_by_signals():
            done.append(1)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_exit_code_is_that_of_the_signal(
    number: signal.Signals, turbopocket: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbopocket.export.listings.model_rows", lambda: os.kill(os.getpid(), number))
    ran = turbopocket("models")
    assert ran.code == 128 + number
    assert ran.err.strip() == f"error: stopped by {number.name}; nothing half-written was left behind"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_build_that_is_told_to_stop_leaves_no_output_and_nobody(
    number: signal.Signals, tiny_sd: Path, tmp_path: Path
) -> None:
    recipe, out = tmp_path / "short.toml", tmp_path / "new" / "art"
    recipe.write_text("[calibrate]\npictures = 1\n[parity]\npictures = 1\n[sampler]\nsteps = 1\n")
    command = [sys.executable, "-c", MAIN, "build", tiny_sd, "--recipe", recipe, "--out", out, "--workers", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as build:
        try:
            assert build.stderr is not None
            while not re.fullmatch(r"calibrate +[\d.]+ s\n", build.stderr.readline()):
                assert build.poll() is None
            workers: list[psutil.Process] = []
            while len(workers) < 2:
                children = psutil.Process(build.pid).children()
                workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
            assert len(list(tmp_path.rglob("art"))) == 1
            if number == signal.SIGINT:
                os.killpg(build.pid, number)  # as a terminal does
            else:
                build.send_signal(number)
            said = build.stderr.read().strip().splitlines()
            assert build.wait() == 128 + number
        finally:
            build.kill()
    assert said == [f"error: stopped by {number.name}; nothing half-written was left behind"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", recipe.name]
    assert [path.name for path in out.parent.iterdir()] == ["art.run"]  # from which it would go on
    psutil.wait_procs(workers, 30)
    assert not [one for one in workers if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


STOPPED_WHILE_WORKERS_START = """
import math, multiprocessing.util, os, signal, threading, time
from turbopocket.export.signals import Stopped, stopped_by_signals
from turbopocket.quant.workers import Workers

start = multiprocessing.util.spawnv_passfds

def start_and_stop(*asked):
    child = start(*asked)
    if "resource_tracker" not in " ".join(map(str, asked[1])):
        another_thread = threading.Thread(target=os.kill, args=(os.getpid(), NUMBER))
        another_thread.start()
        another_thread.join()
    return child

def wait():
    while True:
        time.sleep(60)

if __name__ == "__main__":
    multiprocessing.util.spawnv_passfds = start_and_stop
    threading.Thread(target=wait, daemon=True).start()  # it does not block signals, and may take them
    try:
        with stopped_by_signals(), Workers(2).open() as spread:
            list(spread(math.sqrt, range(100)))
    except Stopped:
        print("stopped")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_workers_that_are_just_starting_end_without_a_word(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(STOPPED_WHILE_WORKERS_START.replace("NUMBER", str(int(number))))
    ran = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("stopped\n", "")
