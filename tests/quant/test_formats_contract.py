# SPDX-License-Identifier: Apache-2.0
"""What every weight format promises, tried on concrete values of every class in FORMATS."""

import pytest
import torch
from torch import Tensor

from turbopocket.quant.errors import QuantError
from turbopocket.quant.fit import ABSMAX, FITS, Fit
from turbopocket.quant.formats import (
    FORMATS,
    Affine,
    CompressedTensor,
    Dense,
    LayerFormat,
    from_matrix_view,
    matrix_view,
    parse_format,
)

VALUES: list[LayerFormat] = [
    Dense(16),
    Dense(32),
    *(Affine(bits, group, symmetric) for bits in (4, 8) for group in (None, 5, 32) for symmetric in (True, False)),
]
SHAPES = [(7, 15), (4, 64), (3, 5, 3, 3), (5, 32, 1, 1), (2, 160, 3, 2), (1, 1)]
FITTING = [
    pytest.param(value, shape, id=f"{value}-{shape}")
    for value in VALUES
    for shape in SHAPES
    if value.fits(shape) is None
]
AFFINE = [pytest.param(value, id=str(value)) for value in VALUES if isinstance(value, Affine)]


def test_every_class_in_the_registry_is_tried() -> None:
    assert {type(value) for value in VALUES} == set(FORMATS)


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_name_parses_back_to_the_same_value(value: LayerFormat) -> None:
    assert parse_format(str(value)) == value


@pytest.mark.parametrize("text", ["int4", "int5-row", "int4-g0", "int4-g032", "int4-row ", "fp8", "INT8-row", ""])
def test_unknown_name_is_refused_with_the_legal_names(text: str) -> None:
    with pytest.raises(QuantError, match=r"is not a weight format: known are fp16, fp32, int4-row"):
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
@pytest.mark.parametrize(("value", "shape"), FITTING)
def test_round_trip_error_is_within_half_a_step(value: LayerFormat, shape: tuple[int, ...], magnitude: float) -> None:
    weight = torch.randn(shape) * magnitude
    compressed = value.compress(weight, ABSMAX)
    error_OK = matrix_view(value.decompress(compressed) - weight).abs()
    assert (error_OK <= half_step_bound(value, compressed) * 1.0001).all()


@pytest.mark.parametrize("fit", FITS, ids=str)
@pytest.mark.parametrize("value", VALUES, ids=str)
def test_zeros_come_back_as_zeros(value: LayerFormat, fit: Fit) -> None:
    weight = torch.randn(6, 160)
    weight[2] = 0.0
    assert not value.decompress(value.compress(weight, fit, torch.eye(160)))[2].any()


@pytest.mark.parametrize("value", VALUES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_refused(value: LayerFormat, bad: float) -> None:
    weight = torch.zeros(4, 160)
    weight[1, 2:4] = bad
    with pytest.raises(QuantError, match=r"2 of 640 weights are NaN or infinite"):
        value.compress(weight, ABSMAX)


@pytest.mark.parametrize("value", [Dense(16), Affine(4), Affine(8, 5, False)], ids=str)
def test_weight_beyond_fp16_is_refused_with_its_size(value: LayerFormat) -> None:
    with pytest.raises(QuantError, match=r"1e\+08|[0-9]{6}.*65504|65504"):
        value.compress(torch.full((2, 5), 1e8), ABSMAX)


def test_group_that_does_not_divide_is_refused_with_both_numbers() -> None:
    reason = "320 input channels are not a multiple of group 64"
    value = Affine(4, 96)
    assert value.fits((8, 320, 3, 3)) == "320 input channels are not a multiple of group 96 in int4-g96"
    with pytest.raises(QuantError, match=reason.replace("64", "96")):
        value.nbytes((8, 320))
    with pytest.raises(QuantError, match=reason.replace("64", "96")):
        value.compress(torch.zeros(8, 320), ABSMAX)


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


@pytest.mark.parametrize(("value", "low", "high"), [(Affine(4), -8, 7), (Affine(8), -127, 127)], ids=str)
def test_symmetric_codes_use_their_whole_range_and_no_more(value: Affine, low: int, high: int) -> None:
    weight = torch.linspace(low, high, 511).repeat(2, 1)
    codes_OK, _, _ = value.unpack(value.compress(weight, ABSMAX))
    assert (int(codes_OK.min()), int(codes_OK.max())) == (low, high)


def test_parts_of_another_shape_are_refused() -> None:
    compressed = Affine(4).compress(torch.randn(4, 6), ABSMAX)
    with pytest.raises(QuantError, match=r"int4-row of shape \[4, 8\] stores"):
        Affine(4).decompress(CompressedTensor(Affine(4), (4, 8), compressed.parts))
