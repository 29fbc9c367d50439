# SPDX-License-Identifier: Apache-2.0
"""Memory that was freed and is still this process's."""

import ctypes
import sys

_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None


def give_back_freed() -> None:
    """Hands freed memory back to the system, where the C library keeps it: glibc does, in the middle of its heap.

    A model's blocks free tensors of all sizes in turn, and what is kept of those adds up to several times the largest.
    """
    if (trim := getattr(_LIBRARY, "malloc_trim", None)) is not None:
        trim(0)
