# SPDX-License-Identifier: Apache-2.0
"""A library that was cut off is refused before a loader maps it, which would end the process."""

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from turbopocket.runtimes.kernels.library import require_whole

SHARED = sorted(Path(np.__file__).parents[1].glob("numpy/**/*.so"), key=lambda path: path.stat().st_size)
OPENED = """
import sys
from pathlib import Path
from turbopocket.runtimes.onnx.session import open_session
open_session(b"no graph", operators=Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def whole() -> bytes:
    content = SHARED[0].read_bytes()
    if not content.startswith(b"\x7fELF"):
        pytest.skip("this system's shared libraries are no ELF files")
    return content


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.3, 0.5, 0.9, 0.9999])
def test_a_library_that_was_cut_off_is_refused(whole: bytes, share: float, tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    library.write_bytes(whole)
    require_whole(library)
    library.write_bytes(whole[: max(4, int(len(whole) * share))])
    with pytest.raises(OSError, match=r"library\.so is cut off: it has [\d,]+ bytes"):
        require_whole(library)


def elf(order: str, wide: bool, loaded: int) -> bytes:
    """A header and one segment of `loaded` bytes behind it, without sections."""
    word = "Q" if wide else "I"
    head = struct.pack(f"{order}4sBBBB8xHHI3{word}IHHHHHH", *_head(order, wide))
    # 64 bits: type, flags, offset, two addresses, size; 32 bits have the flags further behind
    start = (1, 5) if wide else (1,)
    return head + struct.pack(f"{order}{'II' if wide else 'I'}6{word}", *start, 0, 0, 0, loaded, 0, 0)


def _head(order: str, wide: bool) -> tuple[bytes | int, ...]:
    size, segment = (64, 56) if wide else (52, 32)
    version = (b"\x7fELF", 1 + wide, 1 if order == "<" else 2, 1, 0)
    return (*version, 3, 62, 1, 0, size, 0, 0, size, segment, 1, 0, 0, 0)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("wide", [True, False])
def test_each_kind_of_header_is_read(order: str, wide: bool, tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    head = elf(order, wide, loaded=500)
    library.write_bytes(head.ljust(500, b"\0"))
    require_whole(library)
    library.write_bytes(head.ljust(499, b"\0"))
    with pytest.raises(OSError, match="is cut off"):
        require_whole(library)


def test_a_session_says_so_in_the_place_of_a_bus_error(whole: bytes, tmp_path: Path) -> None:
    library = tmp_path / "operators.so"
    library.write_bytes(whole[: len(whole) // 2])
    command = [sys.executable, "-c", OPENED, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done
    assert "operators.so is cut off" in done.stderr
