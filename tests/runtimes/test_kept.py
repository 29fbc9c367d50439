# SPDX-License-Identifier: Apache-2.0
"""Runners hold the components they ran last, and no more than memory is to be spent on."""

import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turbopocket.ground.memory import anonymous_bytes
from turbopocket.runtimes import kept
from turbopocket.runtimes.drawing.text_to_image import generate
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers
from turbopocket.runtimes.manifest import Manifest, load_manifest
from turbopocket.runtimes.memory import component_bytes
from turbopocket.runtimes.onnx import runner as onnx_runner
from turbopocket.runtimes.onnx.runner import OnnxRunner
from turbopocket.runtimes.served.runner import ServedRunner

COUNTING = """
import sys
import numpy as np
from turbopocket.runtimes.served import wire

requests, replies, opened = sys.stdin.buffer, sys.stdout.buffer, set()
while verb := requests.read(1):
    key, found = wire.read_text(requests), {}
    if verb[0] == wire.OPEN:
        wire.read_text(requests), wire.read_text(requests)
        opened.add(key)
    elif verb[0] == wire.CLOSE:
        opened.remove(key)
    else:
        wire.read_tensors(requests)
        found = {name: np.array([len(opened)]) for name in wire.read_texts(requests)}
    replies.write(bytes([wire.DONE]))
    wire.write_tensors(replies, found)
    replies.flush()
"""


def zeros(manifest: Manifest, component: str) -> dict[str, Any]:
    specs = manifest.components[component].inputs
    return {each.name: np.zeros([d if isinstance(d, int) else 1 for d in each.shape], each.dtype) for each in specs}


class Counting(ServedRunner):
    """Each output is how many components its process holds open."""

    def _command(self) -> tuple[list[str], str, Mapping[str, str] | None]:
        return [sys.executable, "-c", COUNTING], "toy", None


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Every session of ONNX Runtime that is opened from now on, gone ones as well."""
    opened: list[weakref.ref[Any]] = []
    opening = onnx_runner.open_session

    def remembered(*asked: Any, **options: Any) -> Any:
        session = opening(*asked, **options)
        opened.append(weakref.ref(session))
        return session

    monkeypatch.setattr(onnx_runner, "open_session", remembered)
    return opened


def open_now(alive: list[weakref.ref[Any]]) -> int:
    return sum(session() is not None for session in alive)


def test_a_large_model_is_drawn_with_one_component_open_at_a_time(
    toy_artifact: Path, monkeypatch: pytest.MonkeyPatch, alive: list[weakref.ref[Any]]
) -> None:
    manifest = load_manifest(toy_artifact)
    tokenizers = open_tokenizers(toy_artifact, manifest)
    together = OnnxRunner(toy_artifact, manifest)
    expected = generate(together, manifest, tokenizers, "a red circle", seed=3)
    assert open_now(alive) == len(alive) == 3
    monkeypatch.setattr(kept, "MOST_BYTES", 1)
    runner = OnnxRunner(toy_artifact, manifest)
    np.testing.assert_array_equal(generate(runner, manifest, tokenizers, "a red circle", seed=3), expected)
    assert open_now(alive[3:]) == 1


def test_the_component_used_longest_ago_is_closed_before_another_is_opened(
    toy_artifact: Path, monkeypatch: pytest.MonkeyPatch, alive: list[weakref.ref[Any]]
) -> None:
    manifest = load_manifest(toy_artifact)
    of = {name: component_bytes(toy_artifact, manifest, name) for name in manifest.components}
    assert all(of.values())
    monkeypatch.setattr(kept, "MOST_BYTES", of["text_encoder"] + of["unet"])
    runner = OnnxRunner(toy_artifact, manifest)
    for component in ("text_encoder", "unet", "text_encoder", "vae_decoder", "text_encoder"):
        runner.run(component, zeros(manifest, component))
    text_encoder, unet, vae_decoder = (session() is not None for session in alive)
    assert (text_encoder, unet, vae_decoder) == (True, False, True)


@pytest.mark.parametrize(("allowed", "most"), [(100, 1), (130, 2), (160, 3)])
def test_an_artifact_planned_for_so_much_memory_is_held_to_it(
    toy_artifact: Path, alive: list[weakref.ref[Any]], allowed: int, most: int
) -> None:
    """By what its components were predicted to take, not by their files."""
    manifest = load_manifest(toy_artifact)
    peaks = {"text_encoder": 30, "unet": 100, "vae_decoder": 30}
    planned = {**(manifest.plan or {}), "peak_memory_bytes": allowed, "component_peak_bytes": peaks}
    runner = OnnxRunner(toy_artifact, manifest.model_copy(update={"plan": planned}))
    held = []
    for component in ("text_encoder", "vae_decoder", "unet"):
        runner.run(component, zeros(manifest, component))
        held.append(open_now(alive))
    assert held[-1] == most
    assert open_now(alive) == most


@pytest.mark.parametrize(
    "said",
    [
        {"peak_memory_bytes": 1},
        {"peak_memory_bytes": "1 GB", "component_peak_bytes": {}},
        {"peak_memory_bytes": 1, "component_peak_bytes": {"unet": 1}},
        {"peak_memory_bytes": 1, "component_peak_bytes": {"text_encoder": 1, "unet": None, "vae_decoder": []}},
    ],
    ids=str,
)
def test_of_memory_that_is_said_badly_nothing_is_made(
    toy_artifact: Path, alive: list[weakref.ref[Any]], said: dict[str, Any]
) -> None:
    """A manifest comes from anywhere: its files' bytes are what counts then."""
    manifest = load_manifest(toy_artifact)
    runner = OnnxRunner(toy_artifact, manifest.model_copy(update={"plan": said}))
    for component in manifest.components:
        runner.run(component, zeros(manifest, component))
    assert open_now(alive) == 3


def test_showing_layers_of_a_large_component_closes_it_first(
    toy_artifact: Path, monkeypatch: pytest.MonkeyPatch, alive: list[weakref.ref[Any]]
) -> None:
    manifest = load_manifest(toy_artifact)
    monkeypatch.setattr(kept, "MOST_BYTES", 1)
    runner, inputs = OnnxRunner(toy_artifact, manifest), zeros(manifest, "unet")
    runner.run("unet", inputs)
    assert runner.run_layers("unet", inputs, ["conv_in"])
    assert open_now(alive) == 0


def test_a_process_is_told_what_to_free(toy_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = load_manifest(toy_artifact)
    for most, expected in ((kept.MOST_BYTES, [1, 2, 3]), (1, [1, 1, 1])):
        monkeypatch.setattr(kept, "MOST_BYTES", most)
        with Counting(toy_artifact, manifest) as runner:
            found = [runner.run(component, zeros(manifest, component)) for component in manifest.components]
        assert [int(next(iter(each.values()))[0]) for each in found] == expected


@pytest.mark.skipif(sys.platform != "linux", reason="what is freed is kept by glibc")
def test_memory_of_a_closed_component_is_free_before_the_next_is_opened(
    toy_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "MOST_BYTES", 1)
    open_ones, pins = kept.Kept[list[Any]](toy_artifact, load_manifest(toy_artifact)), []

    def opened() -> list[Any]:
        """Two hundred megabytes in pieces that the heap holds, with small ones between that stay in use."""
        pieces = []
        for _ in range(2000):
            pieces.append(np.ones(100_000, np.uint8))
            pins.append(np.ones(2_000, np.uint8))
        return pieces

    open_ones.get("unet", opened)
    held = anonymous_bytes()
    free: list[int] = []
    open_ones.get("text_encoder", lambda: free.append(held - anonymous_bytes()) or [])  # type: ignore[func-returns-value]
    assert free[0] > 150_000_000
