# SPDX-License-Identifier: Apache-2.0
"""Work that is spread over processes comes back as if done here: values in order, errors with their hints."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant import row_losses
from turbopocket.quant.blockwise import calibrate_to_files
from turbopocket.quant.compress import _job, _stored, compress
from turbopocket.quant.fit import GPTQ, VQDM
from turbopocket.quant.formats import parse_format
from turbopocket.quant.layers import compressible_layers
from turbopocket.quant.observe import SecondMoment
from turbopocket.quant.plan import Choice
from turbopocket.quant.row_losses import measure
from turbopocket.quant.sensitivity import compress_candidates
from turbopocket.quant.workers import JOBS_AHEAD, Spread, Workers, _end_with, in_turn

from .test_row_losses import Stop, stopped_after, watched_question
from .test_sequential import Chain


def slow_first(job: int) -> tuple[int, int]:
    time.sleep(0.2 if job == 0 else 0.0)
    return job, os.getpid()


def refuse(job: int) -> int:
    if job == 2:
        raise TurbopocketError("layer 2 is not for us", hint="take another")
    return job


def die(job: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return job


@pytest.fixture(scope="module")
def two() -> Iterator[Spread]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as each worker has: the order of sums depends on it
    with Workers(2).open() as spread:
        yield spread
    torch.set_num_threads(threads)


def test_results_are_in_the_order_of_the_jobs_and_made_elsewhere(two: Spread) -> None:
    results = list(two(slow_first, range(6)))
    assert [job for job, _ in results] == list(range(6))
    makers = {process for _, process in results}
    assert len(makers) == 2
    assert os.getpid() not in makers


def test_layers_fitted_by_workers_are_the_same_bytes(two: Spread) -> None:
    chain = Chain()
    asked = chain.layers, chain.plan, VQDM, chain.stats()
    here, there = compress(*asked), compress(*asked, two)
    assert list(here) == list(there)
    for name, stored in here.items():
        assert all(torch.equal(part, there[name].parts[key]) for key, part in stored.parts.items())


def test_candidates_stored_by_workers_are_the_same(two: Spread) -> None:
    chain = Chain()
    formats = [parse_format(text) for text in ("int8-row", "int4-g32", "avq2x2-d8")]
    asked = chain.layers, chain.stats(), dict.fromkeys(chain.layers, formats), VQDM
    there, here = dict(compress_candidates(*asked, two)), dict(compress_candidates(*asked))
    assert list(there) == list(here) == list(chain.layers)
    for name, candidates in here.items():
        for one, other in zip(candidates, there[name], strict=True):
            assert one.format == other.format
            assert all(torch.equal(part, other.parts[key]) for key, part in one.parts.items())


def test_losses_measured_by_workers_are_the_same(
    two: Spread, denoiser: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where measuring was stopped in their midst; what was kept then is not measured again."""
    monkeypatch.setattr(row_losses, "KEPT_BYTES", 1)
    monkeypatch.setattr(row_losses, "WORTH_SECONDS", 0.0)
    question, run = watched_question(denoiser, tmp_path / "model")
    here = measure([question])
    run.ran()
    assert measure([question], spread=two, folder=tmp_path / "model") == here
    makers = {process for _, process in run.ran()} - {os.getpid()}
    assert len(makers) == 2
    with pytest.raises(Stop):
        measure([question], stopped_after(2), two, tmp_path)
    list(two(pause, range(2)))  # those that were under way have ended
    run.ran()
    assert measure([question], spread=two, folder=tmp_path) == here
    assert {first for first, process in run.ran() if process != os.getpid()} == {2, 3, 4}


def test_tensors_that_are_sent_stay_where_they_are(two: Spread) -> None:
    """In shared memory they would stay as well as in the model, and its products would have other last digits."""
    sent = [torch.randn(33, 7), torch.randn(4, 2, 3, 3).half()[:, :1], torch.tensor(2.0), torch.zeros(0, 3).bool()]
    places = [tensor.data_ptr() for tensor in sent]
    came = list(two(torch.clone, sent))
    assert [tensor.data_ptr() for tensor in sent] == places
    assert not any(tensor.is_shared() for tensor in (*sent, *came))
    for tensor, each in zip(sent, came, strict=True):
        assert tensor.dtype == each.dtype
        assert torch.equal(tensor, each)


def wait_for_the_last(job: tuple[int, Path]) -> bool:
    """The first job ends when the last one has."""
    index, done = job
    if index == 0:
        limit = time.monotonic() + 60
        while not done.exists():
            if time.monotonic() > limit:
                return False
            time.sleep(0.01)
    elif index == 20:
        done.touch()
    return True


def test_a_long_job_holds_nobody_up(two: Spread, tmp_path: Path) -> None:
    assert all(two(wait_for_the_last, ((index, tmp_path / "done") for index in range(21))))


def test_jobs_are_taken_when_a_worker_will_be_free(two: Spread) -> None:
    taken: list[int] = []
    results = two(pause, (taken.append(index) or index for index in range(50)))  # type: ignore[func-returns-value]
    assert next(results) == 0
    assert len(taken) <= 2 * JOBS_AHEAD + 4


def pause(job: int) -> int:
    time.sleep(0.05)
    return job


def test_a_job_names_the_file_of_its_hessian_and_holds_it_where_files_do_not_reach(tmp_path: Path) -> None:
    model, inputs = nn.Sequential(nn.Linear(512, 16)), torch.randn(600, 512)
    layers = compressible_layers("unet", model)
    asked = {"unet": model}, {"unet.0": model[0]}, lambda: model(inputs), (SecondMoment,), tmp_path
    stats = calibrate_to_files(*asked)
    form = parse_format("int4-g32")
    choice = Choice("unet.0", (16, 512), "int4-g32", form.nbytes((16, 512)), 0.0)
    job = _job(layers, choice, GPTQ, stats)
    assert len(pickle.dumps(job)) < 100_000 < 512**2 * 4 < len(pickle.dumps(job.carried()))
    here, there, carried = (_stored(each) for each in (job, pickle.loads(pickle.dumps(job)), job.carried()))
    for name, part in here.parts.items():
        assert torch.equal(part, there.parts[name])
        assert torch.equal(part, carried.parts[name])


def test_an_error_of_a_worker_arrives_whole(two: Spread) -> None:
    found = two(refuse, range(4))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(TurbopocketError, match="layer 2 is not for us") as raised:
        next(found)
    assert raised.value.hint == "take another"


def test_a_killed_worker_is_an_error_and_not_a_wait() -> None:
    with pytest.raises(TurbopocketError, match="a worker process was killed"), Workers(2).open() as spread:
        list(spread(die, range(3)))


def test_one_worker_is_this_process_and_none_is_refused() -> None:
    with Workers().open() as spread:
        assert spread is in_turn
    with pytest.raises(TurbopocketError, match="at least 1, not 0"):
        Workers(0)


def test_absent_ray_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(TurbopocketError, match="ray is not installed") as raised,
        Workers(1, "auto").open(),
    ):
        pass
    assert str(raised.value.hint).startswith("pip install ray==")


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("nonsense", "allowed are auto, local and host:port"),
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1: .*refused"),
    ],
)
def test_a_cluster_that_is_not_there_is_said_at_once(address: str, complaint: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(TurbopocketError, match=complaint), Workers(1, address).open():
        pass


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_ray_gives_the_same_bytes_and_losses_and_errors(
    denoiser: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    # Where its workers find this test's functions, and what it imports where that is not the installed package.
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    )
    chain = Chain()
    asked = chain.layers, chain.plan, VQDM, chain.stats()
    here = compress(*asked)
    monkeypatch.setattr(row_losses, "WORTH_SECONDS", 0.0)
    question, run = watched_question(denoiser, tmp_path / "model")
    with Workers(2, "local").open() as spread:
        there = compress(*asked, spread)
        measured = measure([question], spread=spread, folder=tmp_path)
        assert {process for _, process in run.ran()} - {os.getpid()}
        with pytest.raises(TurbopocketError, match="layer 2 is not for us") as raised:
            list(spread(refuse, range(4)))
    assert raised.value.hint == "take another"
    for name, stored in here.items():
        assert all(torch.equal(part, there[name].parts[key]) for key, part in stored.parts.items())
    assert measured == measure([question])


def test_an_error_does_not_wait_for_what_workers_were_doing() -> None:
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Workers(2).open() as spread:
        assert next(spread(sleep, [0, 600, 600])) == 0
        raise KeyboardInterrupt
    assert time.monotonic() - begun < 60


def sleep(seconds: int) -> int:
    time.sleep(seconds)
    return seconds


def test_a_worker_ends_when_the_pipe_to_its_parent_does() -> None:
    context = get_context("spawn")
    lifeline, held = context.Pipe(duplex=False)
    process = context.Process(target=_end_with, args=(lifeline,))
    process.start()
    process.join(1)
    assert process.is_alive()
    held.close()
    process.join(60)
    assert process.exitcode == 1


PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
from turbopocket.quant.workers import Workers
from tests.quant.test_workers import sleep
if __name__ == "__main__":
    with Workers(2).open() as spread:
        print(next(spread(sleep, [0, 600, 600])), flush=True)
        list(spread(sleep, [600, 600]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl_c"])
def test_workers_end_with_their_parent_and_are_silent(number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), str(Path(__file__).parents[2])]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline() == "0\n"
            children = psutil.Process(parent.pid).children()
            workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
            if number == signal.SIGINT:
                os.killpg(parent.pid, number)  # as a terminal does
            else:
                parent.send_signal(number)
            psutil.wait_procs(workers, 60)
            left = [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
        finally:
            parent.kill()
        assert parent.stderr is not None
        said = parent.stderr.read()
    assert len(workers) == 2
    assert left == []
    assert said.count("KeyboardInterrupt") == (1 if number == signal.SIGINT else 0)
    assert "SpawnProcess" not in said
