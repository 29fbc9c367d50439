# SPDX-License-Identifier: Apache-2.0
"""Layers are fitted independently of each other: here in turn, in processes of this machine, or on a Ray cluster."""

import ctypes
import os
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

import torch

from ..ground.errors import TurbopocketError
from ..ground.extras import install_hint

JOBS_AHEAD = 2
"""Jobs of each worker that are taken before they are done: one that it does, and one that it then finds."""

Job = TypeVar("Job")
Result = TypeVar("Result")


class Spread(Protocol):
    """Like `map`: results in the order of the jobs, of which `JOBS_AHEAD` for each worker are taken at a time.

    Work and jobs must pickle.
    """

    def __call__(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """Raises the TurbopocketError of the first job that raises one."""
        ...


def in_turn(work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
    """One job after the other, in this process."""
    return map(work, jobs)


@dataclass(frozen=True)
class Workers:
    """How many processes share the work, each with its share of this process's threads.

    With `ray_address` they are Ray's, wherever it starts them: "auto" finds the cluster of this machine, host:port is
    another one (whose machines have turbopocket), "local" starts one here. A result does not depend on who computed it,
    but for the order of float sums on other CPUs or with another number of threads.
    """

    count: int = 1
    ray_address: str | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise TurbopocketError(f"workers: at least 1, not {self.count}")

    @contextmanager
    def open(self) -> Iterator[Spread]:
        """The workers while the block runs.

        Raises TurbopocketError when Ray is asked for and is not installed or not reached.
        """
        if self.ray_address is not None:
            with _ray_pool(self.count, self.ray_address) as pool:
                yield partial(_spread, pool.imap)
        elif self.count == 1:
            yield in_turn
        else:
            with _process_pool(self.count) as pool_map:
                yield partial(_spread, pool_map)


IN_TURN = Workers()


def _spread(
    pool_map: Callable[..., Iterator[Any]], work: Callable[[Job], Result], jobs: Iterable[Job]
) -> Iterator[Result]:
    try:
        for outcome in pool_map(partial(_outcome, work), iter(jobs)):
            if isinstance(outcome, TurbopocketError):
                raise outcome
            yield outcome
    except BrokenProcessPool:
        raise TurbopocketError(
            "a worker process was killed", hint="the system may be out of memory: fewer workers need less"
        ) from None


def _outcome(work: Callable[[Job], Result], job: Job) -> Result | TurbopocketError:
    """A TurbopocketError is a value on its way back, since Ray would make another error of it."""
    try:
        return work(job)
    except TurbopocketError as error:
        return error


@contextmanager
def _process_pool(count: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """The `map` of so many processes, which end at once when the block fails or this process dies, however it does."""
    context = get_context("spawn")
    lifeline, held = context.Pipe(duplex=False)
    threads = max(1, torch.get_num_threads() // count)
    asked = threads, lifeline, os.getpid()
    with lifeline, held, ProcessPoolExecutor(count, context, _begin_worker, asked) as executor:

        def pool_map(work: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
            # Not `executor.map`: it takes all jobs, and so their tensors, at once. It also cancels what waits when its
            # reader stops, and a pool that then loses its workers has its thread fail on what is cancelled, with a
            # traceback (Python 3.11.7, 3.12.1).
            to_come, waiting = iter(jobs), deque[Future[Any]]()
            while True:
                for job in islice(to_come, JOBS_AHEAD * count - len(waiting)):
                    with _signals_later():
                        waiting.append(executor.submit(work, job))
                if not waiting:
                    return
                yield waiting.popleft().result()

        try:
            yield pool_map
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)  # or its thread would complain of what happens now
            held.close()
            raise


@contextmanager
def _signals_later() -> Iterator[None]:
    """What tells this process to stop is heard after the block, in which workers start.

    One that comes between a worker's start and what the worker is told then would have that end in a traceback. To
    block signals is not enough, since another thread may take them, and Python then calls the handler in this one. It
    is done as well, for the workers: they inherit it until `_begin_worker`.
    """
    asked = (*_PARENTS_SIGNALS, signal.SIGTERM)
    heard: list[int] = []
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in asked if callable(signal.getsignal(number))}
    for number in handlers:
        signal.signal(number, lambda number, frame: heard.append(number))
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, asked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in heard:
        handlers[number](number, None)


_PARENTS_SIGNALS = (signal.SIGINT, signal.SIGHUP)
"""A terminal sends these to all processes of a command; only the first answers, and workers end with it."""
_PR_SET_PDEATHSIG = 1


def _begin_worker(threads: int, lifeline: Connection, parent: int) -> None:
    torch.set_num_threads(threads)
    for number in _PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
    if sys.platform == "linux":  # also in the middle of native code, in which the thread below has no turn
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()


def _end_with(lifeline: Connection) -> None:
    """Ends this process when the other end of the pipe, which only the parent has, is closed."""
    with suppress(EOFError, OSError):
        lifeline.recv_bytes()
    os._exit(1)


@contextmanager
def _ray_pool(count: int, address: str) -> Iterator[Any]:
    try:
        import ray
        from ray.util.multiprocessing import Pool
    except ImportError as error:
        raise TurbopocketError("ray is not installed", hint=install_hint("ray")) from error
    if address not in ("auto", "local"):
        _require_listener(address)
    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise TurbopocketError(f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}") from error
    try:
        with Pool(count, torch.set_num_threads, (1,)) as pool:
            yield pool
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    """TurbopocketError when nothing listens there: Ray itself would go on trying for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise TurbopocketError(f"Ray address {address!r}: allowed are auto, local and host:port")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise TurbopocketError(f"no Ray cluster answers at {address}: {error}") from error
