# SPDX-License-Identifier: Apache-2.0
"""A scheme is its name: text and value are inverse of each other, and no two names are one scheme."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.activations import A8_DYNAMIC, A8_STATIC, A8_STEP, ActivationFormat, QParams
from turbopocket.quant.formats import parse_format
from turbopocket.quant.scheme import Scheme, parse_scheme

INT8 = parse_format("int8-row")
rounded = st.builds(ActivationFormat, st.sampled_from([4, 6, 8]), st.sampled_from(["dynamic", "static", "step"]))
activations = st.none() | rounded
weights = st.sampled_from([parse_format(name) for name in ("fp32", "int8-row", "int4-g32-asym", "vq8-d4-r16")])


@given(st.builds(Scheme, weights, activations, activations))
def test_a_scheme_is_read_from_its_name(scheme: Scheme) -> None:
    assert parse_scheme(str(scheme)) == scheme


@given(st.builds(Scheme, weights, activations, activations), st.builds(Scheme, weights, activations, activations))
def test_no_two_schemes_share_a_name(one: Scheme, other: Scheme) -> None:
    assert (str(one) == str(other)) == (one == other)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("int8-row", Scheme(INT8)),
        ("int8-row+a8-dynamic", Scheme(INT8, A8_DYNAMIC)),
        ("int8-row+a8-static", Scheme(INT8, A8_STATIC, A8_STATIC)),
        ("int8-row+a8-static+float", Scheme(INT8, A8_STATIC)),
        ("int8-row+float+a8-static", Scheme(INT8, None, A8_STATIC)),
        ("int8-row+a8-step", Scheme(INT8, A8_STEP, A8_STEP)),
        ("int8-row+a8-step+float", Scheme(INT8, A8_STEP)),
    ],
)
def test_names(name: str, scheme: Scheme) -> None:
    assert (str(scheme), parse_scheme(name)) == (name, scheme)
    assert scheme.nbytes((8, 16)) == INT8.nbytes((8, 16))


def test_what_a_scheme_needs() -> None:
    names = "int8-row", "int8-row+a8-dynamic", "int8-row+a8-static", "int8-row+float+a8-static", "int8-row+a8-step"
    schemes = [parse_scheme(name) for name in names]
    assert [each.is_weight_only for each in schemes] == [True, False, False, False, False]
    assert [each.is_static for each in schemes] == [False, False, True, True, True]
    assert [each.is_by_step for each in schemes] == [False, False, False, False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int5-row+a8-static", "`int5-row` is not a weight format"),
        ("int8-row+a5-static", "`a5-static` is no format of activations: known are a8-dynamic, a8-static, a8-step"),
        ("int8-row+", "`` is no format of activations"),
        ("int8-row+float", "`int8-row+float` is written `int8-row`"),
        ("int8-row+a8-static+a8-static", "is written `int8-row+a8-static`"),
        ("int8-row+a8-dynamic+float", "is written `int8-row+a8-dynamic`"),
        ("int8-row+a8-static+float+float", "is not a scheme: after the weight format come activations"),
    ],
)
def test_what_is_no_scheme_is_told(text: str, message: str) -> None:
    with pytest.raises(TurbopocketError) as caught:
        parse_scheme(text)
    assert message in str(caught.value)


def test_bits_that_no_activation_has_are_refused() -> None:
    with pytest.raises(TurbopocketError, match="4, 6 or 8 bits, not 5"):
        ActivationFormat(5, "static")


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_qparams_of_a_range_hold_its_ends_and_zero(bits: int) -> None:
    found = QParams.over(-1.0, 3.0, bits)
    assert (found.highest - found.lowest) * found.scale == pytest.approx(4.0)
    assert (found.lowest - found.zero_point) * found.scale == pytest.approx(-1.0, abs=found.scale / 2)
    assert found.lowest <= QParams.over(0.5, 2.0, bits).zero_point == found.lowest
