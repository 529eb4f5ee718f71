"""Tensors moved together into memory that the kernels read fastest."""

from collections.abc import Sequence

import torch
from torch import Tensor

OPS = torch.ops.hqqtensor


def gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of contiguous CPU tensors, one behind the other in huge pages where the system gives them.

    Each has a storage of its own; the memory is freed when the last of them is. Weights that were loaded from a file
    are mapped in small pages, whose addresses take time to look up.
    """
    sizes = [-(-t.nbytes // 64) * 64 for t in tensors]
    if not sum(sizes):
        return list(tensors)
    arena = OPS._arena_new(sum(sizes))
    try:
        copies = []
        for t in tensors:
            copy = OPS._arena_take(arena, t.nbytes).view(t.dtype).view(t.shape)
            copies.append(copy.copy_(t))
        return copies
    finally:
        OPS._arena_delete(arena)
