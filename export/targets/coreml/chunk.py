# SPDX-License-Identifier: Apache-2.0
"""A program cut in two that run one after the other, for phones that can not load it in one piece."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ....runtimes.coreml.file.dtypes import TensorType
from .blobs import blob_bytes
from .mil import Message, blobs_of, is_constant, read_names, type_of
from .package import can_cross

_SLACK = 0.05
"""How far from the middle of the weights a cut may lie, in favour of fewer bytes that cross it."""


@dataclass(frozen=True)
class Chunk:
    """A part of a program: its operations, constants included, and the tensors that go in and come out."""

    operations: list[Message]
    inputs: dict[str, TensorType]
    outputs: dict[str, TensorType]


def halves(
    operations: Sequence[Message],
    inputs: Mapping[str, TensorType],
    outputs: Mapping[str, TensorType],
    blob_types: Callable[[int], TensorType],
) -> tuple[Chunk, Chunk]:
    """The program as two chunks of about equal weight, cut where the fewest bytes cross.

    What crosses comes out of the first and goes into the second under its name; the second also takes those of the
    program's inputs that it reads, as the Swift package gives them to both.
    """
    computing = [op for op in operations if not is_constant(op)]
    cut = _cut(computing, operations, blob_types)
    crossing = _crossing(computing, cut)
    second_reads = {name for op in computing[cut:] for name in read_names(op)}
    second_inputs = {name: tensor for name, tensor in inputs.items() if name in second_reads} | crossing
    return (
        Chunk(_with_constants(computing[:cut], operations), dict(inputs), crossing),
        Chunk(_with_constants(computing[cut:], operations), second_inputs, dict(outputs)),
    )


def _cut(computing: Sequence[Message], operations: Sequence[Message], blob_types: Callable[[int], TensorType]) -> int:
    constant_bytes = {
        op.outputs[0].name: sum(blob_bytes(blob_types(value.blobFileValue.offset)) for value in blobs_of(op))
        for op in operations
        if is_constant(op)
    }
    before, weight_before = 0, []
    for op in computing:
        weight_before.append(before)
        before += sum(constant_bytes.pop(name, 0) for name in read_names(op))
    fair = [at for at, weight in enumerate(weight_before) if abs(weight / before - 0.5) <= _SLACK]
    fair = fair or [min(range(1, len(computing)), key=lambda at: abs(weight_before[at] / before - 0.5))]
    legal = [at for at in fair if all(map(can_cross, _crossing(computing, at).values()))]
    return min(legal or fair, key=lambda at: sum(t.stored_bytes for t in _crossing(computing, at).values()))


def _crossing(computing: Sequence[Message], cut: int) -> dict[str, TensorType]:
    """Values computed before the cut and read behind it."""
    read = {name for op in computing[cut:] for name in read_names(op)}
    return {output.name: type_of(output.type) for op in computing[:cut] for output in op.outputs if output.name in read}


def _with_constants(part: Sequence[Message], operations: Sequence[Message]) -> list[Message]:
    own = {id(op) for op in part}
    read = {name for op in part for name in read_names(op)}
    return [op for op in operations if id(op) in own or (is_constant(op) and op.outputs[0].name in read)]
