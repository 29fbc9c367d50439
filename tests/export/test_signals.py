# SPDX-License-Identifier: Apache-2.0
"""Told to stop, a command clears up, says so and ends with the code that shells expect."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from turbopocket.export.signals import Stopped, stopped_by_signals

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


def test_a_second_signal_is_heard_when_the_first_came_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbopocket.export.signals.CLEARING_UP_S", 0.0)
    heard = []
    with stopped_by_signals():
        for _ in range(2):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except Stopped as stop:  # as a library may swallow it
                heard.append(stop)
    assert len(heard) == 2


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
