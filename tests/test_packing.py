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
)  # fmt: skip


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


@settings(deadline=None, max_examples=100)
@given(nbits=st.sampled_from([4, 8]), columns=st.integers(1, 400), seed=st.integers(0, 2**16))
def test_quantized_scales_come_back_from_rows_without_fill(nbits: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 2**nbits, (2, 3, columns), dtype=torch.uint8, generator=torch.manual_seed(seed))
    rows = pack_meta(codes, nbits)
    blocks, rest = divmod(columns, BLOCK)
    assert rows.shape[-1] == meta_bytes(columns, nbits) == (columns if nbits == 8 else 64 * blocks + (rest + 1) // 2)
    assert torch.equal(unpack_meta(rows, columns), codes)
    assert meta_bits(columns, rows.shape[-1]) == (nbits if columns > 1 else 8)
    if columns % 8 == 0:
        assert torch.equal(rows, pack(codes, nbits))


def test_rows_of_quantized_scales_of_another_size_are_refused() -> None:
    with pytest.raises(
        ValueError, match="200 quantized scales or zero points take 200 bytes in 8 bits or 100 in 4, got 99"
    ):
        meta_bits(200, 99)
