# SPDX-License-Identifier: Apache-2.0
"""What every weight format promises, tried on concrete values of every class in FORMATS."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.fit import ABSMAX, FITS, Fit
from turbopocket.quant.formats import (
    FORMATS,
    Additive,
    Affine,
    Codebook,
    CompressedTensor,
    Dense,
    LayerFormat,
    Palette,
    from_matrix_view,
    matrix_view,
    parse_format,
)
from turbopocket.quant.formats.bits import pack

VALUES: list[LayerFormat] = [
    Dense(16),
    Dense(32),
    *(Affine(bits, group, symmetric) for bits in (4, 8) for group in (None, 5, 32) for symmetric in (True, False)),
    *(Palette(bits, rows) for bits in (1, 2, 3, 4, 6, 8) for rows in (None, 2)),
    *(Codebook(bits, 2) for bits in (1, 2, 3, 4, 6, 8)),
    *(Codebook(bits, length, rows=rows) for bits, length in ((3, 4), (8, 8)) for rows in (None, 2)),
    *(Codebook(bits, 4, along_outputs=True, rows=rows) for bits in (3, 8) for rows in (None, 4)),
    *(Additive(count, bits, length) for count, bits, length in ((2, 1, 2), (2, 3, 4), (3, 6, 8), (4, 8, 8))),
    *(Additive(count, 8, length, shared=True) for count, length in ((2, 8), (3, 4))),
]
SHAPES = [(7, 15), (4, 64), (3, 5, 3, 3), (5, 32, 1, 1), (2, 160, 3, 2), (8, 24, 3, 3), (1, 1)]
FITTING = [
    pytest.param(value, shape, id=f"{value}-{shape}")
    for value in VALUES
    for shape in SHAPES
    if value.fits(shape) is None
]
ROUNDED = [each for each in FITTING if isinstance(each.values[0], Dense | Affine)]
TABLES = [each for each in FITTING if isinstance(each.values[0], Palette | Codebook | Additive)]
AFFINE = [pytest.param(value, id=str(value)) for value in VALUES if isinstance(value, Affine)]


def test_every_class_in_the_registry_is_tried() -> None:
    assert {type(value) for value in VALUES} == set(FORMATS)


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_name_parses_back_to_the_same_value(value: LayerFormat) -> None:
    assert parse_format(str(value)) == value


@pytest.mark.parametrize(
    "text",
    [
        *("int4", "int5-row", "int4-g0", "int4-g032", "int4-row ", "fp8", "INT8-row", ""),
        *("lut5", "lut4-r0", "lut4-r016", "lut4-g16", "vq8", "vq5-d4", "vq8-d3", "vq8-d4-r8-out", "vq8-d16"),
        *("avq1x8-d8", "avq2x5-d8", "avq2x8", "avq5x8-d8", "avq2x8-d8-r4", "vq8-d4-shared"),
    ],
)
def test_unknown_name_is_refused_with_the_legal_names(text: str) -> None:
    with pytest.raises(TurbopocketError, match=r"is not a weight format: known are fp16, fp32, int4-row"):
        parse_format(text)


@pytest.mark.parametrize(("value", "shape"), FITTING)
def test_stored_bytes_equal_promised_bytes(value: LayerFormat, shape: tuple[int, ...]) -> None:
    assert value.compress(torch.randn(shape), ABSMAX).nbytes == value.nbytes(shape)


@pytest.mark.parametrize(("value", "shape"), FITTING)
def test_decompressed_weight_is_float32_of_the_same_shape(value: LayerFormat, shape: tuple[int, ...]) -> None:
    weight = value.decompress(value.compress(torch.randn(shape).to(torch.bfloat16), ABSMAX))
    assert (weight.dtype, tuple(weight.shape)) == (torch.float32, shape)
    assert weight.is_contiguous()


def half_step_bound(value: LayerFormat, compressed: CompressedTensor) -> Tensor:
    """Half of each weight's step, [O, K]: from the stored scale, or from fp16's own spacing."""
    if isinstance(value, Affine):
        _, scale_OG, _ = value.unpack(compressed)
        columns = matrix_view(torch.empty(compressed.shape)).shape[1]
        return scale_OG.to(torch.float32).repeat_interleave(columns // scale_OG.shape[1], dim=1) / 2
    mantissa_bits = {16: 10, 32: 23}[int(value.weight_bits)]
    return matrix_view(value.decompress(compressed)).abs() * 2.0 ** -(mantissa_bits + 1) + 2.0**-25


@pytest.mark.parametrize("magnitude", [1e-9, 1e-4, 1.0, 3e3])
@pytest.mark.parametrize(("value", "shape"), ROUNDED)
def test_round_trip_error_is_within_half_a_step(value: LayerFormat, shape: tuple[int, ...], magnitude: float) -> None:
    weight = torch.randn(shape) * magnitude
    compressed = value.compress(weight, ABSMAX)
    error_OK = matrix_view(value.decompress(compressed) - weight).abs()
    assert (error_OK <= half_step_bound(value, compressed) * 1.0001).all()


@pytest.mark.parametrize("magnitude", [1e-9, 1e-4, 1.0, 3e3])
@pytest.mark.parametrize(("value", "shape"), TABLES)
def test_tables_lose_less_than_the_weight_itself(
    value: Palette | Codebook | Additive, shape: tuple[int, ...], magnitude: float
) -> None:
    weight = torch.randn(shape) * magnitude
    compressed = value.compress(weight, ABSMAX)
    assert all(torch.isfinite(part).all() for part in compressed.parts.values())
    error = (value.decompress(compressed) - weight).square().sum()
    # Numbers under fp16's smallest can come back as zeros.
    assert error <= (1.001 if magnitude < 1e-7 else 0.9) * weight.square().sum()


@pytest.mark.parametrize("fit", FITS, ids=str)
@pytest.mark.parametrize("value", VALUES, ids=str)
def test_zeros_come_back_as_zeros(value: LayerFormat, fit: Fit) -> None:
    weight = torch.randn(8, 160)
    weight[2:4] = 0.0
    if isinstance(value, Palette) and value.rows is None:
        weight = torch.zeros(8, 160)  # one table for all rows need not hold a zero
    assert not value.decompress(value.compress(weight, fit, torch.eye(160)))[2:4].any()


@pytest.mark.parametrize("value", VALUES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_refused(value: LayerFormat, bad: float) -> None:
    weight = torch.zeros(4, 160)
    weight[1, 2:4] = bad
    with pytest.raises(TurbopocketError, match=r"2 of 640 weights are NaN or infinite"):
        value.compress(weight, ABSMAX)


@pytest.mark.parametrize(
    "value", [Dense(16), Affine(4), Affine(8, 5, False), Palette(4), Codebook(4, 2), Additive(2, 4, 2)], ids=str
)
def test_weight_beyond_fp16_is_refused_with_its_size(value: LayerFormat) -> None:
    with pytest.raises(TurbopocketError, match=r"1e\+08|[0-9]{6}.*65504|65504"):
        value.compress(torch.full((2, 10), 1e8), ABSMAX)


def test_group_that_does_not_divide_is_refused_with_both_numbers() -> None:
    reason = "320 input channels are not a multiple of group 64"
    value = Affine(4, 96)
    assert value.fits((8, 320, 3, 3)) == "320 input channels are not a multiple of group 96 in int4-g96"
    with pytest.raises(TurbopocketError, match=reason.replace("64", "96")):
        value.nbytes((8, 320))
    with pytest.raises(TurbopocketError, match=reason.replace("64", "96")):
        value.compress(torch.zeros(8, 320), ABSMAX)


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("lut4-r16", (24, 32), "24 output channels are not a multiple of 16 per table in lut4-r16"),
        ("vq8-d4-r16", (24, 32), "24 output channels are not a multiple of 16 per table in vq8-d4-r16"),
        ("vq8-d4", (8, 6, 3, 3), "6 input channels are not a multiple of vector length 4 in vq8-d4"),
        ("avq2x8-d8", (8, 4, 3, 3), "4 input channels are not a multiple of vector length 8 in avq2x8-d8"),
        ("vq8-d4-out", (6, 8), "6 output channels are not a multiple of vector length 4 in vq8-d4-out"),
        (
            "vq8-d4-out-r2",
            (8, 8),
            "2 output channels per codebook are not a multiple of vector length 4 in vq8-d4-out-r2",
        ),
        ("lut4", (4,), "lut4 stores Linear [O, I] and Conv2d [O, I, kh, kw] weights, not shape [4]"),
    ],
)
def test_shape_that_tables_do_not_fit_is_refused_with_numbers(name: str, shape: tuple[int, ...], reason: str) -> None:
    assert parse_format(name).fits(shape) == reason


@pytest.mark.parametrize(
    "make",
    [
        lambda: Palette(5),
        lambda: Palette(4, 0),
        lambda: Codebook(7, 4),
        lambda: Codebook(8, 3),
        lambda: Codebook(8, 4, rows=0),
        lambda: Additive(2, 5, 4),
        lambda: Additive(1, 8, 8),
        lambda: Additive(2, 8, 3),
    ],
)
def test_table_that_does_not_exist_is_refused(make: Callable[[], LayerFormat]) -> None:
    with pytest.raises(
        TurbopocketError,
        match=r"a code has 1, 2, 3, 4, 6 or 8 bits|at least 1 output|2, 4 or 8 weights|2 to 4 codebooks, not 1",
    ):
        make()


def test_group_never_spans_two_taps_of_a_convolution() -> None:
    # 12 = 4 channels x 3 taps: it divides the matrix view's 36 columns and still is no group of channels.
    assert Affine(4, 12).fits((8, 4, 3, 3)) is not None


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (2, 3, 4, 5, 6), (0, 4)])
def test_shape_of_no_linear_or_convolution_is_refused(shape: tuple[int, ...]) -> None:
    assert "stores Linear [O, I] and Conv2d" in str(Affine(8).fits(shape))


def test_matrix_view_puts_the_channels_of_a_tap_side_by_side() -> None:
    weight = torch.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    assert matrix_view(weight)[0, :3].tolist() == weight[0, :, 0, 0].tolist()
    assert torch.equal(from_matrix_view(matrix_view(weight), (2, 3, 2, 2)), weight)


@pytest.mark.parametrize("value", AFFINE)
def test_unpacked_codes_scale_and_zero_rebuild_the_weight(value: Affine) -> None:
    compressed = value.compress(torch.randn(3, 160), ABSMAX)
    codes_OK, scale_OG, zero_OG = value.unpack(compressed)
    zero = 0 if zero_OG is None else zero_OG.float().unsqueeze(-1)
    steps_OGg = codes_OK.float().reshape(3, scale_OG.shape[1], -1) - zero
    rebuilt = (steps_OGg * scale_OG.float().unsqueeze(-1)).reshape(3, 160)
    assert torch.equal(rebuilt, value.decompress(compressed))
    assert codes_OK.dtype == (torch.int8 if value.symmetric else torch.uint8)


@pytest.mark.parametrize("rows", [None, 2])
def test_unpacked_codes_and_table_rebuild_the_weight(rows: int | None) -> None:
    compressed = Palette(3, rows).compress(torch.randn(6, 5, 3, 3), ABSMAX)
    codes_OK, table_GP = Palette(3, rows).unpack(compressed)
    assert (codes_OK.dtype, tuple(codes_OK.shape)) == (torch.uint8, (6, 45))
    assert (table_GP.dtype, tuple(table_GP.shape)) == (torch.float16, (6 // (rows or 6), 8))
    rebuilt = [[float(table_GP[row // (rows or 6), int(code)]) for code in codes_OK[row]] for row in range(6)]
    assert torch.equal(torch.tensor(rebuilt), matrix_view(Palette(3, rows).decompress(compressed)))


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("along_outputs", [False, True])
def test_unpacked_codes_codebook_and_scale_rebuild_the_weight(along_outputs: bool, rows: int | None) -> None:
    value = Codebook(6, 4, along_outputs, rows)
    compressed = value.compress(torch.randn(8, 12, 3, 3), ABSMAX)
    codes_RC, codebook_GPD, scale_O = value.unpack(compressed)
    assert (codes_RC.dtype, tuple(codes_RC.shape)) == (torch.uint8, (2, 108) if along_outputs else (8, 27))
    assert (codebook_GPD.dtype, tuple(codebook_GPD.shape)) == (torch.float16, (8 // (rows or 8), 64, 4))
    rebuilt = torch.empty(8, 108)
    for row in range(8):
        for column in range(108):
            code = int(codes_RC[row // 4, column] if along_outputs else codes_RC[row, column // 4])
            place = row % 4 if along_outputs else column % 4
            rebuilt[row, column] = codebook_GPD[row // (rows or 8), code, place].float() * scale_O[row].float()
    assert torch.equal(rebuilt, matrix_view(value.decompress(compressed)))


def test_unpacked_codes_codebooks_and_scale_add_up_to_the_weight() -> None:
    value = Additive(3, 3, 4)
    compressed = value.compress(torch.randn(5, 12, 3, 3), ABSMAX)
    codes_MOJ, codebooks_MPD, scale_O = value.unpack(compressed)
    assert (codes_MOJ.dtype, tuple(codes_MOJ.shape)) == (torch.uint8, (3, 5, 27))
    assert (codebooks_MPD.dtype, tuple(codebooks_MPD.shape)) == (torch.float16, (3, 8, 4))
    rebuilt = torch.empty(5, 108)
    for row in range(5):
        for column in range(108):
            codes = codes_MOJ[:, row, column // 4].tolist()
            parts = [codebooks_MPD[book, code, column % 4].float() for book, code in enumerate(codes)]
            rebuilt[row, column] = sum(parts) * scale_O[row].float()
    torch.testing.assert_close(rebuilt, matrix_view(value.decompress(compressed)), rtol=1e-6, atol=1e-6)


def test_vectors_along_outputs_are_vectors_along_inputs_of_the_transpose() -> None:
    across, along = Codebook(4, 4), Codebook(4, 4, along_outputs=True)
    codes_OC = torch.randint(0, 16, (16, 6), dtype=torch.uint8)
    codebook = torch.randn(1, 16, 4).to(torch.float16)
    parts = {"codebook": codebook, "scale": torch.ones(16, dtype=torch.float16), "codes": pack(codes_OC, 4)}
    weight_OK = across.decompress(CompressedTensor(across, (16, 24), parts))
    parts = {**parts, "scale": torch.ones(24, dtype=torch.float16), "codes": pack(codes_OC.T.contiguous(), 4)}
    assert torch.equal(along.decompress(CompressedTensor(along, (24, 16), parts)), weight_OK.T)


@pytest.mark.parametrize(("value", "low", "high"), [(Affine(4), -8, 7), (Affine(8), -127, 127)], ids=str)
def test_symmetric_codes_use_their_whole_range_and_no_more(value: Affine, low: int, high: int) -> None:
    weight = torch.linspace(low, high, 511).repeat(2, 1)
    codes_OK, _, _ = value.unpack(value.compress(weight, ABSMAX))
    assert (int(codes_OK.min()), int(codes_OK.max())) == (low, high)


def test_parts_of_another_shape_are_refused() -> None:
    compressed = Affine(4).compress(torch.randn(4, 6), ABSMAX)
    with pytest.raises(TurbopocketError, match=r"int4-row of shape \[4, 8\] stores"):
        Affine(4).decompress(CompressedTensor(Affine(4), (4, 8), compressed.parts))
