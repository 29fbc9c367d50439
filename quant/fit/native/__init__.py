# SPDX-License-Identifier: Apache-2.0
"""VQDM's search in C++, where `make search` has built it; without it PyTorch searches, several times as slowly.

O outputs, K columns, M codebooks, P entries of one, D length of a vector, J vectors per row, N points of F numbers.
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ....ground.errors import TurbopocketError

NOT_BUILT = "vqdm searches in PyTorch, several times as slowly as in C++, which `make search` builds in a checkout"
BUILT = Path(__file__).parent / "lib" / platform.machine() / "libvqdm.so"


_chosen: list["SearchLibrary | None"] = []


def search_library() -> "SearchLibrary | None":
    """The library of this kind of machine; None where it was not built, and what `searched_with` says."""
    return _chosen[-1] if _chosen else _built()


@cache
def _built() -> "SearchLibrary | None":
    return SearchLibrary(BUILT) if BUILT.is_file() else None


def search_notes() -> tuple[str, ...]:
    """What there is to say of the search on this machine."""
    return () if search_library() is not None or torch.cuda.is_available() else (NOT_BUILT,)


@contextmanager
def searched_with(library: "SearchLibrary | None") -> Iterator[None]:
    """Inside, fits of this process search with that library, or with PyTorch: for comparing the two."""
    _chosen.append(library)
    try:
        yield
    finally:
        _chosen.pop()


class SearchLibrary:
    """A built library. Calls let other threads of Python run, and use PyTorch's number of threads themselves."""

    def __init__(self, file: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(file))
        except OSError as error:
            raise TurbopocketError(f"{file} cannot be loaded: {error}", hint="make search") from error
        for name in ("vqdm_path", "vqdm_search", "vqdm_nearest"):
            getattr(self._library, name).restype = ctypes.c_char_p

    def paths(self) -> list[str]:
        """Names of the paths that this processor can run, the plain one first, the fastest last."""
        names: list[str] = []
        while (name := self._library.vqdm_path(ctypes.c_size_t(len(names)))) is not None:
            names.append(name.decode())
        return names

    def best_codes(
        self, target_OK: Tensor, codebooks_MPD: Tensor, lower_KK: Tensor, beam: int, path: str | None = None
    ) -> Tensor:
        """uint8 [M, O, J], as `beam.best_codes`; TurbopocketError for shapes that do not fit together."""
        count, entries, length = codebooks_MPD.shape
        outputs, columns = target_OK.shape
        if tuple(lower_KK.shape) != (columns, columns):
            raise TurbopocketError(f"a factor of shape {list(lower_KK.shape)} for a weight of {columns} columns")
        codes_MOJ = torch.empty(count, outputs, columns // max(1, length), dtype=torch.uint8)
        arrays = [_floats(tensor) for tensor in (target_OK, codebooks_MPD, lower_KK)]
        sizes = (ctypes.c_int64 * 7)(outputs, columns, count, entries, length, beam, torch.get_num_threads())
        self._call("vqdm_search", *map(_pointer, arrays), sizes, _name(path), _pointer(codes_MOJ))
        return codes_MOJ

    def nearest(self, pulls_NF: Tensor, features_FP: Tensor, path: str | None = None) -> Tensor:
        """uint8 [N]: the column of least value in each row of `pulls @ features`, the first of equals."""
        (points, width), (features, entries) = pulls_NF.shape, features_FP.shape
        if width != features:
            raise TurbopocketError(f"points of {width} numbers for entries of {features}")
        codes_N = torch.empty(points, dtype=torch.uint8)
        arrays = [_floats(tensor) for tensor in (pulls_NF, features_FP)]
        sizes = [ctypes.c_int64(size) for size in (points, width, entries)]
        self._call("vqdm_nearest", *map(_pointer, arrays), *sizes, _name(path), _pointer(codes_N))
        return codes_N

    def _call(self, name: str, *arguments: object) -> None:
        fault = getattr(self._library, name)(*arguments)
        if fault is not None:
            raise TurbopocketError(f"vqdm's search: {fault.decode()}")


def _floats(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _name(path: str | None) -> ctypes.c_char_p:
    return ctypes.c_char_p(None if path is None else path.encode())
