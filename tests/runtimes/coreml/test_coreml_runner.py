# SPDX-License-Identifier: Apache-2.0
"""Packages of an artifact through the runners' interface: whole or in chunks, by our evaluator or by Core ML."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.coreml.interface import loop_spec
from turbopocket.runtimes.coreml.runner import CoreMLRunner
from turbopocket.runtimes.manifest import ComponentSpec, Manifest, TensorSpec
from turbopocket.runtimes.open import open_runner

from .conftest import mb, save_built

MODES = ("fp32", None)
"""Our evaluator, and Apple's runtime (of which the tests have a stand-in)."""
ITEMS = 3


def first(sample: Any, timestep: Any) -> Any:
    """conv_in = 3 * sample + timestep"""
    time = mb.reshape(x=timestep, shape=[1, 1, 1, 1])
    return mb.cast(x=mb.add(x=mb.mul(x=sample, y=np.float32(3)), y=time), dtype="fp16", name="conv_in")


def second(conv_in: Any, encoder_hidden_states: Any) -> Any:
    """noise_pred = conv_in + mean of the text"""
    text = mb.reduce_mean(x=encoder_hidden_states, axes=[1, 3], keep_dims=True, name="mid_block_to_q")
    return mb.add(x=conv_in, y=text, name="noise_pred")


def spec(name: str, *shape: int | str, dtype: Any = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=list(shape))


@pytest.fixture
def chunked(tmp_path: Path, toy_manifest: Manifest) -> tuple[Path, Manifest]:
    """A UNet in two chunks, of which only the second reads the text and only the first the time."""
    ends = {"sample": np.zeros((1, 2, 2, 2), np.float32), "timestep": np.zeros(1, np.float32)}
    save_built(tmp_path / "UnetChunk1.mlpackage", first, ends)
    ends = {"conv_in": np.zeros((1, 2, 2, 2), np.float16), "encoder_hidden_states": np.zeros((1, 3, 1, 2), np.float16)}
    save_built(tmp_path / "UnetChunk2.mlpackage", second, ends)
    own = [spec("sample", 1, 2, 2, 2), spec("timestep", 1), spec("encoder_hidden_states", 1, 3, 1, 2, dtype="float16")]
    prediction = [spec("noise_pred", 1, 2, 2, 2, dtype="float16")]
    unet = ComponentSpec(
        file="UnetChunk1.mlpackage/Manifest.json",
        packages=["UnetChunk1.mlpackage", "UnetChunk2.mlpackage"],
        inputs=own,
        outputs=prediction,
        loop=loop_spec("unet", own, prediction),
    )
    return tmp_path, toy_manifest.model_copy(update={"target": "coreml", "components": {"unet": unet}})


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    values = {
        "sample": rng.standard_normal((ITEMS, 2, 2, 2)),
        "encoder_hidden_states": rng.standard_normal((ITEMS, 2, 3)),
    }
    return {name: value.astype(np.float16).astype(np.float32) for name, value in values.items()} | {
        "timestep": np.array(2.0, np.float32)
    }


def expected(given: dict[str, np.ndarray]) -> np.ndarray:
    text = given["encoder_hidden_states"].mean((1, 2)).reshape(ITEMS, 1, 1, 1)
    return 3 * given["sample"] + given["timestep"] + text


@pytest.mark.parametrize("mode", MODES)
def test_chunks_hand_on_what_crosses_and_the_inputs_that_each_reads(
    chunked: tuple[Path, Manifest], mode: Any, mac: Any
) -> None:
    given = inputs()
    found = CoreMLRunner(*chunked, mode).run("unet", given)
    assert list(found) == ["out_sample"]
    assert found["out_sample"].dtype == np.float32
    np.testing.assert_allclose(found["out_sample"], expected(given), rtol=2e-3, atol=2e-3)


def test_layers_of_both_chunks_are_shown_also_one_that_crosses(chunked: tuple[Path, Manifest]) -> None:
    given = inputs()
    layers = ["mid_block.to_q", "conv_in", "conv_out"]
    found = CoreMLRunner(*chunked).run_layers("unet", given, layers)
    assert list(found) == ["mid_block.to_q", "conv_in"]
    np.testing.assert_allclose(found["conv_in"], 3 * given["sample"] + 2, rtol=1e-3, atol=1e-3)
    assert len(found["mid_block.to_q"]) == ITEMS


def test_core_ml_shows_no_layers(chunked: tuple[Path, Manifest], mac: Any) -> None:
    assert CoreMLRunner(*chunked, None).run_layers("unet", inputs(), ["conv_in"]) == {}


def test_a_mac_draws_with_core_ml_and_every_other_system_with_the_evaluator(
    chunked: tuple[Path, Manifest], request: pytest.FixtureRequest
) -> None:
    elsewhere = open_runner(*chunked)
    assert isinstance(elsewhere, CoreMLRunner)
    assert elsewhere.mode == "fp32"
    with pytest.raises(TurbopocketError, match=r"UnetChunk1\.mlpackage cannot be run by Core ML: .* not a Mac"):
        CoreMLRunner(*chunked, None).run("unet", inputs())
    request.getfixturevalue("mac")
    here = open_runner(*chunked)
    assert isinstance(here, CoreMLRunner)
    assert here.mode is None


def test_what_core_ml_says_of_a_package_is_one_clear_error(chunked: tuple[Path, Manifest], mac: Any) -> None:
    mac.newest_version = 8
    with pytest.raises(TurbopocketError, match=r"UnetChunk1\.mlpackage: Core ML on this Mac says: .* version 9 but"):
        CoreMLRunner(*chunked, None).run("unet", inputs())
    mac.newest_version, mac.compile_error = 9, "compiler error: unsupported axis"
    with pytest.raises(TurbopocketError, match="Core ML on this Mac says: compiler error: unsupported axis"):
        CoreMLRunner(*chunked, None).run("unet", inputs())


def test_chunks_in_which_a_value_is_missing_are_refused_by_name(chunked: tuple[Path, Manifest]) -> None:
    folder, manifest = chunked
    (folder / "UnetChunk1.mlpackage").rename(folder / "first")
    (folder / "UnetChunk2.mlpackage").rename(folder / "UnetChunk1.mlpackage")
    (folder / "first").rename(folder / "UnetChunk2.mlpackage")
    with pytest.raises(TurbopocketError, match=r"UnetChunk1\.mlpackage: input conv_in is made by no package before it"):
        CoreMLRunner(folder, manifest).run("unet", inputs())


def test_a_package_without_an_output_of_the_manifest_is_refused(chunked: tuple[Path, Manifest]) -> None:
    folder, manifest = chunked
    unet = manifest.components["unet"]
    outputs = [*unet.outputs, spec("variance", 1, 2, 2, 2)]
    loop = loop_spec("unet", unet.inputs, outputs)
    more = unet.model_copy(update={"outputs": outputs, "loop": loop})
    manifest = manifest.model_copy(update={"components": {"unet": more}})
    with pytest.raises(TurbopocketError, match="gives noise_pred: variance is missing"):
        CoreMLRunner(folder, manifest).run("unet", inputs())
