# SPDX-License-Identifier: Apache-2.0
"""A lowered ExecuTorch program in the C++ runner, here and on an emulated ARM CPU, beside the Python bindings."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turbopocket.export.targets.executorch import program as target
from turbopocket.runtimes.arm64.cpus import parse_cpu
from turbopocket.runtimes.arm64.setup import open_emulator
from turbopocket.runtimes.compare.metrics import relative_error
from turbopocket.runtimes.executorch.native.runner import EmulatedExecuTorchRunner, ExecuTorchNativeRunner
from turbopocket.runtimes.executorch.runner import ExecuTorchRunner

from ..stand_ins import OneComponent
from ..targets.executorch.test_lower_executorch import FORMATS, component, compressed

pytestmark = pytest.mark.timeout(1800)  # the first run sets up the emulated CPU and builds the runner


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """What a runner is made of: folder, manifest, layers by key."""
    part = component()
    weights, folder = compressed(part, FORMATS), tmp_path_factory.mktemp("executorch")
    manifest = OneComponent({"part": target.lower(target.trace(part), weights, folder)})
    return folder, manifest, target.layers_by_key(weights)


@pytest.mark.parametrize("cpu", [None, "arm64:cortex-a53", "arm64:cortex-a76"])
def test_cpp_runner_agrees_with_the_bindings_on_every_layer(
    asked: tuple[Path, Any, Any], emulator_cache: Path, cpu: str | None
) -> None:
    sample = {"sample": np.random.default_rng(1).standard_normal((1, 4, 8, 8), dtype=np.float32)}
    bindings = ExecuTorchRunner(*asked)
    expected, layers = bindings.run("part", sample), bindings.run_layers("part", sample, list(FORMATS))
    emulator = open_emulator(emulator_cache)
    if cpu is None:
        runner = ExecuTorchNativeRunner(*asked)
    else:
        runner = EmulatedExecuTorchRunner(*asked, parse_cpu(cpu), emulator)
    with closing(runner):
        assert relative_error(runner.run("part", sample)["row"], expected["row"]) < 1e-5
        found = runner.run_layers("part", sample, list(FORMATS))
        assert list(found) == list(layers)
        for layer, value in found.items():
            assert relative_error(value, layers[layer]) < 1e-5, layer
        if isinstance(runner, EmulatedExecuTorchRunner):
            counts = runner.kernels()
            assert counts["fp32"] > 0
            assert (counts["dot product"] > 0) == (cpu == "arm64:cortex-a76")
