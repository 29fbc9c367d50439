# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from turbopocket.ground.bits import packed_bytes
from turbopocket.quant.formats.bits import pack, unpack
from turbopocket.quant.names import WIDTHS


@pytest.mark.parametrize("columns", [1, 2, 3, 7, 9, 64])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_unpack_returns_what_was_packed(bits: int, signed: bool, columns: int) -> None:
    low = -(2 ** (bits - 1)) if signed else 0
    codes_OK = torch.randint(low, low + 2**bits, (5, columns)).to(torch.int8 if signed else torch.uint8)
    packed = pack(codes_OK, bits)
    assert packed.shape == (5, packed_bytes(columns, bits))
    assert torch.equal(unpack(packed, bits, columns, signed), codes_OK)


def test_low_nibble_comes_first_and_an_odd_row_ends_in_zero() -> None:
    assert pack(torch.tensor([[1, 2, 3]]), 4).tolist() == [[0x21, 0x03]]


def test_negative_codes_are_twos_complement() -> None:
    assert pack(torch.tensor([[-8, -1]]), 4).tolist() == [[0xF8]]
    assert pack(torch.tensor([[-127]]), 8).tolist() == [[0x81]]


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_row_is_one_string_of_bits_low_ones_first(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (13,)).tolist()
    as_one_number = sum(code << (bits * place) for place, code in enumerate(codes))
    expected = as_one_number.to_bytes(packed_bytes(13, bits), "little")
    assert bytes(pack(torch.tensor([codes]), bits)[0].tolist()) == expected
