"""Packed keys or values of a cache, to which blocks of tokens are added in place."""

from torch import Tensor

from hqqtensor.tensor import HQQTensor

LEAST_ROOM = 4  # blocks that fit beyond those that are there
MOST_ROOM = 64


class PackedBlocks:
    """Blocks ``[B, H, blocks, block, D]`` that lie in buffers with room for more: block 0 of all heads, then block
    1."""

    def __init__(self, first: HQQTensor) -> None:
        """first: what is packed already."""
        self.weight = first
        self._count = 0
        self._buffers: tuple[Tensor, ...] = ()
        self._write(first)

    def add(self, new: HQQTensor) -> None:
        """Put ``new`` behind the others. What ``weight`` and ``tensors`` gave before stays as it is."""
        self._write(new)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """qdata, scale and zero point of all blocks, as ``ops.packed_states`` has them."""
        qdata, scale, zero = (buffer[: self._count] for buffer in self._buffers)
        return qdata, scale, zero

    def _write(self, new: HQQTensor) -> None:
        parts = [t.movedim(2, 0) for t in new.operand()[:3]]  # type: ignore[union-attr]
        end = self._count + parts[0].shape[0]
        if not self._buffers or end > self._buffers[0].shape[0]:
            room = min(max(end // 2, LEAST_ROOM), MOST_ROOM)
            buffers = tuple(part.new_empty(end + room, *part.shape[1:]) for part in parts)
            for buffer, old in zip(buffers, self._buffers, strict=False):
                buffer[: self._count] = old[: self._count]
            self._buffers = buffers
        for buffer, part in zip(self._buffers, parts, strict=True):
            buffer[self._count : end] = part
        self._count = end
        qdata, scale, zero = (t.movedim(0, 2) for t in self.tensors)
        self.weight = new.with_data(qdata=qdata, scale=scale, zero_point=zero, shape=(*qdata.shape[:4], new.shape[-1]))
