# SPDX-License-Identifier: Apache-2.0
"""The codebook core from Python, without a runtime around it: what tests and benchmarks call.

N outputs, G vectors per row, M codebooks, E entries of one, D length of a vector, K = G * D columns.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ground.errors import TurbopocketError

_MESSAGE_BYTES = 240
Array = NDArray[Any]


@dataclass(frozen=True)
class CodebookWeights:
    """`codes` uint8 [N, G, M], `codebooks` fp16 [M, E, D], `scale` fp16 [N], `bias` fp32 [N] or None."""

    codes: Array
    codebooks: Array
    scale: Array
    bias: Array | None = None


@dataclass(frozen=True)
class Conv2dLayer:
    """A Conv2d's geometry: rows before columns, padding as top, left, bottom, right."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


class _Weights(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for part in ("codes", "codebooks", "scale", "bias")
            for name in (part, part + "_shape")
        ),
        *((part + "_rank", ctypes.c_size_t) for part in ("codes", "codebooks", "scale", "bias")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_int64 * 2),
        ("stride", ctypes.c_int64 * 2),
        ("padding", ctypes.c_int64 * 4),
        ("dilation", ctypes.c_int64 * 2),
        ("groups", ctypes.c_int64),
    )


class CoreLibrary:
    """A built `codebook` library. `threads` are started per call; `path` names the arithmetic (None: the fastest)."""

    def __init__(self, file: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(file))
        except OSError as error:
            raise TurbopocketError(f"{file} cannot be loaded: {error}", hint="make kernels") from error
        self._library.codebook_path.restype = ctypes.c_char_p
        self._library.codebook_scratch_bytes_per_thread.restype = ctypes.c_size_t

    def paths(self) -> list[str]:
        """Names of the paths that this processor can run, the reference first."""
        names: list[str] = []
        while (name := self._library.codebook_path(ctypes.c_size_t(len(names)))) is not None:
            names.append(name.decode())
        return names

    def scratch_bytes_per_thread(self) -> int:
        return int(self._library.codebook_scratch_bytes_per_thread())

    def decode(self, weights: CodebookWeights) -> Array:
        """W, fp32 [N, K]. Raises TurbopocketError when the core refuses the weights."""
        outputs, groups, _ = weights.codes.shape
        dense = np.empty((outputs, groups * weights.codebooks.shape[-1]), np.float32)
        self._call("codebook_decode", ctypes.byref(_weights(weights)), _pointer(dense))
        return dense

    def linear(self, weights: CodebookWeights, x: Array, path: str | None = None, threads: int = 1) -> Array:
        """y fp32 [R, N] = x fp32 [R, K] Wᵀ + bias. Raises TurbopocketError when the core refuses."""
        rows, columns = x.shape
        y = np.empty((rows, weights.codes.shape[0]), np.float32)
        sizes = ctypes.c_int64(rows), ctypes.c_int64(columns)
        self._call(
            "codebook_linear", ctypes.byref(_weights(weights)), _pointer(x), *sizes, _pointer(y), *_how(path, threads)
        )
        return y

    def conv2d(
        self, weights: CodebookWeights, layer: Conv2dLayer, x: Array, path: str | None = None, threads: int = 1
    ) -> Array:
        """y fp32 [B, N, H', W'] from x fp32 [B, I, H, W]. Raises TurbopocketError when the core refuses."""
        y = np.empty(self.conv2d_shape(weights, layer, x.shape), np.float32)
        geometry, shape = ctypes.byref(_layer(layer)), _sizes(x.shape)
        self._call(
            "codebook_conv2d",
            ctypes.byref(_weights(weights)),
            geometry,
            _pointer(x),
            shape,
            _pointer(y),
            *_how(path, threads),
        )
        return y

    def conv2d_shape(self, weights: CodebookWeights, layer: Conv2dLayer, x_shape: Sequence[int]) -> tuple[int, ...]:
        """[B, N, H', W']. Raises TurbopocketError when the core refuses."""
        y_shape = (ctypes.c_int64 * 4)()
        self._call(
            "codebook_conv2d_shape",
            ctypes.byref(_weights(weights)),
            ctypes.byref(_layer(layer)),
            _sizes(x_shape),
            y_shape,
        )
        return tuple(y_shape)

    def _call(self, name: str, *arguments: Any) -> None:
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        if getattr(self._library, name)(*arguments, message):
            raise TurbopocketError(message.value.decode())


def _pointer(array: Array) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def _sizes(shape: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(shape))(*shape)


def _how(path: str | None, threads: int) -> tuple[ctypes.c_char_p, ctypes.c_size_t]:
    return ctypes.c_char_p(None if path is None else path.encode()), ctypes.c_size_t(threads)


def _weights(weights: CodebookWeights) -> _Weights:
    """The structure by reference; it keeps the shapes alive, the caller keeps the arrays."""
    parts = {"codes": weights.codes, "codebooks": weights.codebooks, "scale": weights.scale, "bias": weights.bias}
    filled = _Weights()
    for name, array in parts.items():
        if array is not None:
            shape = _sizes(array.shape)
            setattr(filled, name, _pointer(array))
            setattr(filled, name + "_shape", ctypes.cast(shape, ctypes.c_void_p))
            setattr(filled, name + "_rank", array.ndim)
            setattr(filled, "_kept_" + name, shape)
    return filled


def _layer(layer: Conv2dLayer) -> _Layer:
    two, four = ctypes.c_int64 * 2, ctypes.c_int64 * 4
    return _Layer(two(*layer.kernel), two(*layer.stride), four(*layer.padding), two(*layer.dilation), layer.groups)
