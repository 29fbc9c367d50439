# SPDX-License-Identifier: Apache-2.0
"""Where `make kernels` puts what it builds. Also runs on an emulated CPU: needs nothing but Python."""

import platform
import struct
from pathlib import Path


def onnx_operators() -> Path | None:
    """The library of our operators for ONNX Runtime on this kind of machine, None where it was not built."""
    return _library("libcodebook_onnxruntime.so")


def executorch_operators() -> Path | None:
    """The library of our operators for ExecuTorch's Python bindings here, None where it was not built."""
    return _library("libcodebook_executorch.so")


def _library(name: str) -> Path | None:
    library = Path(__file__).parent / "lib" / platform.machine() / name
    return library if library.is_file() else None


def require_whole(library: Path) -> None:
    """Returns when a shared library holds every byte that its own header tells of.

    Loaders map what is missing all the same, and the process ends with a bus error once that is read. Raises OSError
    where an ELF file (System V ABI, "Object Files") is shorter than its tables, or than what they say to load; of what
    is no ELF file at all, loaders say so themselves.
    """
    content = library.read_bytes()
    if not content.startswith(b"\x7fELF"):
        return
    try:
        needed = _elf_bytes(content)
    except (struct.error, IndexError):
        needed = len(content) + 1
    if needed > len(content):
        raise OSError(f"{library} is cut off: it has {len(content):,} bytes, its own header tells of more")


def _elf_bytes(content: bytes) -> int:
    """Where the last table, or the last piece that is loaded, of an ELF file ends."""
    order = "<" if content[5] == 1 else ">"
    wide = content[4] == 2
    segments, sections, _, _, segment_size, segment_count, section_size, section_count = struct.unpack_from(
        f"{order}{'QQ' if wide else 'II'}IHHHHH", content, 32 if wide else 28
    )
    ends = [segments + segment_count * segment_size, sections + section_count * section_size]
    for index in range(segment_count):
        start = segments + index * segment_size + (8 if wide else 4)
        offset, *_, size = struct.unpack_from(f"{order}{'QQQQ' if wide else 'IIII'}", content, start)
        ends.append(offset + size)
    return max(ends)
