# SPDX-License-Identifier: Apache-2.0
"""ExecuTorch programs that hand our operators what they do not expect, by seed."""

from copy import deepcopy
from random import Random
from typing import Any

OURS = "turbopocket::"
NUMBERS = (-(2**63), -(2**31), -1, 0, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**62, 2**63 - 1)
SIZES = (-(2**31), -1, 0, 1, 2, 3, 5, 64, 255, 65_536, 2**31 - 1)


class Damaged:
    """One program, opened; each damage is another copy."""

    def __init__(self, program: bytes) -> None:
        from executorch.exir._serialize._program import deserialize_pte_binary

        self._opened = deserialize_pte_binary(program)

    def program(self, random: Random) -> bytes:
        """The program with one to three arguments of calls of ours made others."""
        from executorch.exir._serialize._program import serialize_pte_binary

        made = deepcopy(self._opened)
        (plan,) = made.program.execution_plan
        ours = {number for number, each in enumerate(plan.operators) if each.name.startswith(OURS)}
        found = [each.instr_args for each in plan.chains[0].instructions]
        calls = [each for each in found if getattr(each, "op_index", None) in ours]
        assert calls
        for _ in range(random.choice((1, 1, 2, 3))):
            _damage(random.choice(calls), plan.values, random)
        return bytes(serialize_pte_binary(made))


def _damage(call: Any, values: list[Any], random: Random) -> None:
    from executorch.exir import schema

    place = random.randrange(len(call.args))
    match random.randrange(8):
        case 0:
            call.args[place] = random.randrange(len(values))
        case 1:
            other = random.randrange(len(call.args))
            call.args[place], call.args[other] = call.args[other], call.args[place]
        case 2:
            del call.args[place]
        case 3:
            values[call.args[place]].val = random.choice((schema.Null(), schema.Int(random.choice(NUMBERS))))
        case _:
            _damage_value(values[call.args[place]].val, values, random)


def _damage_value(value: Any, values: list[Any], random: Random) -> None:
    from executorch.exir import schema
    from executorch.exir.scalar_type import ScalarType

    if isinstance(value, schema.IntList):
        match random.randrange(4):
            case 0:
                value.items.append(random.choice(value.items))
            case 1 if len(value.items) > 1:
                value.items.pop()
            case _:
                values[random.choice(value.items)].val = schema.Int(random.choice(NUMBERS))
    elif isinstance(value, schema.Tensor):
        axis = random.randrange(len(value.sizes))
        match random.randrange(8):
            case 0:
                value.scalar_type = random.choice((ScalarType.BYTE, ScalarType.HALF, ScalarType.FLOAT, ScalarType.LONG))
            case 1:
                random.shuffle(value.dim_order)
            case 2:
                value.sizes.append(random.choice(SIZES))
                value.dim_order.append(len(value.dim_order))
            case 3 if len(value.sizes) > 1:
                del value.sizes[axis]
                value.dim_order = list(range(len(value.sizes)))
            case 4:
                other = random.randrange(len(value.sizes))
                value.sizes[axis], value.sizes[other] = value.sizes[other], value.sizes[axis]
            case 5 if value.allocation_info:
                value.allocation_info.memory_offset_low += random.choice((-64, 16, 4096, 2**30))
            case 6:
                value.sizes[axis] = value.sizes[axis] // 2
            case _:
                value.sizes[axis] = random.choice(SIZES)
