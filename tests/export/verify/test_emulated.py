# SPDX-License-Identifier: Apache-2.0
"""`check --cpu`: the same artifact on an emulated ARM CPU, and a weight that is wrong there only."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from turbopocket.export.checkpoint.load import load
from turbopocket.export.evidence import evidence_for
from turbopocket.export.families.components import components_of
from turbopocket.export.output.names import WEIGHTS_FILE
from turbopocket.export.recipe import recipe_of
from turbopocket.export.target_options import OnnxOptions
from turbopocket.export.targets.onnx.target import Onnx
from turbopocket.export.targets.registry import open_target
from turbopocket.export.verify.emulated import Emulated, measure_emulated
from turbopocket.export.verify.gaps import NO_LIMITS, Session
from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.store import load_weights
from turbopocket.runtimes.arm64.cpus import parse_cpu
from turbopocket.runtimes.arm64.emulator import Emulator
from turbopocket.runtimes.arm64.setup import open_emulator
from turbopocket.runtimes.compare.rows import ParityReport
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers
from turbopocket.runtimes.manifest import load_manifest

pytestmark = pytest.mark.timeout(1800)  # the first run sets up the emulated CPU
Run = Callable[..., Any]
CPU = "arm64:cortex-a76"
GUILTY = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"


def scale_weight(folder: Path, layer: str, factor: float) -> None:
    """Multiplies the stored scales (or values) of one of the UNet's layers, in the file."""
    graph = onnx.load(folder / "unet" / "model.onnx", load_external_data=False).graph
    (found,) = [
        tensor
        for tensor in graph.initializer
        if tensor.name.startswith(layer) and tensor.data_type == onnx.TensorProto.FLOAT16 and "bias" not in tensor.name
    ]
    place = {entry.key: entry.value for entry in found.external_data}
    start, length = int(place.get("offset", 0)), int(place["length"])
    data = folder / "unet" / place["location"]
    content = bytearray(data.read_bytes())
    values = np.frombuffer(content[start : start + length], dtype=np.float16)
    content[start : start + length] = (values * np.float16(factor)).tobytes()
    data.write_bytes(content)


def emulated_with(artifact: Path, on_arm: Path, emulator_cache: Path) -> Emulated:
    """The comparison of `artifact` with what the ARM CPU does with the files in `on_arm`."""
    manifest = load_manifest(artifact)
    recipe = recipe_of(artifact, manifest)
    target = open_target(recipe.target)
    model = load(recipe.model.source, recipe.model.lora, recipe.sampler.steps)
    evidence = evidence_for(model)
    prompts = evidence.prompts("report", 1, recipe.seed)
    session = Session(manifest, open_tokenizers(artifact, manifest), prompts, recipe.seed)
    weights = load_weights(artifact.with_name("art.report") / WEIGHTS_FILE)
    native = target.runtimes(artifact, manifest, weights, 1e-4)["onnxruntime"]
    runtime = target.emulated(on_arm, manifest, weights, parse_cpu(CPU), open_emulator(emulator_cache))
    compression = ParityReport(limits=NO_LIMITS, rows=[], pictures=[])
    both = components_of(model), components_of(model)
    try:
        return measure_emulated(*both, weights, runtime, native, compression, session, evidence, lambda: None)
    finally:
        runtime.runner.close()


def test_check_puts_arm_beside_this_cpu_and_pytorch(turbopocket: Run, artifact: Path, emulator_cache: Path) -> None:
    ran = turbopocket("check", artifact, "--cpu", CPU, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["emulated"][CPU]
    for other, limit in (("to_pytorch", 1e-4), ("to_native", 1e-5)):
        rows = found[other]["rows"]
        assert {row["component"] for row in rows} == {"text_encoder", "text_encoder_2", "unet", "vae_decoder"}
        assert max(row["relative_error"] for row in rows) <= limit
    assert len({row["timestep"] for row in found["to_native"]["rows"] if row["component"] == "unet"}) == found["steps"]
    (picture,) = found["to_pytorch"]["pictures"]
    assert picture["ssim"] > 0.999
    assert found["instructions_by_kernel"]["fp32"] > 0


def test_weight_that_is_wrong_on_arm_turns_its_component_red_and_is_named(
    artifact: Path, emulator_cache: Path, tmp_path: Path
) -> None:
    on_arm = Path(shutil.copytree(artifact, tmp_path / "on_arm"))
    scale_weight(on_arm, GUILTY, 2.0)
    found = emulated_with(artifact, on_arm, emulator_cache)
    for report in (found.to_pytorch, found.to_native):
        assert {row.component for row in report.rows if not row.passed} == {"unet"}
        assert report.first_divergence is not None
        assert (report.first_divergence.component, report.first_divergence.layer) == ("unet", GUILTY)
    assert f"the first layer to diverge is unet.{GUILTY}" in (found.failure or "")


@pytest.mark.parametrize(
    ("accuracy_level", "cpu", "to_pytorch", "to_native"),
    [
        (1, "arm64:cortex-a53", 1e-4, 1e-5),
        (1, "arm64:i8mm", 1e-4, 1e-5),
        (4, "arm64:cortex-a53", 1e-4, 1.5e-2),  # it has no kernels for int8 and computes in fp32
        (4, "arm64:cortex-a76", 1e-2, 1.5e-2),
    ],
)
def test_limits_are_those_of_the_kernels_that_run(
    built: Any, accuracy_level: int, cpu: str, to_pytorch: float, to_native: float
) -> None:
    target, anywhere = Onnx(OnnxOptions(accuracy_level)), Emulator(Path("nowhere"))
    runtime = target.emulated(built.folder, load_manifest(built.folder), {}, parse_cpu(cpu), anywhere)
    assert runtime.to_pytorch.max_relative_error == to_pytorch
    assert runtime.to_native.max_relative_error == to_native


def test_weights_prepacked_for_this_cpu_are_not_run_on_another(built: Any) -> None:
    target, anywhere = Onnx(OnnxOptions(prepacked=True)), Emulator(Path("nowhere"))
    with pytest.raises(TurbopocketError, match="prepacked for the CPU that built them, they do not run on arm64:"):
        target.emulated(built.folder, load_manifest(built.folder), {}, parse_cpu(CPU), anywhere)


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (
            ["--cpu", "arm64:m1"],
            "`arm64:m1` is not an emulated CPU: known are arm64:cortex-a53, arm64:cortex-a76",
            None,
        ),
        (["--cpu", CPU, "--cache", "nowhere"], "nowhere holds no emulated ARM CPU", "turbopocket arm64 setup"),
    ],
)
def test_cpu_that_is_not_there_is_one_clear_error(
    turbopocket: Run, artifact: Path, arguments: list[str], message: str, hint: str | None
) -> None:
    ran = turbopocket("check", artifact, *arguments)
    assert (ran.code, ran.out) == (1, "")
    assert f"error: {message}" in ran.err
    assert hint is None or f"hint: {hint}" in ran.err


def test_artifact_without_its_stored_weights_can_not_be_compared(
    turbopocket: Run, artifact: Path, emulator_cache: Path
) -> None:
    shutil.rmtree(artifact.with_name("art.report"))
    ran = turbopocket("check", artifact, "--cpu", CPU)
    assert ran.code == 1
    assert f"can not be compared on {CPU}: " in ran.err
