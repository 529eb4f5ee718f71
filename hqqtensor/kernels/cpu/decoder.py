"""``ops.decoder.Decoder`` compiled: all layers in one parallel region, nothing of torch between two products."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hqqtensor.kernels.cpu.arena import gathered
from hqqtensor.ops.decoder import GATES, DecoderShape, LinearRole, NormRole
from hqqtensor.ops.packed import PackedWeight
from hqqtensor.ops.packed_states import PackedStates

OPS = torch.ops.hqqtensor


class CompiledDecoder:
    """Layers by a number that the library gives; freed with this object."""

    def __init__(self, shape: DecoderShape) -> None:
        """RuntimeError for sizes that the kernels do not have: heads whose length is no multiple of 16, say."""
        self._id: int = OPS._decoder_new(*shape[:-1], GATES.index(shape.gate))
        self._delete = OPS._decoder_delete.default  # when the process ends, modules may be gone before this object
        self._run = OPS._decoder_run.default

    def set_layer(self, layer: int, window: int, rope: int) -> None:
        OPS._decoder_set_layer(self._id, layer, window, rope)

    def norm(self, layer: int, role: NormRole, weight: Tensor) -> None:
        OPS._decoder_norm(self._id, layer, role, weight.detach())

    def linear(
        self,
        layer: int,
        role: LinearRole,
        w: PackedWeight,
        bias: Tensor | None,
        act_pre_scale: Tensor | None,
        digits: int,
        rotation: int,
    ) -> None:
        bias = None if bias is None else bias.detach()
        OPS._decoder_linear(self._id, layer, role, *w[:3], bias, act_pre_scale, *w[3:], digits, rotation)

    def dense(self, layer: int, role: LinearRole, weight: Tensor, bias: Tensor | None) -> None:
        bias = None if bias is None else bias.detach()
        OPS._decoder_dense(self._id, layer, role, weight.detach(), bias)

    def router(self, layer: int, weight: Tensor, chosen: int, normalized: bool) -> None:
        OPS._decoder_router(self._id, layer, weight.detach(), chosen, normalized)

    def run(
        self, x: Tensor, angles: Sequence[tuple[Tensor, Tensor]], keys: Sequence[Tensor], values: Sequence[Tensor],
        positions: Tensor | None, mask: Tensor | None, lengths: Sequence[int], firsts: Sequence[int],
        layers: tuple[int, int], verify: bool, packed: Sequence[PackedStates] | None = None,
    ) -> Tensor | None:  # fmt: skip
        cos, sin = [c for c, _ in angles], [s for _, s in angles]
        states, settings, signs = None, [], None
        if packed is not None:
            states = [t for of_cache in packed for t in of_cache.tensors]
            settings, signs = packed[0].settings, packed[0].signs
        where = (keys, values, positions, mask, lengths, firsts, *layers)
        return self._run(self._id, x, cos, sin, *where, verify, states, settings, signs)

    @staticmethod
    def empty(sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        return OPS._empty_packed([math.prod(sizes) * dtype.itemsize]).view(dtype).view(*sizes)

    @staticmethod
    def gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
        return gathered(tensors)

    def __del__(self) -> None:
        if hasattr(self, "_id"):
            self._delete(self._id)
