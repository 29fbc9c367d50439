# SPDX-License-Identifier: Apache-2.0
"""ExecuTorch on the CPU, in a process of its own: a damaged program may take that down, and nothing else."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ...ground.arrays import Arrays
from ...ground.errors import TurbopocketError
from ..kernels.library import executorch_operators
from ..manifest import ComponentSpec, Manifest, TensorSpec
from ..runner import component_spec
from ..served.runner import ServedRunner
from .file import data_file, read_layout
from .shown_layers import LayerName, Shown, with_layer_outputs

_DTYPES = {6: "float32", 4: "int64", 3: "int32", 11: "bool", 1: "int8", 0: "uint8", 5: "float16"}
"""PyTorch's numbers for types of scalars, as programs have them."""


class ProgramRunner(ServedRunner):
    """Runs an artifact's programs; they are mapped, and opened on the first run of their component.

    `layers` tells `run_layers` which layer of a component has which weight, by the SHA-256 of its bytes as lowered.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, layers: Mapping[str, Mapping[str, LayerName]] | None = None
    ) -> None:
        super().__init__(folder, manifest)
        self.layers = layers or {}
        self._shown: dict[str, Shown] = {}

    def run_layers(self, component: str, inputs: Mapping[str, NDArray[Any]], layers: Sequence[str]) -> Arrays:
        """Outputs of the layers whose weights the runner was told of, in execution order, from a second program.

        Of several layers of equal weights only one is shown. Raises TurbopocketError as `run` does.
        """
        spec = component_spec(self.manifest, component)
        given = self._in_order(component, inputs)
        process, key = self._started(), f"{component} with layers"
        if component not in self._shown:
            shown = with_layer_outputs((self.folder / spec.file).read_bytes(), self.layers.get(component, {}))
            program = self.scratch / f"{component}.pte"
            program.write_bytes(shown.program)
            process.open(key, program, self._weights(spec))
            self._shown[component] = Shown(b"", shown.layers)
        kept = self._shown[component].layers
        names = [f"layer {index}" for index in range(len(kept))]
        found = process.run(key, given, [output.name for output in spec.outputs] + names)
        pairs = zip(kept, names, strict=True)
        return {layer.path: layer.as_pytorch_has_it(found[name]) for layer, name in pairs if layer.path in layers}

    def _weights(self, spec: ComponentSpec) -> str:
        return str(data_file(self.folder, spec) or "")


class ExecuTorchRunner(ProgramRunner):
    """The same by way of ExecuTorch's Python bindings."""

    def _open(self, component: str, spec: ComponentSpec) -> Arrays:
        _require_operators(component, self.folder / spec.file)
        said = super()._open(component, spec)
        for side, specs in (("input", spec.inputs), ("output", spec.outputs)):
            _require_tensors(component, side, specs, said)
        return said

    def _command(self) -> tuple[list[str], str, Mapping[str, str] | None]:
        return [sys.executable, "-m", f"{__package__}.serve"], "ExecuTorch", None


def _require_operators(component: str, program: Path) -> None:
    """Raises TurbopocketError where the program names operators of ours, and they were not built."""
    if read_layout(program).needs_operators and executorch_operators() is None:
        raise TurbopocketError(
            f"{component}: the program needs codebook kernels, which are not built here",
            hint="make kernels; or build with target.executorch.codebooks = 'portable'",
        )


def _require_tensors(component: str, side: str, specs: Sequence[TensorSpec], said: Arrays) -> None:
    count = sum(name.startswith(side) for name in said)
    if count != len(specs):
        raise TurbopocketError(f"{component}: the program has {count} {side}s, the manifest says {len(specs)}")
    for index, spec in enumerate(specs):
        number, *shape = said[f"{side} {index}"].tolist()
        dtype = _DTYPES.get(number, f"type {number}")
        if dtype != spec.dtype or shape != spec.shape:
            raise TurbopocketError(
                f"{component}: the program's {side}s have {spec.name} as {dtype} {shape}, "
                f"the manifest says {spec.dtype} {spec.shape}"
            )
