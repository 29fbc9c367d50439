# SPDX-License-Identifier: Apache-2.0
"""Layers are fitted independently of each other: here in turn, in processes of this machine, or on a Ray cluster."""

import ctypes
import os
import pickle
import signal
import socket
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ..ground.errors import TurbopocketError
from ..ground.extras import install_hint

if TYPE_CHECKING:  # a wrong number of workers is refused before PyTorch is imported
    import torch

JOBS_AHEAD = 2
"""Jobs of each worker that are taken before they are done: one that it does, and one that it then finds. What is done
waits for its turn as a result, so that a long job holds nobody up."""

Job = TypeVar("Job")
Result = TypeVar("Result")


class Spread(Protocol):
    """Like `map`: results in the order of the jobs, of which `JOBS_AHEAD` for each worker are taken at a time.

    Work and jobs must pickle. A job may read files of this machine when it is done; where that is on another machine,
    its `carried()` goes there instead, which holds what it would read.
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
                yield SharedOut(pool, self.count)
        elif self.count == 1:
            yield in_turn
        else:
            with _process_pool(self.count) as pool:
                yield SharedOut(pool, self.count)


IN_TURN = Workers()


class _Pool(Protocol):
    """Where work is done; a handle is what it gives for work that is under way."""

    def submit(self, work: Callable[[Any], Any], job: Any) -> Any: ...

    def wait(self, under_way: list[Any]) -> list[Any]:
        """Those that are not done, once one of them is."""
        ...

    def result(self, handle: Any) -> Any: ...


@dataclass(frozen=True)
class SharedOut:
    """The `Spread` of a pool with so many workers."""

    pool: _Pool
    count: int

    def __call__(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Generator[Result, None, None]:
        to_come, in_order, under_way = iter(jobs), deque[Any](), list[Any]()
        try:
            while True:
                for job in islice(to_come, JOBS_AHEAD * self.count - len(under_way)):
                    in_order.append(self.pool.submit(partial(_outcome, work), job))
                    under_way.append(in_order[-1])
                if not in_order:
                    return
                if in_order[0] in under_way:
                    under_way = self.pool.wait(under_way)
                    continue
                outcome = self.pool.result(in_order.popleft())
                if isinstance(outcome, TurbopocketError):
                    raise outcome
                yield outcome
        except BrokenProcessPool:
            raise TurbopocketError(
                "a worker process was killed", hint="the system may be out of memory: fewer workers need less"
            ) from None


def worker_count(spread: Spread) -> int:
    """How many work at once."""
    return spread.count if isinstance(spread, SharedOut) else 1


def _outcome(work: Callable[[Job], Result], job: Job) -> Result | TurbopocketError:
    """A TurbopocketError is a value on its way back, since Ray would make another error of it."""
    from .shared import keep_only

    keep_only(work)
    try:
        return work(job)
    except TurbopocketError as error:
        return error


@dataclass(frozen=True)
class _Processes:
    """A `_Pool` of this machine's processes."""

    executor: ProcessPoolExecutor

    # Not `executor.map`: it takes all jobs, and so their tensors, at once. It also cancels what waits when its reader
    # stops, and a pool that then loses its workers has its thread fail on what is cancelled, with a traceback
    # (Python 3.11.7, 3.12.1).
    def submit(self, work: Callable[[Any], Any], job: Any) -> Future[Any]:
        with _signals_later():
            return self.executor.submit(_done_there, _Sent((work, job)))

    def wait(self, under_way: list[Future[Any]]) -> list[Future[Any]]:
        wait(under_way, return_when=FIRST_COMPLETED)
        return [each for each in under_way if not each.done()]

    def result(self, handle: Future[Any]) -> Any:
        return handle.result()


@dataclass(frozen=True)
class _Sent:
    """A value on its way to another process, where it is the value itself, tensors copied.

    Else the pool pickles tensors as PyTorch has it: their values move into shared memory, also those that the model at
    home goes on with. There they stay, up to the whole model, in what a container often has 64 MB of; and from another
    address, vectors of other alignment, its products have other last digits.
    """

    value: Any

    def __reduce__(self) -> tuple[Any, ...]:
        packed = BytesIO()
        _Packer(packed, pickle.HIGHEST_PROTOCOL).dump(self.value)
        return pickle.loads, (packed.getvalue(),)


class _Packer(pickle.Pickler):
    def reducer_override(self, value: object) -> Any:
        import torch

        if not isinstance(value, torch.Tensor):
            return NotImplemented
        values = value.detach().contiguous()
        return _unpacked, (values.flatten().view(torch.uint8).numpy(), values.dtype, tuple(values.shape))


def _unpacked(values: Any, dtype: "torch.dtype", shape: tuple[int, ...]) -> "torch.Tensor":
    """A tensor in memory that PyTorch aligned."""
    import torch

    return torch.from_numpy(values).clone().view(dtype).view(shape)


def _done_there(sent: Any) -> _Sent:
    """What a worker is called with; a `_Sent` arrives as its value."""
    work, job = sent
    return _Sent(work(job))


@contextmanager
def _process_pool(count: int) -> Iterator[_Processes]:
    """So many processes, which end at once when the block fails or this process dies, however it does."""
    import torch

    context = get_context("spawn")
    lifeline, held = context.Pipe(duplex=False)
    threads = max(1, torch.get_num_threads() // count)
    asked = threads, lifeline, os.getpid()
    with lifeline, held, ProcessPoolExecutor(count, context, _begin_worker, asked) as executor:
        try:
            yield _Processes(executor)
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
    import torch

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


class _RayActors:
    """A `_Pool` of Ray's processes. Not `ray.util.multiprocessing.Pool`: it gives a worker its next job when all before
    its last one are done, so that a long one holds the others up."""

    def __init__(self, ray: Any, count: int) -> None:
        self.ray = ray
        self.actors = [ray.remote(scheduling_strategy="SPREAD")(_RayWorker).remote() for _ in range(count)]
        self.jobs: dict[Any, int] = {}

    def submit(self, work: Callable[[Any], Any], job: Any) -> Any:
        busy = Counter(self.jobs.values())
        index = min(range(len(self.actors)), key=busy.__getitem__)
        handle = self.actors[index].do.remote(work, job.carried() if hasattr(job, "carried") else job)
        self.jobs[handle] = index
        return handle

    def wait(self, under_way: list[Any]) -> list[Any]:
        self.ray.wait(under_way, num_returns=1)
        done, left = self.ray.wait(under_way, num_returns=len(under_way), timeout=0)
        for handle in done:
            del self.jobs[handle]
        return list(left)

    def result(self, handle: Any) -> Any:
        return self.ray.get(handle)


class _RayWorker:
    """One process; of one thread, whatever its machine has."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)

    def do(self, work: Callable[[Any], Any], job: Any) -> Any:
        return work(job)


@contextmanager
def _ray_pool(count: int, address: str) -> Iterator[_RayActors]:
    try:
        import ray
    except ImportError as error:
        raise TurbopocketError("ray is not installed", hint=install_hint("ray")) from error
    if address not in ("auto", "local"):
        _require_listener(address)
    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise TurbopocketError(f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}") from error
    try:
        yield _RayActors(ray, count)
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
