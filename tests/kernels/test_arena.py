"""Tensors gathered in one piece of memory."""

import pytest
import torch

from hqqtensor.kernels.cpu.arena import OPS, gathered


def test_copies_have_the_same_numbers_and_storages_of_their_own() -> None:
    before = [torch.arange(7, dtype=torch.uint8), torch.randn(3, 5).bfloat16(), torch.randn(()), torch.empty(0, 4)]
    after = gathered(before)
    for a, b in zip(before, after, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        assert b.untyped_storage().nbytes() == a.nbytes
    places = [t.data_ptr() for t in after[:3]]
    assert places == [places[0], places[0] + 64, places[0] + 128]


def test_the_memory_lives_as_long_as_the_last_of_them() -> None:
    after = gathered([torch.full((1000,), float(i)) for i in range(5)])
    last = after[3]
    del after
    junk = [torch.randn(5000) for _ in range(50)]
    assert len(junk) == 50 and torch.equal(last, torch.full((1000,), 3.0))


def test_an_arena_that_is_full_or_gone_is_an_error() -> None:
    arena = OPS._arena_new(100)
    assert OPS._arena_take(arena, 60).shape == (60,)
    for count in (40, -1):
        with pytest.raises(RuntimeError, match="an arena of 100 bytes, of which 64 are taken, has no"):
            OPS._arena_take(arena, count)
    OPS._arena_delete(arena)
    with pytest.raises(RuntimeError, match=f"there is no arena {arena}"):
        OPS._arena_take(arena, 1)
    with pytest.raises(RuntimeError, match="an arena must have 1 to"):
        OPS._arena_new(0)
