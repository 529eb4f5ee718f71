"""What a backend may supply for decoder layers of a transformer; ``hqqtensor.generation`` asks ``backend.decoder``."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from hqqtensor.ops.packed import PackedWeight
from hqqtensor.ops.packed_states import PackedStates

NormRole = Literal["input", "attention_out", "mlp", "mlp_out", "q", "k", "final"]
LinearRole = Literal["qkv", "q", "k", "v", "o", "gate_up", "gate", "up", "down", "experts_gate_up", "experts_down"]
GATES = ("silu", "gelu_tanh")


class DecoderShape(NamedTuple):
    """Sizes and settings that all layers share.

    eps: of all norms. scaling: of the scores of attention. softcap: scores s become softcap * tanh(s / softcap); 0 for
    none. gate: one of ``GATES``.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float
    scaling: float
    softcap: float
    gate: str


class Decoder(Protocol):
    """The layers of one model, put together by the methods before ``run``. It keeps the tensors that it is given."""

    def set_layer(self, layer: int, window: int, rope: int) -> None:
        """window: tokens that a token sees, itself among them; 0 for all before it. rope: which of ``run``'s angles."""

    def norm(self, layer: int, role: NormRole, weight: Tensor) -> None:
        """The weight that a normalized vector is multiplied by; "final" belongs to no layer."""

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
        """A projection; joined ones are given in the order in which their outputs lie. Of experts: their stack.

        digits: of the activations, 1 for 8-bit ones, 2 finer than 16-bit floats, 3 as exact as float32 sums. rotation:
        inputs that a Hadamard matrix mixes with one another, 0 for none.
        """

    def dense(self, layer: int, role: LinearRole, weight: Tensor, bias: Tensor | None) -> None:
        """The same for a weight that is not packed, ``[N, K]`` or ``[experts, N, K]`` of float32, bfloat16 or float16,
        contiguous, with K a multiple of 16."""

    def router(self, layer: int, weight: Tensor, chosen: int, normalized: bool) -> None:
        """``[experts, hidden]``, what chooses experts: the best ``chosen`` of a softmax over all, whose weights are
        then divided by their sum if ``normalized``."""

    def run(
        self, x: Tensor, angles: Sequence[tuple[Tensor, Tensor]], keys: Sequence[Tensor], values: Sequence[Tensor],
        positions: Tensor | None, mask: Tensor | None, lengths: Sequence[int], firsts: Sequence[int],
        layers: tuple[int, int], verify: bool, packed: Sequence[PackedStates] | None = None,
    ) -> Tensor | None:  # fmt: skip
        """x ``[B, T, hidden]`` after the layers [first, last) and, where the last one of all is among them, the final
        norm; None where the kernels do not serve x, an angle is missing, or a weight's memory has moved (which is
        looked at if ``verify``).

        angles: tables of cosines and sines, float32 ``[places, width]``; ``positions``: the places of the tokens in
        them, integers ``[B or 1, T]``, by default those behind the tokens in the caches. keys, values: ``[B, kv_heads,
        capacity, head_dim]`` for each of the layers, of which the first ``lengths`` tokens are there and T more are
        written behind; ``firsts``: the place in the sequence of the first one. Where sequences have caches of their
        own: ``[1, kv_heads, capacity, head_dim]``, those of all sequences for the first layer, then for the next one.
        mask: bool or int64 ``[B, tokens of the sequence]``, zero for tokens that none sees; not where sequences have
        caches of their own. packed: for each of the caches older tokens, of equal settings; for layers with no window.
        """


class DecoderMaker(Protocol):
    """Makes decoders, and says where their weights should lie."""

    def __call__(self, shape: DecoderShape) -> Decoder:
        """A decoder without parts; RuntimeError for a shape that the kernels do not have."""

    def empty(self, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialized memory that the kernels read fastest."""

    def gathered(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of contiguous tensors in memory that the kernels read fastest, each with a storage of its own."""
