# SPDX-License-Identifier: Apache-2.0
"""coremltools' binding of Core ML for machines that have none: its rules for arrays, our evaluator behind them.

All Python of `MLModel` is coremltools' own. The rules are those of coremltools 9's `CoreMLPythonArray.mm` and
`CoreMLPythonUtils.mm`: an input is memory that Core ML may write to, of float32, float64 or int32, and an fp16 output
comes as float32.
"""

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

TAKEN = ("float32", "float64", "int32")


class StandIn:
    """In the place of `coremltools.models.model._MLModelProxy`; class attributes say what the "Mac" can do."""

    newest_version: ClassVar[int] = 10
    compile_error: ClassVar[str | None] = None

    def __init__(self, path: str, compute_units: str, function: str, hints: dict[str, str], asset: None) -> None:
        from turbopocket.runtimes.coreml.evaluate.evaluator import Evaluator
        from turbopocket.runtimes.coreml.file.program import Program

        if self.compile_error:
            raise RuntimeError(self.compile_error)
        self.evaluator = Evaluator(Program.open(Path(path), function or None), "fp16")

    @classmethod
    def maximum_supported_specification_version(cls) -> int:
        """The newest package that the "Mac" opens."""
        return cls.newest_version

    def predict(self, data: dict[str, np.ndarray], state: None) -> dict[str, np.ndarray]:
        """What the evaluator computes in fp16."""
        for name, value in data.items():
            if value.dtype.name not in TAKEN or not value.flags.writeable:
                raise RuntimeError(f"value type not convertible: {name} {value.dtype}")
        given = {spec.name: data[spec.name].astype(spec.dtype) for spec in self.evaluator.inputs}
        found = self.evaluator.run(given)
        return {name: value.astype(np.float32) if value.dtype == np.float16 else value for name, value in found.items()}


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """This machine passes for a Mac; a class of its own, to be changed at will."""
    from turbopocket.runtimes.coreml import apple
    from turbopocket.runtimes.coreml.file.package import coremltools_module

    class OneMac(StandIn):
        pass

    monkeypatch.setattr(apple, "on_a_mac", lambda: True)
    model = coremltools_module("models.model")
    monkeypatch.setattr(model, "_MLModelProxy", OneMac)
    monkeypatch.setattr(model, "_macos_version", lambda: (15, 0))
    return OneMac
