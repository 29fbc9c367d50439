# SPDX-License-Identifier: Apache-2.0
"""Scales and zero points of activations that depend on the timestep, looked up in the graph itself.

Finite set calibration (Huang et al., TFMQ-DM, arXiv 2311.16503, section 4.3): a schedule has few timesteps, so each has
its own. All of a graph are one table, a row for each timestep; the row nearest to the `timestep` that the graph is
given anyway is gathered once and split, so readers have nothing to do and layers run the operators that constants have.
T timesteps, L tensors that are rounded.
"""

import hashlib
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from onnx import GraphProto, NodeProto, TensorProto, helper
from torch import Tensor, nn

from ....ground.errors import TurbopocketError
from ....quant.activations import QParams
from ....quant.ranges import nearest
from ....quant.rounding import rounded
from ...families.graphs import TIMESTEP, Component

STEP = "step"
"""The value that holds the index of the timestep."""
_TIMESTEPS, _SCALES, _ZERO_POINTS = "step.timesteps", "step.scales", "step.zero_points"


@dataclass(frozen=True)
class StepColumn:
    """Scale and zero point of one tensor at each timestep, named by their values: equal ones are one column."""

    timesteps: tuple[float, ...]
    qparams: tuple[QParams, ...]

    @property
    def names(self) -> list[str]:
        """Of the values that are the current timestep's: scale, and unsigned zero point."""
        return [f"scale.{self._digest}", f"zero_point.{self._digest}"]

    def all_scales(self) -> TensorProto:
        """The scales of all timesteps, [T, 1]."""
        return TensorProto(
            name=f"scales.{self._digest}",
            data_type=TensorProto.FLOAT,
            dims=[len(self.qparams), 1],
            raw_data=_floats(each.scale for each in self.qparams),
        )

    @property
    def _digest(self) -> str:
        stored = _floats(each.scale for each in self.qparams) + _zero_points(self.qparams)
        return f"{STEP}.{hashlib.sha256(stored).hexdigest()[:12]}"


def step_lookup(columns: Iterable[StepColumn]) -> GraphProto:
    """Tables and nodes that give the values which columns name, from the input `timestep`; nothing of no columns.

    Raises TurbopocketError when layers saw different timesteps.
    """
    distinct = list({column.names[0]: column for column in columns}.values())
    if not distinct:
        return GraphProto()
    timesteps = distinct[0].timesteps
    for column in distinct:
        if column.timesteps != timesteps:
            raise TurbopocketError(
                f"layers of one graph were calibrated at timesteps {_shown(timesteps)}, others at "
                f"{_shown(column.timesteps)}"
            )
    by_step = list(zip(*(column.qparams for column in distinct), strict=True))
    shape = [len(timesteps), len(distinct)]
    tables = [
        TensorProto(name=_TIMESTEPS, data_type=TensorProto.FLOAT, dims=shape[:1], raw_data=_floats(timesteps)),
        TensorProto(
            name=_SCALES,
            data_type=TensorProto.FLOAT,
            dims=shape,
            raw_data=b"".join(_floats(each.scale for each in row) for row in by_step),
        ),
        TensorProto(
            name=_ZERO_POINTS,
            data_type=TensorProto.UINT8,
            dims=shape,
            raw_data=b"".join(_zero_points(row) for row in by_step),
        ),
    ]
    scales, zero_points = zip(*(column.names for column in distinct), strict=True)
    nodes = [*_nearest(), *_current(_SCALES, scales), *_current(_ZERO_POINTS, zero_points)]
    return GraphProto(node=nodes, initializer=tables)


def _nearest() -> list[NodeProto]:
    """The index of the nearest timestep, of two alike the first; all of a batch have the same."""
    asked, distance, length = (f"{STEP}.{part}" for part in ("asked", "distance", "length"))
    return [
        helper.make_node("ReduceMax", [TIMESTEP], [asked], keepdims=0),
        helper.make_node("Sub", [_TIMESTEPS, asked], [distance]),
        helper.make_node("Abs", [distance], [length]),
        helper.make_node("ArgMin", [length], [STEP], axis=0, keepdims=0),
    ]


def _current(table: str, names: Iterable[str]) -> list[NodeProto]:
    """One value of each column, [1]."""
    row, outputs = f"{table}.now", list(names)
    return [
        helper.make_node("Gather", [table, STEP], [row], axis=0),
        helper.make_node("Split", [row], outputs, axis=0, num_outputs=len(outputs)),
    ]


def _floats(values: Iterable[float]) -> bytes:
    return b"".join(struct.pack("<f", value) for value in values)


def _zero_points(values: Iterable[QParams]) -> bytes:
    return bytes(each.zero_point - each.lowest for each in values)


def _shown(timesteps: Iterable[float]) -> str:
    return ", ".join(f"{each:g}" for each in timesteps)


class StepClock:
    """Which timestep a component in PyTorch is called at, for layers that round as the graph does."""

    def __init__(self) -> None:
        self.timestep: float | None = None

    def rounded(self, x: Tensor, column: StepColumn) -> Tensor:
        """x in the column's qparams of the nearest timestep."""
        return rounded(x, column.qparams[self._step(column)])

    def row(self, table: Tensor, column: StepColumn) -> Tensor:
        """The row of a table [T, ...] that belongs to the timestep of the column which is nearest."""
        return table[self._step(column)]

    def _step(self, column: StepColumn) -> int:
        if self.timestep is None:
            raise TurbopocketError("a layer that rounds by the timestep was called without one")
        return nearest(column.timesteps, self.timestep)

    def watch(self, component: Component) -> None:
        """From now on a call of the component sets the timestep, where it is given one."""
        if TIMESTEP in component.example_inputs:
            component.module.register_forward_pre_hook(self._seeing(list(component.example_inputs).index(TIMESTEP)))

    def _seeing(self, index: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.timestep = float(inputs[index].max())

        return see
