# SPDX-License-Identifier: Apache-2.0
"""Damage by seed: to bytes, to JSON values, and to the files of a folder. The same seed gives the same damage."""

import json
import os
import struct
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

HUGE = 10**6000
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 10**12, 1e308, -0.5, 1e-320, float("nan"), float("inf")),
    *("", "x", "../../x", "/etc/hostname", "owner/name", "\ud800", "[/x]", "{}", "(a+)+$", "x" * 70_000, "12", "null"),
    *([], {}, [0], [[]], [None], [1, 2, 3], ["a", "b"], {"a": 1}, [1] * 1000, {"_class_name": "X"}),
    HUGE,
)


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Bytes that differ from `data` in one way."""
    made = bytearray(data)
    size = len(made)
    if size == 0:
        return random.randbytes(random.choice((1, 64, 5000)))
    at, length = random.randrange(size), random.choice((1, 4, 64, 4096))
    match random.randrange(8):
        case 0:
            made[at] ^= 1 << random.randrange(8)
        case 1:
            for _ in range(random.choice((2, 16, 200))):
                made[random.randrange(size)] = random.randrange(256)
        case 2:
            del made[at:]
        case 3:
            made += random.randbytes(length)
        case 4:
            made[at : at + length] = bytes(len(made[at : at + length]))
        case 5:
            del made[at : at + length]
        case 6:
            made[at : at + 4] = struct.pack("<I", random.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)))
        case _:
            made[at:at] = made[: random.randrange(1, 1 + min(size, 4096))]
    return bytes(made)


def mutate_json(data: Any, random: Random) -> Any:
    """Values that differ from `data`, a tree of JSON, in one place."""
    made = json.loads(json.dumps(data))
    places = list(_places(made))
    if not places:
        return random.choice(VALUES)
    holder, key = random.choice(places)
    match random.randrange(6):
        case 0:
            del holder[key]
        case 1:
            other, name = random.choice(places)
            holder[key] = json.loads(json.dumps(other[name] if _is_in(other, name) else None))
        case 2 if isinstance(holder, dict):
            holder[random.choice(("x", "auto_map", "quantization_config", "file", "", "__class__"))] = holder.pop(key)
        case 3 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            factor = random.choice((-1, 0, 2, 3, 1.5, 1000, 10**9))
            holder[key] = holder[key] * factor
        case _:
            holder[key] = random.choice(VALUES)
    return made


def json_bytes(data: Any, random: Random) -> bytes:
    """JSON text of the values, at times of odd form: deep, cut, of another encoding."""
    odd = random.randrange(24)
    if odd == 0:
        return b"[" * 100_000
    if odd == 1:
        return b'{"a":' * 3_000 + b"1" + b"}" * 3_000
    text = _dumped(data)
    if odd == 2:
        return text.encode("utf-16")
    if odd == 3:
        return b"\xef\xbb\xbf" + text.encode("utf-8", "surrogatepass")
    return text.encode("utf-8", "surrogatepass")


def damage_place(path: Path, random: Random) -> str:
    """Puts something else where a file was; what that is."""
    path.unlink()
    match random.randrange(6):
        case 0:
            return "is gone"
        case 1:
            path.mkdir()
            return "is a folder"
        case 2:
            os.mkfifo(path)
            return "is a pipe"
        case 3:
            path.symlink_to(random.choice(("/etc/hostname", "/dev/zero", "nowhere", path.name)))
            return "is a link"
        case 4:
            path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
            return "is a pointer"
        case _:
            path.write_bytes(b"")
            return "is empty"


def damage_file(path: Path, random: Random) -> str:
    """Damages one file by what it is; how."""
    if random.randrange(8) == 0:
        return damage_place(path, random)
    data = path.read_bytes()
    if path.suffix == ".json" and random.randrange(5):
        path.write_bytes(json_bytes(mutate_json(json.loads(data), random), random))
        return "has other values"
    if path.suffix == ".safetensors" and random.randrange(3):
        path.write_bytes(_with_other_header(data, random))
        return "has another header"
    if path.suffix == ".onnx" and random.randrange(3):
        path.write_bytes(_with_other_graph(data, random))
        return "has another graph"
    if path.suffix == ".pte" and random.randrange(3):
        path.write_bytes(with_other_tables(data, random))
        return "has other tables"
    near = max(64, len(data) // random.choice((1, 1, 8, 64)))  # tables of contents come first, constants are the most
    path.write_bytes(mutate_bytes(data[:near], random) + data[near:])
    return "has other bytes"


def with_other_tables(data: bytes, random: Random) -> bytes:
    """A program with other words in its own table, or in what is behind it: the delegates', which nobody checks."""
    made, (table, behind) = bytearray(data), struct.unpack_from("<QQ", data, 16)
    first, end = random.choice(((64, table), (behind, len(data)), (behind, min(len(data), behind + 20_000))))
    for _ in range(random.choice((1, 2, 8))):
        at = random.randrange(first, end - 4) // 4 * 4
        word = random.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, random.getrandbits(16), random.getrandbits(32)))
        struct.pack_into("<I", made, at, word)
    return bytes(made)


def files_of(folder: Path) -> list[Path]:
    """Its files, in order, large ones no more often than others."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def rehash(folder: Path) -> None:
    """Makes a damaged artifact's manifest agree with its files, as one who means harm would."""
    path = folder / "manifest.json"
    if path.is_symlink() or not path.is_file():  # a pipe or a device has no end
        return
    values = json.loads(path.read_text())
    values["files"] = [
        {
            "path": file.relative_to(folder).as_posix(),
            "bytes": file.stat().st_size,
            "sha256": sha256(file.read_bytes()).hexdigest(),
        }
        for file in files_of(folder)
        if file != path
    ]
    path.write_text(json.dumps(values))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys: Any = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys)[:200]:
        yield value, key
        yield from _places(value[key])


def _is_in(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def _dumped(data: Any) -> str:
    if data is HUGE or _holds(data, HUGE):
        return json.dumps(_put(data)).replace('"HUGE"', "1" + "0" * 6000)
    return json.dumps(data)


def _holds(data: Any, wanted: Any) -> bool:
    values: Any = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return data is wanted or any(_holds(value, wanted) for value in values)


def _put(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _put(value) for key, value in data.items()}
    return [_put(value) for value in data] if isinstance(data, list) else "HUGE" if data is HUGE else data


def _with_other_header(data: bytes, random: Random) -> bytes:
    (size,) = struct.unpack("<Q", data[:8])
    if random.randrange(6) == 0:
        return struct.pack("<Q", random.choice((0, 1, 2**31, 2**63, size + 1))) + data[8:]
    header = json_bytes(mutate_json(json.loads(data[8 : 8 + size]), random), random)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def _with_other_graph(data: bytes, random: Random) -> bytes:
    import onnx
    from onnx import helper

    model = onnx.load_model_from_string(data)
    graph = model.graph
    node = random.choice(graph.node)
    ways: tuple[Callable[[], object], ...] = (
        lambda: graph.node.remove(node),
        lambda: setattr(node, "op_type", random.choice(("Add", "MatMul", "Loop", "If", "Reshape", "Nothing", ""))),
        lambda: node.input.pop() if node.input else None,
        lambda: node.output.append("x"),
        lambda: setattr(node, "domain", random.choice(("", "x", "com.microsoft"))),
        lambda: node.attribute.append(helper.make_attribute(random.choice(("axis", "perm", "to")), 2**40)),
        lambda: node.attribute.pop() if node.attribute else None,
        lambda: graph.initializer[random.randrange(len(graph.initializer))].dims.append(random.choice((0, 2, 2**40))),
        lambda: setattr(graph.initializer[random.randrange(len(graph.initializer))], "data_type", random.randrange(20)),
        lambda: graph.node.extend([_folded(graph, helper)]),
        lambda: graph.node.insert(0, _endless(node.output[0], helper)),
        lambda: graph.output.pop(),
        lambda: setattr(model, "ir_version", random.choice((0, 99))),
        lambda: setattr(model.opset_import[0], "version", random.choice((0, 1, 999))),
        lambda: graph.node.append(node),
    )
    random.choice(ways)()
    return model.SerializeToString()


def _folded(graph: Any, helper: Any) -> Any:
    """A constant that takes eight gigabytes once it is made."""
    import numpy as np
    from onnx import numpy_helper

    graph.initializer.append(numpy_helper.from_array(np.array([2**31], dtype=np.int64), "eight_gigabytes"))
    return helper.make_node("ConstantOfShape", ["eight_gigabytes"], ["much"])


def _endless(output: str, helper: Any) -> Any:
    """A loop without a trip count whose condition stays true."""
    import onnx

    true, state = helper.make_tensor("c", onnx.TensorProto.BOOL, [], [True]), onnx.TensorProto.INT64
    body = helper.make_graph(
        [
            helper.make_node("Constant", [], ["go_on"], value=true),
            helper.make_node("Identity", ["iteration"], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("iteration", state, []),
            helper.make_tensor_value_info("going", onnx.TensorProto.BOOL, []),
        ],
        [
            helper.make_tensor_value_info("go_on", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", state, []),
        ],
    )
    return helper.make_node("Loop", ["", ""], [f"{output}_never"], body=body)
