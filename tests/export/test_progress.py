# SPDX-License-Identifier: Apache-2.0
"""What a waiting person is told, also where a step takes minutes and nobody has a terminal."""

import time

import pytest

from turbopocket.export.progress import StageProgress, clock_text


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def says(capsys: pytest.CaptureFixture[str], line: str) -> bool:
    """Whether that line comes, however busy the machine is."""
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up:
        if line in capsys.readouterr().err.splitlines():
            return True
        time.sleep(0.01)
    return False


def test_a_step_of_minutes_has_a_believable_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = StageProgress(interval=0.01, clock=clock)
    with progress.stage("compress", 4) as advance:
        clock.wait(300)
        advance()
        clock.wait(60)
        # 300 s a step: three to come, of which the current one has had a minute.
        assert says(capsys, "compress 1/4 after 0:06:00, about 0:14:00 left")
        clock.wait(240)
        advance()
        assert says(capsys, "compress 2/4 after 0:10:00, about 0:10:00 left")


def test_stages_to_come_are_scaled_by_those_before(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = StageProgress(interval=0.01, clock=clock)
    progress.expect({"calibrate": [100], "compress": [200], "lower": [50]})
    with progress.stage("calibrate", 2):
        clock.wait(40)
        assert says(capsys, "calibrate 0/2 after 0:00:40, about 0:01:00 left, about 0:05:10 left in all")
        clock.wait(160)  # twice as long as expected
    with progress.stage("compress", 2) as advance:
        clock.wait(200)
        advance()
        # Half of it took 200 s: 200 s to come, and lower's 50 at half the expected pace, as everything so far.
        assert says(capsys, "compress 1/2 after 0:03:20, about 0:03:20 left, about 0:05:00 left in all")
    assert progress.stage_seconds == {"calibrate": 200, "compress": 200}


def test_steps_take_what_each_should_and_what_was_found_done_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = StageProgress(interval=0.01, clock=clock)
    progress.expect({"trace": [50], "calibrate": [100, 100, 1000, 10]})
    with progress.stage("trace"):
        clock.wait(0.1)  # from a build before
    with progress.stage("calibrate", 4) as advance:
        clock.wait(0.5)
        advance()
        assert says(capsys, "calibrate 1/4 after 0:00:00, about 0:18:30 left, about 0:18:30 left in all")
        clock.wait(200)
        advance()
        # Twice what it should be: so are 1000 and 10.
        assert says(capsys, "calibrate 2/4 after 0:03:20, about 0:33:40 left, about 0:33:40 left in all")


def test_nothing_is_made_up_and_a_quiet_one_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with StageProgress(interval=0.01, clock=clock).stage("trace"):
        clock.wait(7)
        assert says(capsys, "trace after 0:00:07")
    capsys.readouterr()
    with StageProgress(quiet=True, interval=0.01, clock=clock).stage("trace"):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_hours_are_told() -> None:
    assert clock_text(3 * 3600 + 62) == "3:01:02"
