# SPDX-License-Identifier: Apache-2.0
"""Layers of a traced program as Core ML operations, with their weights in the forms that a plan has chosen."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from .form import Form, MilLayer
from .mil import Message, const, describe, ints, operation, stored, string, tensor_type, type_of
from .trace import LAYER, PATH, zero_bias


def emitted(skeleton: Sequence[Message], forms: Mapping[str, Form], blobs: Mapping[str, int]) -> list[Message]:
    """The skeleton's operations with every layer in its form (by path); `blobs` is the number of its first blob.

    A weight is decoded right before its first use, and once, also when its layer runs more often.
    """
    constants = constants_of(skeleton)
    operations: list[Message] = []
    decoded: set[str] = set()
    for op in skeleton:
        if op.type != LAYER:
            operations.append(op)
            continue
        path = path_of(op)
        if path not in decoded:
            operations += weight_operations(forms[path], blobs[path])
            decoded.add(path)
        operations += applied(op, forms[path], constants)
    return operations


def constants_of(skeleton: Sequence[Message]) -> dict[str, Message]:
    """The const operations by the name of their value."""
    return {op.outputs[0].name: op for op in skeleton if op.type == "const"}


def path_of(op: Message) -> str:
    """Module path of the layer that a skeleton's operation stands for."""
    return str(op.attributes[PATH].immediateValue.tensor.strings.values[0])


def weight_operations(form: Form, first_blob: int) -> Iterator[Message]:
    """What gives the layer's weights, and the scale of its outputs if it has one, their names."""
    yield from form.weight_operations(_weights(form), first_blob)
    if form.scales_outputs:
        tensors = form.tensors()
        yield const(_scale(form.layer), stored(tensors[-1], first_blob + len(tensors) - 1))


def geometry_constants(layers: Iterable[MilLayer]) -> list[Message]:
    """The constants that the convolutions among these layers read, one of each value."""
    constants: dict[str, Message] = {}
    for layer in layers:
        if layer.kind == "conv2d":
            constants |= {_constant_name(value): _constant_value(value) for value in _geometry(layer).values()}
    return [const(name, value) for name, value in constants.items()]


def applied(op: Message, form: Form, constants: Mapping[str, Message]) -> Iterator[Message]:
    """The layer's arithmetic; the last operation gives the traced one's value.

    A scale of outputs comes between product, or sum of products, and bias.
    """
    layer = form.layer
    bias = constants[op.inputs["bias"].arguments[0].name] if "bias" in op.inputs else None
    output = op.outputs[0].name
    tensor = type_of(op.outputs[0].type)
    inputs = {"x": op.inputs["x"].arguments[0].name}
    if layer.kind == "conv2d":
        inputs |= {parameter: _constant_name(value) for parameter, value in _geometry(layer).items()}
    kind = "linear" if layer.kind == "linear" else "conv"
    if not form.scales_outputs:
        if bias is not None or layer.kind == "linear":
            inputs["bias"] = zero_bias(layer) if bias is None else bias.outputs[0].name
        (weight,) = _weights(form)
        yield operation(kind, output, tensor, inputs | {"weight": weight})
        return
    if layer.kind == "linear":
        inputs["bias"] = zero_bias(layer)
    scaled = output if bias is None else f"{output}_scaled"
    total = ""
    for index, weight in enumerate(_weights(form)):
        product = f"{output}_product{index}"
        yield operation(kind, product, tensor, inputs | {"weight": weight})
        if total:
            yield operation("add", f"{output}_sum{index}", tensor, {"x": total, "y": product})
        total = f"{output}_sum{index}" if total else product
    yield operation("mul", scaled, tensor, {"x": total, "y": _scale(layer)})
    if bias is not None:
        yield _as_channels(f"{output}_bias", bias, layer)
        yield operation("add", output, tensor, {"x": scaled, "y": f"{output}_bias"})


def _as_channels(name: str, bias: Message, layer: MilLayer) -> Message:
    """The bias [O] of the same stored bytes in the shape that adds to the layer's output."""
    value = const(name, bias.attributes["val"])
    if layer.kind == "conv2d":
        for declared in (value.attributes["val"].type, value.outputs[0].type):
            declared.Clear()
            describe(declared, tensor_type(layer.float_type, (1, layer.shape[0], 1, 1)))
    return value


def _weights(form: Form) -> list[str]:
    name = f"{form.layer.path.replace('.', '_')}_weight"
    return [name] if form.products == 1 else [f"{name}{index}" for index in range(form.products)]


def _scale(layer: MilLayer) -> str:
    return f"{layer.path.replace('.', '_')}_weight_scale"


def _geometry(layer: MilLayer) -> dict[str, tuple[int, ...] | int | str]:
    """Parameters of a conv beside its tensors."""
    (height, width), dilations = layer.geometry[2:4], layer.geometry[4:]
    return {
        "strides": layer.geometry[:2],
        "pad_type": "custom",
        "pad": (height, height, width, width),
        "dilations": dilations,
        "groups": 1,
    }


def _constant_name(value: tuple[int, ...] | int | str) -> str:
    return "conv_" + ("x".join(map(str, value)) if isinstance(value, tuple) else str(value))


def _constant_value(value: tuple[int, ...] | int | str) -> Message:
    return string(value) if isinstance(value, str) else ints(value)
