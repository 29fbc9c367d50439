# SPDX-License-Identifier: Apache-2.0
"""Apple's own runtime, through coremltools, which only a Mac has."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ground.arrays import Arrays
from ...ground.errors import TurbopocketError
from .file.package import coremltools_module
from .file.program import Program


def on_a_mac() -> bool:
    """Whether this system has Core ML."""
    return sys.platform == "darwin"


class AppleEngine:
    """One package in Core ML, on whatever units it chooses; our reader says what the package holds.

    TurbopocketError when this is no Mac. Core ML's refusal of a package is raised by `run`.
    """

    values: tuple[str, ...] = ()
    """Core ML shows nothing inside a program."""

    def __init__(self, path: Path) -> None:
        if not on_a_mac():
            raise TurbopocketError(f"{path.name} cannot be run by Core ML: this system is {sys.platform}, not a Mac")
        program = Program.open(path)
        self.where, self.inputs, self.outputs = program.where, program.inputs, program.outputs
        with warnings.catch_warnings():  # that it could not be loaded; `predict` then raises the reason
            warnings.simplefilter("ignore", RuntimeWarning)
            self._model = coremltools_module("models").MLModel(str(path))

    def run(self, inputs: Mapping[str, NDArray[Any]], also: Sequence[str] = ()) -> Arrays:
        """The outputs by name, fp16 ones as float32. TurbopocketError with Core ML's own words when it refuses."""
        try:
            # Core ML gets each array's own memory, and refuses what it could not write to
            found: Arrays = self._model.predict({name: np.array(value) for name, value in inputs.items()})
        except Exception as error:  # coremltools raises plain Exception for all that Core ML says
            raise TurbopocketError(f"{self.where}: Core ML on this Mac says: {error}") from error
        return found
