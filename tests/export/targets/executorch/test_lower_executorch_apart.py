# SPDX-License-Identifier: Apache-2.0
"""Programs whose weights lie in a .ptd file beside them: the same numbers, and clear errors for a wrong file."""

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turbopocket.export.target_options import ExecuTorchOptions
from turbopocket.export.targets.executorch.gate import require_constants
from turbopocket.export.targets.executorch.target import ExecuTorch
from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.scheme import Scheme
from turbopocket.runtimes.executorch.native.runner import ExecuTorchNativeRunner
from turbopocket.runtimes.executorch.runner import ExecuTorchRunner

from ...stand_ins import OneComponent
from .test_lower_executorch import FORMATS, Lowered, component, compressed

pytest.importorskip("executorch")

TARGET = ExecuTorch(ExecuTorchOptions(weights="apart"))


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    part = component()
    traced, weights, folder = TARGET.trace(part), compressed(part, FORMATS), tmp_path_factory.mktemp("apart")
    return Lowered(folder, part, traced, weights, TARGET.lower(traced, weights, folder))


@pytest.fixture
def sample() -> dict[str, Any]:
    return {"sample": np.random.default_rng(1).standard_normal((1, 4, 8, 8), dtype=np.float32)}


def asked(lowered: Lowered, folder: Path | None = None) -> tuple[Path, Any, Any]:
    from turbopocket.export.targets.executorch.program import layers_by_key

    return folder or lowered.folder, OneComponent({"part": lowered.spec}), layers_by_key(lowered.weights)


def test_numbers_are_those_of_the_program_that_holds_its_weights(
    apart: Lowered, sample: dict[str, Any], tmp_path: Path
) -> None:
    inside = ExecuTorch()
    manifest: Any = OneComponent({"part": inside.lower(inside.trace(apart.component), apart.weights, tmp_path)})
    expected = ExecuTorchRunner(tmp_path, manifest, asked(apart)[2])
    found = ExecuTorchRunner(*asked(apart))
    assert np.array_equal(found.run("part", sample)["row"], expected.run("part", sample)["row"])
    layers = list(FORMATS)
    shown = found.run_layers("part", sample, layers)
    assert set(shown) == set(layers)
    for layer, value in expected.run_layers("part", sample, layers).items():
        assert np.array_equal(shown[layer], value), layer


def test_the_cpp_runner_opens_both_files(apart: Lowered, sample: dict[str, Any]) -> None:
    expected = ExecuTorchRunner(*asked(apart))
    with closing(ExecuTorchNativeRunner(*asked(apart))) as runner:
        assert np.allclose(runner.run("part", sample)["row"], expected.run("part", sample)["row"], rtol=1e-5)
        shown = runner.run_layers("part", sample, ["query"])["query"]
    assert np.allclose(shown, expected.run_layers("part", sample, ["query"])["query"], rtol=1e-4, atol=1e-6)


def test_all_weights_are_in_the_second_file_and_bytes_are_planned(apart: Lowered) -> None:
    assert TARGET.files(apart.spec) == ["part.pte", "part.ptd"]
    program, data = (apart.folder / name for name in TARGET.files(apart.spec))
    require_constants(data, apart.weights)
    with pytest.raises(TurbopocketError, match=r"part\.pte does not hold"):
        require_constants(program, apart.weights)
    found = program.stat().st_size + data.stat().st_size
    formats = {name: Scheme(weight.format) for name, weight in apart.weights.items()}
    planned = TARGET.lowered_bytes(apart.traced, formats)
    assert found <= planned <= found + 14_000
    layers = sum(weight.nbytes for weight in apart.weights.values())
    assert planned <= TARGET.fixed_bytes(apart.traced, dict.fromkeys(formats, frozenset(formats.values()))) + layers


def test_a_missing_cut_off_or_other_second_file_is_one_clear_error(
    apart: Lowered, sample: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "art"
    shutil.copytree(apart.folder, folder)
    whole = (folder / "part.ptd").read_bytes()
    for content, message in (
        (whole[:-1], r"part\.ptd is cut off: it has .* bytes, its header says"),
        (whole[:10], r"part\.ptd is no file of ExecuTorch's constants"),
        (b"PK\x03\x04" * 100, r"part\.ptd is no file of ExecuTorch's constants"),
        (None, r"part\.ptd is missing"),
    ):
        (folder / "part.ptd").unlink()
        if content is not None:
            (folder / "part.ptd").write_bytes(content)
        for runner in (ExecuTorchRunner(*asked(apart, folder)), ExecuTorchNativeRunner(*asked(apart, folder))):
            with pytest.raises(TurbopocketError, match=message):
                runner.run("part", sample)
            if isinstance(runner, ExecuTorchNativeRunner):
                runner.close()
        if content is None:
            break
