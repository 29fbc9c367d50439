# SPDX-License-Identifier: Apache-2.0
"""Every op computes what PyTorch computes, in the shape and type that coremltools declares for it.

Where coremltools can fold the op over constants, the folded value is a second, independent reference.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from turbopocket.runtimes.coreml.evaluate.evaluator import Evaluator
from turbopocket.runtimes.coreml.evaluate.registry import OPS
from turbopocket.runtimes.coreml.file.program import Program

from .conftest import ct, mb, save_built, types
from .op_cases import CASES

EDGES = (types.fp32, types.int32)


def built(kind: str, parameters: Mapping[str, Any]) -> Callable[..., Any]:
    """The op on positional variables: `values` of joining ops, else by the names of the case's inputs."""
    names = {"concat": "values", "stack": "values", "einsum": "values"}

    def build(*variables: Any, **by_name: Any) -> Any:
        if kind in names:
            return getattr(mb, kind)(**{names[kind]: variables}, **parameters)
        return getattr(mb, kind)(**by_name, **parameters)

    return build


def _ids(item: Any) -> str:
    return item if isinstance(item, str) else ""


class Ran:
    """All cases of one target as one program, and what the evaluator finds for each in each mode."""

    def __init__(self, path: Path, target: str) -> None:
        self.names: dict[int, list[str]] = {}
        edges: dict[str, np.ndarray] = {}
        for number, (_, wanted, inputs, _, _) in enumerate(CASES):
            if wanted == target:
                given = {
                    name: value.astype(np.float32 if value.dtype == np.bool_ else value.dtype)
                    for name, value in inputs.items()
                }
                edges |= {f"case{number}_{name}": value for name, value in given.items()}

        def main(*variables: Any) -> Any:
            return self._ops(target, dict(zip(edges, variables, strict=True)))

        program = Program.open(save_built(path, main, edges, target))
        asked = [name for names in self.names.values() for name in names]
        plain, recording = Evaluator(program), Evaluator(program, "acc16", statistics=True)
        # nothing here is declared fp16, so the paths that record bounds (attention head by head) must agree as well
        self.found = {"fp32": plain.run(edges, asked), "acc16": recording.run(edges, asked)}
        self.types = program.function.types

    def _ops(self, target: str, variables: dict[str, Any]) -> list[Any]:
        results = []
        for number, (kind, wanted, inputs, parameters, _) in enumerate(CASES):
            if wanted != target:
                continue
            given = {
                name: mb.cast(x=variables[f"case{number}_{name}"], dtype="bool")
                if value.dtype == np.bool_
                else variables[f"case{number}_{name}"]
                for name, value in inputs.items()
            }
            found = built(kind, parameters)(*given.values(), **given)
            found = found if isinstance(found, list | tuple) else [found]
            self.names[number] = [item.name for item in found]
            # the ends of a model are float32 or int32, so other results are looked at inside
            results += [
                mb.cast(x=item, dtype="fp32") if item.dtype not in EDGES else mb.identity(x=item) for item in found
            ]
        return results


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    folder = tmp_path_factory.mktemp("ops")
    return {target: Ran(folder / f"{target}.mlpackage", target) for target in {item[1] for item in CASES}}


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: f"{number}-{CASES[number][0]}")
@pytest.mark.parametrize("mode", ["fp32", "acc16"])
def test_op_is_what_pytorch_computes(ran: dict[str, Ran], number: int, mode: str) -> None:
    _, target, inputs, _, expected = CASES[number]
    wanted = expected(*(torch.from_numpy(value) for value in inputs.values()))
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    for name, reference in zip(ran[target].names[number], wanted, strict=True):
        found = ran[target].found[mode][name]
        np.testing.assert_allclose(found, reference.numpy(), rtol=2e-5, atol=2e-5)
        assert (found.dtype.kind == "f") == reference.is_floating_point()


# coremltools ignores `interleave` when it folds, and raises on `exclusive`
MISFOLDED = {"interleave", "exclusive"}
FOLDABLE = [
    item for item in CASES if item[0] not in ("identity", "shape", "cast", "quantize") and not MISFOLDED & set(item[3])
]


@pytest.mark.parametrize(("kind", "target", "inputs", "parameters", "expected"), FOLDABLE, ids=_ids)
def test_reference_is_what_coremltools_folds(
    kind: str, target: str, inputs: dict[str, np.ndarray], parameters: dict[str, Any], expected: Callable[..., Any]
) -> None:
    """The references above are ours; coremltools' own evaluation of the op, where it has one, must agree."""
    folded: list[Any] = []

    def main(unused: Any) -> Any:
        constants = [mb.const(val=value) for value in inputs.values()]
        found = built(kind, parameters)(*constants, **dict(zip(inputs, constants, strict=True)))
        folded.extend(found if isinstance(found, list | tuple) else [found])
        return mb.identity(x=unused)

    mb.program(input_specs=[mb.TensorSpec(shape=(1,))], opset_version=getattr(ct.target, target))(main)
    if any(item.val is None for item in folded):
        pytest.skip("coremltools does not fold this op")
    wanted = expected(*(torch.from_numpy(value) for value in inputs.values()))
    for item, reference in zip(folded, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        np.testing.assert_allclose(np.asarray(item.val), reference.numpy(), rtol=2e-5, atol=2e-5)


def test_every_op_has_a_case() -> None:
    elsewhere = {"dequantize", "fill"}
    assert {item[0] for item in CASES} | elsewhere == set(OPS)
