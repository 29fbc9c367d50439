# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on an emulated ARM CPU, on the toy artifact: the same answers as here, and errors that say where."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.arm64.cpus import parse_cpu
from turbopocket.runtimes.arm64.setup import open_emulator
from turbopocket.runtimes.manifest import Manifest
from turbopocket.runtimes.onnx.emulated import EmulatedOnnxRunner
from turbopocket.runtimes.onnx.runner import OnnxRunner

from ..conftest import LATENT, TOKENS, WIDTH

pytestmark = pytest.mark.timeout(1800)  # the first run sets up the emulated CPU


def unet_inputs() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {
        "sample": rng.standard_normal((1, 4, LATENT, LATENT), dtype=np.float32),
        "timestep": np.array([999], dtype=np.float32),
        "encoder_hidden_states": rng.standard_normal((1, TOKENS, WIDTH), dtype=np.float32),
    }


@pytest.fixture
def runner(toy_artifact: Path, toy_manifest: Manifest, emulator_cache: Path) -> Iterator[EmulatedOnnxRunner]:
    cpu = parse_cpu("arm64:cortex-a53")
    with EmulatedOnnxRunner(toy_artifact, toy_manifest, cpu, open_emulator(emulator_cache)) as started:
        yield started


def test_arm_computes_as_this_cpu_does_and_shows_its_layers_and_kernels(
    runner: EmulatedOnnxRunner, toy_artifact: Path, toy_manifest: Manifest
) -> None:
    here, inputs = OnnxRunner(toy_artifact, toy_manifest), unet_inputs()
    found, expected = runner.run("unet", inputs), here.run("unet", inputs)
    np.testing.assert_allclose(found["out_sample"], expected["out_sample"], rtol=1e-5, atol=1e-6)
    layers = ["mid.attn.to_q", "conv_in", "nowhere"]
    shown, expected = runner.run_layers("unet", inputs, layers), here.run_layers("unet", inputs, layers)
    assert list(shown) == ["conv_in", "mid.attn.to_q"]
    for layer, value in shown.items():
        np.testing.assert_allclose(value, expected[layer], rtol=1e-5, atol=1e-6)
    counts = runner.kernels()
    assert counts["fp32"] > 0
    assert counts["dot product"] == counts["i8mm"] == 0  # which this CPU does not have
    (toy_artifact / "vae_decoder" / "model.onnx").write_bytes(b"no graph")
    latents = {"latent_sample": np.zeros((1, 4, LATENT, LATENT), dtype=np.float32)}
    with pytest.raises(TurbopocketError, match="arm64:cortex-a53, vae_decoder from .*model.onnx"):
        runner.run("vae_decoder", latents)
