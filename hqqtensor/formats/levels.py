"""The values that codes stand for at scale 1, and which of them is nearest to a number."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Levels:
    """Finite values in ascending order.

    values: float32 ``[L]``, or ``[R, L]`` with L up to 16: levels for each row of the numbers that are looked up.
    thresholds: float32 ``[..., L - 1]``; x belongs to level i where ``thresholds[i-1] < x <= thresholds[i]``.
    """

    values: Tensor
    thresholds: Tensor

    @classmethod
    def between(cls, values: Tensor) -> "Levels":
        """Levels with the midpoints of ``values`` (ascending) as thresholds; a midpoint goes to the lower value."""
        return cls(values, (values[..., 1:] + values[..., :-1]) / 2)

    @property
    def count(self) -> int:
        return self.values.shape[-1]

    @property
    def spacing(self) -> Tensor:
        """Mean distance of neighbours, ``[1 or R, 1, 1]``."""
        return (self.values[..., -1] - self.values[..., 0]).view(-1, 1, 1) / (self.count - 1)

    @property
    def symmetric(self) -> bool:
        """Whether every level's negative is a level too."""
        return bool(torch.equal(self.values, -self.values.flip(-1)))

    def rows(self, part: slice) -> "Levels":
        """The levels of some of the rows."""
        if self.values.ndim == 1:
            return self
        return Levels(self.values[part], self.thresholds[part])

    def nearest(self, x: Tensor) -> Tensor:
        """Index (int32, shape of ``x``) of the level nearest to each number."""
        thresholds = self.thresholds.to(x.device).view(-1, self.count - 1)
        if self.count > 16:
            return torch.bucketize(x, thresholds[0], out_int32=True)
        # Counting the thresholds below is twice as fast as searching among so few.
        rows = x.reshape(thresholds.shape[0], -1)
        index = torch.zeros_like(rows, dtype=torch.uint8)
        above = torch.empty_like(rows, dtype=torch.bool)
        for i in range(self.count - 1):
            torch.gt(rows, thresholds[:, i : i + 1], out=above)
            index += above.view(torch.uint8)
        return index.view(x.shape).to(torch.int32)

    def at(self, index: Tensor) -> Tensor:
        """The value of each index."""
        values = self.values.to(index.device)
        if values.ndim == 1:
            return torch.index_select(values, 0, index.flatten()).view(index.shape)
        rows = index.reshape(values.shape[0], -1)
        return torch.gather(values, 1, rows.long()).view(index.shape)
