"""Keys or values of a quantized cache as one tensor, of which the older tokens stay packed until somebody computes with
them."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from hqqtensor.ops.packed_states import PackedStates, dense_states


class JoinedStates(Tensor):
    """``[B, H, T, D]``: packed blocks, then ``recent`` tokens ``[B, H, t, D]``.

    Attention "hqqtensor" reads both where they lie. For any other operation it is a plain tensor, made for that
    operation alone. It shows the cache as it was: tokens that are added later are not seen, but after a crop their
    place may be written to.

    qdata, scale, zero, settings: as ``ops.packed_states.dense_states`` takes them. signs: those of a rotation, or None.
    """

    _NAMES = ("recent", "qdata", "scale", "zero", "signs")

    @staticmethod
    def __new__(
        cls, recent: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor, signs: Tensor | None,
        settings: tuple[int, int, int],
    ) -> "JoinedStates":  # fmt: skip
        B, H, count, D = recent.shape
        size = (B, H, qdata.shape[0] * qdata.shape[3] + count, D)
        return torch.Tensor._make_wrapper_subclass(cls, size, dtype=recent.dtype, device=recent.device)  # type: ignore[attr-defined, no-any-return]

    def __init__(
        self, recent: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor, signs: Tensor | None,
        settings: tuple[int, int, int],
    ) -> None:  # fmt: skip
        self.recent, self.qdata, self.scale, self.zero, self.signs = recent, qdata, scale, zero, signs
        self.settings = settings

    def dense(self) -> Tensor:
        """All tokens in a plain tensor of their own."""
        parts = (self.qdata, self.scale, self.zero)
        old = dense_states(parts, self.settings, self.signs, self.recent.shape[-1])
        return torch.cat([old.to(self.recent.dtype), self.recent], 2)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[int, int, int]]:
        return [name for name in self._NAMES if getattr(self, name) is not None], self.settings

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], settings: tuple[int, int, int], outer_size: Any, outer_stride: Any
    ) -> "JoinedStates":
        recent, qdata, scale, zero = (inner[name] for name in cls._NAMES[:4])
        return cls(recent, qdata, scale, zero, inner.get("signs"), settings)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(JoinedStates, JoinedStates.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def packed_of(keys: JoinedStates, values: JoinedStates) -> PackedStates:
    """The packed tokens of a layer's keys and values, which one cache has given."""
    nbits, group_size, axis = keys.settings
    tensors = (keys.qdata, keys.scale, keys.zero, values.qdata, values.scale, values.zero)
    rotated = (keys.signs is not None, values.signs is not None)
    signs = values.signs if keys.signs is None else keys.signs
    return PackedStates(tensors, nbits, group_size, axis, values.settings[2], *rotated, signs)
