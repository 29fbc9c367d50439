# SPDX-License-Identifier: Apache-2.0
"""The ONNX runner computes what numpy computes, and refuses what does not fit together."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.manifest import Manifest
from turbopocket.runtimes.onnx.runner import OnnxRunner
from turbopocket.runtimes.onnx.session import session_options
from turbopocket.runtimes.open import open_runner

from ..conftest import LATENT, TOKENS, WIDTH, toy_graphs


def weights_of(component: str) -> dict[str, np.ndarray]:
    return {w.name: onnx.numpy_helper.to_array(w) for w in toy_graphs()[component].graph.initializer}


def unet_inputs(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((1, 4, LATENT, LATENT), dtype=np.float32),
        "timestep": np.array([999], dtype=np.float32),
        "encoder_hidden_states": rng.standard_normal((1, TOKENS, WIDTH), dtype=np.float32),
    }


def test_open_runner_gives_the_runner_of_the_target(toy_artifact: Path, toy_manifest: Manifest) -> None:
    assert isinstance(open_runner(toy_artifact, toy_manifest), OnnxRunner)


def test_outputs_come_back_by_name(toy_artifact: Path, toy_manifest: Manifest) -> None:
    ids = np.arange(TOKENS, dtype=np.int64)[None]
    outputs = OnnxRunner(toy_artifact, toy_manifest).run("text_encoder", {"input_ids": ids})
    np.testing.assert_array_equal(outputs["last_hidden_state"], weights_of("text_encoder")["table"][ids])


def test_sessions_open_on_first_use(toy_artifact: Path, toy_manifest: Manifest) -> None:
    (toy_artifact / "vae_decoder" / "model.onnx").write_bytes(b"broken")
    runner = OnnxRunner(toy_artifact, toy_manifest, threads=1)
    runner.run("unet", unet_inputs())
    with pytest.raises(TurbopocketError, match="vae_decoder: ONNX Runtime cannot open the graph"):
        runner.run("vae_decoder", {"latent_sample": np.zeros((1, 4, LATENT, LATENT), dtype=np.float32)})


def test_memory_goes_back_when_a_tensor_dies() -> None:
    options = session_options(threads=1)
    assert not options.enable_cpu_mem_arena
    assert not options.enable_mem_pattern
    assert options.intra_op_num_threads == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sample": None},
            "unet: inputs are missing sample; expected sample, timestep, encoder_hidden_states",
        ),
        ({"colour": np.zeros(1)}, "unet: inputs are unknown colour; expected"),
        ({"timestep": np.array([9])}, r"unet: input timestep must be float32 \[1\], found int64 \[1\]"),
        (
            {"sample": np.zeros((1, 4, LATENT), dtype=np.float32)},
            r"input sample must be float32 \[1, 4, 6, 6\], found float32 \[1, 4, 6\]",
        ),
        (
            {"sample": np.zeros((1, 4, 5, LATENT), dtype=np.float32)},
            r"input sample must be float32 \[1, 4, 6, 6\], found \[1, 4, 5, 6\]: 6 is 6, not 5",
        ),
    ],
)
def test_unfit_inputs_are_refused(
    toy_artifact: Path, toy_manifest: Manifest, change: dict[str, Any], message: str
) -> None:
    inputs = {name: value for name, value in (unet_inputs() | change).items() if value is not None}
    with pytest.raises(TurbopocketError, match=message):
        OnnxRunner(toy_artifact, toy_manifest).run("unet", inputs)


def test_varying_dimension_takes_any_size(toy_artifact: Path, toy_manifest: Manifest) -> None:
    longer = {"encoder_hidden_states": np.zeros((1, 2 * TOKENS, WIDTH), dtype=np.float32)}
    outputs = OnnxRunner(toy_artifact, toy_manifest).run("unet", unet_inputs() | longer)
    assert outputs["out_sample"].shape == (1, 4, LATENT, LATENT)


def test_unknown_component_is_refused_with_the_known_ones(toy_artifact: Path, toy_manifest: Manifest) -> None:
    with pytest.raises(TurbopocketError, match="toy has no component 'vae': it has text_encoder, unet, vae_decoder"):
        OnnxRunner(toy_artifact, toy_manifest).run("vae", {})


@pytest.mark.parametrize(
    ("kind", "tensor", "message"),
    [
        (
            "inputs",
            {"dtype": "float16"},
            r"graph's inputs have sample as float32 \[1, 4, 6, 6\], the manifest says",
        ),
        ("inputs", {"shape": [1, 4, 6, "width"]}, r"the manifest says float32 \[1, 4, 6, 'width'\]"),
        ("outputs", {"shape": [1, 4, 6, "width"]}, r"the manifest says float32 \[1, 4, 6, 'width'\]"),
        ("outputs", {"shape": [1, 4, 6, 7]}, r"graph's outputs have out_sample as float32 \[1, 4, 6, 6\]"),
    ],
)
def test_graph_that_is_not_what_the_manifest_says_is_refused(
    toy_artifact: Path, toy_manifest: Manifest, kind: str, tensor: dict[str, Any], message: str
) -> None:
    as_json = toy_manifest.model_dump()
    changed = as_json["components"]["unet"][kind][0]
    changed |= tensor
    inputs = unet_inputs()
    if kind == "inputs":
        inputs[changed["name"]] = inputs.pop("sample").astype(changed["dtype"])
    with pytest.raises(TurbopocketError, match=message):
        OnnxRunner(toy_artifact, Manifest.model_validate(as_json)).run("unet", inputs)


def test_layers_are_shown_in_execution_order_with_their_bias(toy_artifact: Path, toy_manifest: Manifest) -> None:
    inputs, weights = unet_inputs(), weights_of("unet")
    asked = ["mid.attn.to_q", "conv_in", "not.in.the.graph"]
    layers = OnnxRunner(toy_artifact, toy_manifest).run_layers("unet", inputs, asked)
    assert list(layers) == ["conv_in", "mid.attn.to_q"]
    expected = inputs["encoder_hidden_states"] @ weights["to_q.weight"] + weights["to_q.bias"]
    np.testing.assert_allclose(layers["mid.attn.to_q"], expected, rtol=1e-5, atol=1e-6)
    assert layers["conv_in"].shape == (1, 4, LATENT, LATENT)


def test_layer_that_is_an_output_of_the_graph_is_shown(toy_artifact: Path, toy_manifest: Manifest) -> None:
    inputs = unet_inputs()
    runner = OnnxRunner(toy_artifact, toy_manifest)
    shown = runner.run_layers("unet", inputs, ["add_time"])["add_time"]
    np.testing.assert_array_equal(shown, runner.run("unet", inputs)["out_sample"])


def test_no_known_layer_means_nothing_is_run(toy_artifact: Path, toy_manifest: Manifest) -> None:
    assert OnnxRunner(toy_artifact, toy_manifest).run_layers("unet", unet_inputs(), ["nowhere"]) == {}


DRAW = """
import sys
from pathlib import Path
from turbopocket.runtimes.manifest import load_manifest, verify
from turbopocket.runtimes.open import open_runner
from turbopocket.runtimes.drawing.text_to_image import generate
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers

folder = Path(sys.argv[1])
manifest = load_manifest(folder)
verify(folder, manifest)
tokenizers = open_tokenizers(folder, manifest)
picture = generate(open_runner(folder, manifest), manifest, tokenizers, "a red circle", seed=0, guidance=3.0)
assert picture.shape == (12, 12, 3)
heavy = {"torch", "transformers", "diffusers", "onnx", "scipy"} & set(sys.modules)
print("heavy imports:", *sorted(heavy))
"""


def test_a_picture_is_drawn_without_importing_torch(toy_artifact: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", DRAW, str(toy_artifact)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "heavy imports:"


def test_nothing_is_written_or_sent_on_the_side(toy_artifact: Path, tmp_path: Path) -> None:
    """ONNX Runtime 1.31 writes a device ID and a database of events below the home folder, unless told not to."""
    home = tmp_path / "home"
    home.mkdir()
    graph = toy_artifact / "unet" / "model.onnx"
    code = f"from turbopocket.runtimes.onnx.session import open_session; open_session({str(graph)!r})"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert not list(home.iterdir())
