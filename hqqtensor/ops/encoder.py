"""What a backend may supply for quantizing weights on its devices; ``hqqtensor.encode`` asks ``backend.encoder``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from hqqtensor.formats import Levels
from hqqtensor.solvers import Passes, Solution


@dataclass(frozen=True)
class EncodeSettings:
    """How a matrix is to be quantized; fields as in ``HqqConfig``, but group_size is always a number."""

    nbits: int
    group_size: int
    axis: int
    format: str
    solver: str
    lp_norm: float


class ColumnSteps(Protocol):
    """Calibrated quantization of a group of columns of all rows, float32 ``[N, g]``, a view of the whole matrix."""

    def solve(self, group: Tensor, importance: Tensor, nbits: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point, float32 ``[N, 1]``, of least sum of importance * error^2; importance ``[g]``, sum 1."""

    def feed_back(
        self, group: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, nbits: int, codes: Tensor
    ) -> Tensor:
        """Round column by column; each error goes into the columns after it by its row of ``upper [g, g]``.

        scale, zero_point: ``[N, 1]``. Writes the codes into ``codes``, uint8 ``[N, g]``, and gives the errors, float32
        ``[N, g]``, each divided by its entry on the diagonal of ``upper``. What ``group`` holds afterwards is open.
        """


class Encoder(Protocol):
    """Quantizes matrices ``[N, K]`` of float32, bfloat16 or float16 on the backend's devices.

    passes: what goes over the weights while a codebook is learned; None where torch's operations have to.
    column_steps: the same for calibration. column_spread: ``transforms.column_scale.column_spread``, likewise.
    """

    passes: Passes | None
    column_steps: ColumnSteps | None
    column_spread: Callable[[Tensor, int], Tensor] | None

    def why_not(self, step: Literal["solve", "assign"], matrix: Tensor, settings: EncodeSettings) -> str | None:
        """None, or why it cannot do this step for such a matrix; torch's operations do it then."""

    def solve(self, matrix: Tensor, settings: EncodeSettings, levels: Levels | None) -> Solution:
        """Scales (and zero points) of all groups, float32 ``[N, groups]`` for axis 1, ``[groups, K]`` for axis 0.

        levels: what codes stand for at scale 1, for each row or for all; None for integers with zero points.
        """

    def assign(
        self, out: Tensor, matrix: Tensor, inverse_scale: Tensor, zero_point: Tensor | None, settings: EncodeSettings
    ) -> None:
        """Write the packed nearest codes into ``out``, uint8 ``[N, row_bytes]``.

        inverse_scale, zero_point: as from ``solve``; for a learned codebook zero_point has its entries.
        """

    def empty_packed(self, sizes: Sequence[int], device: torch.device) -> Tensor:
        """Memory for packed codes, uint8, of the kind that the backend's kernels read fastest."""
