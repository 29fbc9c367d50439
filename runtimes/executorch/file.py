# SPDX-License-Identifier: Apache-2.0
"""The frames of ExecuTorch's files: what must be right before any runtime may map them."""

import struct
from dataclasses import dataclass
from pathlib import Path

from ...ground.errors import TurbopocketError
from ..manifest import ComponentSpec

IDENTIFIER = b"ET12"
SCHEMA_VERSION = 0
"""The highest version of the program's schema that the pinned runtime loads."""
DATA_IDENTIFIER = b"FT01"
_HEADER, _DATA_HEADER = struct.Struct("<4sIQQQ"), struct.Struct("<4sIQQQQ")
_HEADER_AT = 8
_HEADER_MAGIC = b"eh00"
_OPERATORS = b"turbopocket::"
"""What the names of our operators begin with in a program's table."""


@dataclass(frozen=True)
class Layout:
    """A program file's table of everything in it (a flatbuffer), and the bytes behind it that hold constants."""

    program: bytes
    segments_at: int
    segments_bytes: int

    @property
    def needs_operators(self) -> bool:
        """Whether the program names operators of ours."""
        return _OPERATORS in self.program


def read_layout(path: Path) -> Layout:
    """The layout of the program at `path`; constants are not read.

    Raises TurbopocketError when the file is missing, is no ExecuTorch program, is of a newer schema, or is cut off.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER_AT + _HEADER.size)
            if len(head) < _HEADER_AT + _HEADER.size:
                raise TurbopocketError(f"{path} is cut off: {len(head)} bytes are no ExecuTorch program")
            magic, _, program_bytes, segments_at, segments_bytes = _HEADER.unpack_from(head, _HEADER_AT)
            _require_identifier(path, head[4:8], magic)
            program = head + file.read(max(0, program_bytes - len(head)))
    except FileNotFoundError:
        raise TurbopocketError(f"{path} is missing") from None
    _require_whole(path, max(program_bytes, segments_at + segments_bytes))
    version = _schema_version(path, program)
    if version > SCHEMA_VERSION:
        raise TurbopocketError(
            f"{path} is of schema version {version}: this ExecuTorch reads up to {SCHEMA_VERSION}",
            hint="install the ExecuTorch that made it, or build again",
        )
    return Layout(program, segments_at, segments_bytes)


def data_file(folder: Path, spec: ComponentSpec) -> Path | None:
    """The file of a program's constants, None for a program that holds them.

    Raises TurbopocketError when the file is missing, is no such file, or is cut off.
    """
    if spec.data is None:
        return None
    read_data_names(folder / spec.data)
    return folder / spec.data


def read_data_names(path: Path) -> bytes:
    """The table of a .ptd file, which has the names of its constants; they themselves are not read.

    Raises TurbopocketError when the file is missing, is no such file, or is cut off.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER_AT + _DATA_HEADER.size)
            if len(head) < _HEADER_AT + _DATA_HEADER.size or head[4:8] != DATA_IDENTIFIER:
                raise TurbopocketError(f"{path} is no file of ExecuTorch's constants: it begins with {head[:8].hex()}")
            _, _, table_at, table_bytes, constants_at, constants_bytes = _DATA_HEADER.unpack_from(head, _HEADER_AT)
            _require_whole(path, max(table_at + table_bytes, constants_at + constants_bytes))
            file.seek(table_at)
            return file.read(table_bytes)
    except FileNotFoundError:
        raise TurbopocketError(f"{path} is missing") from None


def _require_whole(path: Path, needed: int) -> None:
    found = path.stat().st_size
    if found < needed:
        raise TurbopocketError(f"{path} is cut off: it has {found:,} bytes, its header says {needed:,}")


def _require_identifier(path: Path, identifier: bytes, magic: bytes) -> None:
    if identifier[:2] == IDENTIFIER[:2] and identifier != IDENTIFIER:
        raise TurbopocketError(
            f"{path} is an ExecuTorch program of format {identifier.decode('ascii', 'replace')}: "
            f"this ExecuTorch reads {IDENTIFIER.decode()}",
            hint="install the ExecuTorch that made it, or build again",
        )
    if identifier != IDENTIFIER or magic != _HEADER_MAGIC:
        raise TurbopocketError(f"{path} is no ExecuTorch program: it begins with {(identifier + magic).hex(' ', 4)}")


def _schema_version(path: Path, program: bytes) -> int:
    """The first field of the flatbuffer's root table, 0 where it is left out."""
    try:
        (root,) = struct.unpack_from("<I", program, 0)
        (to_vtable,) = struct.unpack_from("<i", program, root)
        vtable_bytes, _, field = struct.unpack_from("<HHH", program, root - to_vtable)
        if vtable_bytes < 6 or field == 0:
            return 0
        (version,) = struct.unpack_from("<I", program, root + field)
    except struct.error:
        raise TurbopocketError(f"{path} is damaged: its table of contents points outside the file") from None
    return int(version)
