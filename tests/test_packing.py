import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hqqtensor.packing import (
    BLOCK,
    byte_offset,
    meta_bits,
    meta_bytes,
    pack,
    pack_meta,
    row_bytes,
    unpack,
    unpack_meta,
)


@settings(deadline=None, max_examples=150)
@given(nbits=st.integers(1, 8), rows=st.integers(1, 4), in_features=st.integers(1, 420), seed=st.integers(0, 2**16))
def test_unpack_gives_back_what_was_packed(nbits: int, rows: int, in_features: int, seed: int) -> None:
    codes = torch.randint(0, 2**nbits, (rows, in_features), dtype=torch.uint8, generator=torch.manual_seed(seed))
    qdata = pack(codes, nbits)
    assert qdata.shape == (rows, row_bytes(in_features, nbits))
    assert torch.equal(unpack(qdata, nbits, in_features), codes)


@pytest.mark.parametrize("nbits", range(1, 9))
def test_a_width_costs_exactly_its_bits(nbits: int) -> None:
    assert row_bytes(704, nbits) * 8 == 704 * nbits


@pytest.mark.parametrize("nbits", range(1, 9))
def test_whole_blocks_of_a_row_are_a_view_of_its_bytes(nbits: int) -> None:
    codes = torch.randint(0, 2**nbits, (3, 3 * BLOCK + 24), dtype=torch.uint8)
    first, last = byte_offset(BLOCK, codes.shape[1], nbits), byte_offset(codes.shape[1], codes.shape[1], nbits)
    part = pack(codes, nbits)[:, first:last]
    assert torch.equal(unpack(part, nbits, 2 * BLOCK + 24), codes[:, BLOCK:])


def test_four_bit_block_keeps_codes_in_slabs() -> None:
    codes = (torch.arange(BLOCK) % 16).to(torch.uint8)
    qdata = pack(codes, 4)
    assert torch.equal(qdata & 15, codes[:64])
    assert torch.equal(qdata >> 4, codes[64:])


def test_unknown_width_is_refused() -> None:
    with pytest.raises(ValueError, match="nbits must be one of"):
        row_bytes(64, 9)


@settings(deadline=None, max_examples=150)
@given(
    nbits=st.sampled_from([4, 8]),
    stack=st.lists(st.integers(1, 3), max_size=2),
    columns=st.integers(1, 420),
    seed=st.integers(0, 2**16),
)
def test_unpack_meta_gives_back_what_was_packed(nbits: int, stack: list[int], columns: int, seed: int) -> None:
    codes = torch.randint(0, 2**nbits, (*stack, columns), dtype=torch.uint8, generator=torch.manual_seed(seed))
    rows = pack_meta(codes, nbits)
    assert rows.dtype == torch.uint8 and rows.shape == (*stack, meta_bytes(columns, nbits))
    assert torch.equal(unpack_meta(rows, columns), codes)


@settings(deadline=None, max_examples=100)
@given(columns=st.integers(1, 420), place=st.integers(0, 419))
def test_a_scale_of_four_bits_lies_in_one_nibble_of_its_block(columns: int, place: int) -> None:
    place %= columns
    codes = torch.zeros(columns, dtype=torch.uint8)
    codes[place] = 15
    start = place // BLOCK * BLOCK
    half = (min(BLOCK, columns - start) + 1) // 2
    want = torch.zeros(meta_bytes(columns, 4), dtype=torch.uint8)
    want[start // 2 + (place - start) % half] = 15 << 4 * ((place - start) // half)
    assert torch.equal(pack_meta(codes, 4), want)


@settings(deadline=None, max_examples=150)
@given(columns=st.integers(1, 1000), stored=st.integers(0, 1001))
def test_the_bits_of_scales_show_in_the_bytes_of_a_row(columns: int, stored: int) -> None:
    assert meta_bytes(columns, 8) == columns and meta_bytes(columns, 4) == -(-columns // 2)
    if stored == columns:
        assert meta_bits(columns, stored) == 8
    elif stored == meta_bytes(columns, 4):
        assert meta_bits(columns, stored) == 4
    else:
        with pytest.raises(ValueError, match=f"rows of {columns} quantized scales or zero points .* got {stored}$"):
            meta_bits(columns, stored)
