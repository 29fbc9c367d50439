# SPDX-License-Identifier: Apache-2.0
"""A process that runs models: what it says arrives, and however it ends, the caller gets one clear error."""

import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.served import process
from turbopocket.runtimes.served.process import ServedProcess

SERVER = """
import os, sys
from turbopocket.runtimes.served import wire

requests, replies = sys.stdin.buffer, sys.stdout.buffer
while verb := requests.read(1):
    key = wire.read_text(requests)
    if key == "signal":
        os.kill(os.getpid(), 4)
    if key == "exit":
        print("no more memory", file=sys.stderr)
        sys.exit(7)
    if key == "hang":
        import time
        time.sleep(60)
    inputs, outputs = wire.read_tensors(requests), wire.read_texts(requests)
    if key == "refuse":
        replies.write(bytes([wire.FAILED]))
        wire.write_text(replies, "no such graph")
    elif key == "nonsense":
        replies.write(bytes([wire.DONE]) + b"\\xff" * 8)
    else:
        replies.write(bytes([wire.DONE]))
        wire.write_tensors(replies, {name: inputs["x"] + 1 for name in outputs})
    replies.flush()
"""
X = {"x": np.arange(3, dtype=np.float32)}


@pytest.fixture
def server() -> Iterator[ServedProcess]:
    with ServedProcess([sys.executable, "-c", SERVER], "toy server") as started:
        yield started


def test_answers_arrive_and_a_refusal_does_not_end_the_process(server: ServedProcess) -> None:
    np.testing.assert_array_equal(server.run("model", X, ["y"])["y"], X["x"] + 1)
    with pytest.raises(TurbopocketError, match="toy server, refuse: no such graph"):
        server.run("refuse", X, ["y"])
    assert list(server.run("model", X, ["y", "z"])) == ["y", "z"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("signal", "the process ended by SIGILL: nothing on stderr"),
        ("exit", "the process ended with 7: no more memory"),
        ("nonsense", "a count of 4294967295, the limit is 4096"),
    ],
)
def test_end_of_the_process_is_an_error_of_the_request(
    server: ServedProcess, monkeypatch: pytest.MonkeyPatch, key: str, message: str
) -> None:
    monkeypatch.setattr(process, "_END_SECONDS", 2)
    with pytest.raises(TurbopocketError, match=f"toy server, {key}: .*{message}"):
        server.run(key, X, ["y"])


def test_process_without_an_answer_is_ended(server: ServedProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    server.run("model", X, ["y"])
    monkeypatch.setattr(process, "MOST_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(TurbopocketError, match="by SIGKILL after 0.5 s without an answer"):
        server.run("hang", X, ["y"])
    assert time.monotonic() - start < 30


def test_closed_process_can_not_be_asked(server: ServedProcess) -> None:
    server.close()
    with pytest.raises(TurbopocketError, match="toy server was closed, model can not be run on it any more"):
        server.run("model", X, ["y"])
