# SPDX-License-Identifier: Apache-2.0
"""The C++ core against numpy and PyTorch: every path of this processor, odd shapes, every vector length and sum."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.kernels.core_library import CodebookWeights, Conv2dLayer, CoreLibrary

Array = NDArray[Any]


def random_weights(
    outputs: int, columns: int, length: int, books: int, entries: int = 256, bias: bool = True
) -> CodebookWeights:
    rng = np.random.default_rng((outputs, columns, length, books))
    return CodebookWeights(
        rng.integers(0, entries, (outputs, columns // length, books), dtype=np.uint8),
        rng.standard_normal((books, entries, length)).astype(np.float16),
        rng.uniform(0.5, 2, outputs).astype(np.float16),
        rng.standard_normal(outputs).astype(np.float32) if bias else None,
    )


def dense(weights: CodebookWeights) -> Array:
    """W by numpy in fp32: vectors summed in the order of the books, then scaled."""
    codebooks, codes = weights.codebooks.astype(np.float32), weights.codes
    vectors = codebooks[0][codes[:, :, 0]]
    for book in range(1, len(codebooks)):
        vectors = vectors + codebooks[book][codes[:, :, book]]
    return vectors.reshape(len(codes), -1) * weights.scale.astype(np.float32)[:, None]


def relative_error(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


LINEAR = [
    # rows, outputs, columns, length, books
    (1, 1, 2, 2, 1),
    (7, 37, 328, 8, 2),
    (100, 130, 520, 4, 3),
    (13, 16, 256, 8, 1),
    (97, 65, 1030, 2, 4),
    (5, 33, 1288, 4, 8),
]


@pytest.mark.parametrize(("rows", "outputs", "columns", "length", "books"), LINEAR)
def test_linear_is_the_product_with_decoded_weights_on_every_path(
    core: CoreLibrary, rows: int, outputs: int, columns: int, length: int, books: int
) -> None:
    weights = random_weights(outputs, columns, length, books)
    x = np.random.default_rng(1).standard_normal((rows, columns), np.float32)
    wanted = x.astype(np.float64) @ dense(weights).T.astype(np.float64) + weights.bias
    for path in core.paths():
        assert relative_error(core.linear(weights, x, path), wanted) < 1e-6, path


CONV2D = [
    # channels, outputs, layer, height, width, length, books
    (8, 5, Conv2dLayer((3, 3), padding=(1, 1, 1, 1)), 7, 9, 8, 1),
    (16, 40, Conv2dLayer((3, 3), stride=(2, 2), padding=(1, 1, 1, 1)), 12, 13, 8, 2),
    (16, 12, Conv2dLayer((3, 3), stride=(2, 2), padding=(0, 0, 1, 1)), 8, 8, 4, 2),
    (12, 33, Conv2dLayer((1, 1)), 5, 5, 4, 2),
    (32, 130, Conv2dLayer((3, 3), padding=(2, 2, 2, 2), dilation=(2, 2)), 16, 16, 8, 3),
    (6, 7, Conv2dLayer((1, 5), stride=(1, 3), padding=(0, 4, 0, 0)), 4, 40, 2, 4),
    (64, 24, Conv2dLayer((3, 3), padding=(1, 1, 1, 1)), 32, 32, 8, 2),
]


@pytest.mark.parametrize(("channels", "outputs", "layer", "height", "width", "length", "books"), CONV2D)
def test_conv2d_is_pytorchs_with_decoded_weights_on_every_path(
    core: CoreLibrary, channels: int, outputs: int, layer: Conv2dLayer, height: int, width: int, length: int, books: int
) -> None:
    kh, kw = layer.kernel
    weights = random_weights(outputs, kh * kw * channels, length, books)
    x = np.random.default_rng(1).standard_normal((2, channels, height, width), np.float32)
    top, left, bottom, right = layer.padding
    wanted = F.conv2d(
        F.pad(torch.from_numpy(x).double(), (left, right, top, bottom)),
        torch.from_numpy(dense(weights)).double().reshape(outputs, kh, kw, channels).permute(0, 3, 1, 2),
        torch.from_numpy(weights.bias).double(),
        stride=layer.stride,
        dilation=layer.dilation,
    ).numpy()
    for path in core.paths():
        assert relative_error(core.conv2d(weights, layer, x, path), wanted) < 1e-6, path


@pytest.mark.parametrize("length", [2, 4, 8])
@pytest.mark.parametrize("books", [1, 2, 3, 4, 8])
def test_decoded_weights_are_the_formats_to_the_bit(core: CoreLibrary, length: int, books: int) -> None:
    weights = random_weights(19, 11 * length, length, books)
    assert np.array_equal(core.decode(weights), dense(weights))


def test_every_half_precision_value_is_read_exactly(core: CoreLibrary) -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    codes = np.arange(256, dtype=np.uint8).reshape(1, 256, 1)
    for codebook in halves.reshape(-1, 1, 256, 8):
        decoded = core.decode(CodebookWeights(codes, codebook, np.ones(1, np.float16)))
        assert np.array_equal(decoded, codebook.astype(np.float32).reshape(1, -1), equal_nan=True)
    scales = core.decode(CodebookWeights(np.zeros((2**16, 1, 1), np.uint8), np.ones((1, 1, 2), np.float16), halves))
    assert np.array_equal(scales[:, 0], halves.astype(np.float32), equal_nan=True)


def test_scalar_path_sums_column_by_column_to_the_bit(core: CoreLibrary) -> None:
    weights = random_weights(21, 600, 4, 2)
    x = np.random.default_rng(1).standard_normal((9, 600), np.float32)
    columns = dense(weights)
    wanted = np.repeat(np.asarray(weights.bias)[None], len(x), axis=0)
    for k in range(columns.shape[1]):
        wanted = wanted + x[:, k : k + 1] * columns[:, k]
    assert np.array_equal(core.linear(weights, x, "scalar"), wanted)


def test_results_do_not_depend_on_the_number_of_threads(core: CoreLibrary) -> None:
    linear, conv2d = random_weights(300, 264, 8, 2), random_weights(70, 9 * 16, 8, 2)
    layer = Conv2dLayer((3, 3), padding=(1, 1, 1, 1))
    rng = np.random.default_rng(1)
    rows, picture = rng.standard_normal((250, 264), np.float32), rng.standard_normal((1, 16, 21, 21), np.float32)
    for threads in (2, 3, 16):
        assert np.array_equal(core.linear(linear, rows, threads=threads), core.linear(linear, rows))
        assert np.array_equal(core.conv2d(conv2d, layer, picture, threads=threads), core.conv2d(conv2d, layer, picture))


def test_padding_lets_no_neighbouring_pixel_through(core: CoreLibrary) -> None:
    weights = random_weights(3, 9 * 8, 8, 1)
    x = np.zeros((1, 8, 6, 16), np.float32)
    x[:, :, :, 15] = np.nan  # the pixel before the first of the next row
    y = core.conv2d(weights, Conv2dLayer((3, 3), padding=(1, 1, 1, 1)), x)
    assert np.isfinite(y[..., :14]).all()


def test_no_rows_are_no_work(core: CoreLibrary) -> None:
    assert core.linear(random_weights(5, 16, 8, 1), np.empty((0, 16), np.float32)).shape == (0, 5)


WEIGHTS = random_weights(6, 32, 8, 2, entries=16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": np.full((6, 4, 2), 16, np.uint8)}, "codes: the largest is 16, the codebooks have 16 entries"),
        ({"codes": np.zeros((6, 8), np.uint8)}, r"codes: the shape has 2 sizes, must be \[outputs, groups, books\]"),
        ({"codes": np.zeros((6, 4, 9), np.uint8)}, "codes: 9 books, at most 8"),
        ({"codes": np.zeros((6, 4, 3), np.uint8)}, "codebooks: 2 books, codes have 3"),
        ({"codes": np.zeros((0, 4, 2), np.uint8)}, r"codes: size 0 of \[outputs, groups, books\] is 0"),
        ({"codebooks": np.zeros((2, 257, 8), np.float16)}, "codebooks: 257 entries, a code of one byte names at most"),
        ({"codebooks": np.zeros((2, 16, 3), np.float16)}, "codebooks: vectors of 3 weights, must be 2, 4 or 8"),
        ({"scale": np.ones(5, np.float16)}, "scale: has 5 values, codes have 6 outputs"),
        ({"bias": np.ones(7, np.float32)}, "bias: has 7 values, codes have 6 outputs"),
    ],
)
def test_weights_that_do_not_fit_together_are_refused(
    core: CoreLibrary, change: dict[str, Array], message: str
) -> None:
    with pytest.raises(TurbopocketError, match=message):
        core.linear(replace(WEIGHTS, **change), np.ones((1, 32), np.float32))


def test_rows_that_the_weights_do_not_fit_are_refused(core: CoreLibrary) -> None:
    with pytest.raises(TurbopocketError, match="x: rows of 24 values, the weights have 32 columns"):
        core.linear(WEIGHTS, np.ones((1, 24), np.float32))


@pytest.mark.parametrize(
    ("layer", "x_shape", "message"),
    [
        (Conv2dLayer((1, 1), groups=2), (1, 32, 4, 4), "group is 2, must be 1"),
        (Conv2dLayer((3, 3)), (1, 32, 4, 4), "x: 32 channels at 3 x 3 taps, the weights have 32 columns"),
        (Conv2dLayer((2, 4)), (1, 4, 8, 8), "x: 4 channels are no multiple of vectors of 8 weights"),
        (Conv2dLayer((2, 2)), (1, 8, 1, 4), "a kernel over 2 pixels does not fit 1 of x and padding"),
        (Conv2dLayer((1, 1), stride=(0, 1)), (1, 32, 4, 4), "stride 0, .*: out of range"),
        (Conv2dLayer((1, 1), padding=(-1, 0, 0, 0)), (1, 32, 4, 4), "padding -1 and 0: out of range"),
        (Conv2dLayer((2**40, 2**40)), (1, 32, 4, 4), "kernel 1099511627776, .*: out of range"),
        (Conv2dLayer((1, 1), padding=(2**30,) * 4), (2**10, 32, 4, 4), "y: .* is too large"),
        (Conv2dLayer((1, 1)), (1, 32, -4, 4), r"x: size 2 of \[B, I, H, W\] is -4"),
    ],
)
def test_geometry_that_cannot_be_run_is_refused(
    core: CoreLibrary, layer: Conv2dLayer, x_shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(TurbopocketError, match=message):
        core.conv2d_shape(WEIGHTS, layer, x_shape)


def test_path_that_is_not_here_is_refused(core: CoreLibrary) -> None:
    with pytest.raises(TurbopocketError, match="path abacus: not on this processor"):
        core.linear(WEIGHTS, np.ones((1, 32), np.float32), path="abacus")
