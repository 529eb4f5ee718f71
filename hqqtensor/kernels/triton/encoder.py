"""``ops.encoder.Encoder`` of the Triton kernels, which load when they are first needed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hqqtensor.formats import Levels
from hqqtensor.kernels.triton.limits import members, why_not_solved
from hqqtensor.ops.encoder import ColumnSteps, EncodeSettings
from hqqtensor.solvers import Passes, Solution


class TritonEncoder:
    """Integers only: "rtn" and "hqq_joint" of norm 2, and the packing of nearest codes."""

    passes: Passes | None = None
    column_steps: ColumnSteps | None = None
    column_spread: Callable[[Tensor, int], Tensor] | None = None

    def why_not(self, step: str, matrix: Tensor, settings: EncodeSettings) -> str | None:
        if step == "assign":
            integers = settings.format == "int"
            return None if integers else f"format {settings.format!r}: the Triton kernels pack integers only"
        out_features, in_features = matrix.shape
        longest = members(out_features, in_features, settings.group_size, settings.axis)
        return why_not_solved(settings.solver, settings.lp_norm, settings.format, longest)

    def solve(self, matrix: Tensor, settings: EncodeSettings, levels: Levels | None) -> Solution:
        from hqqtensor.kernels.triton import launch

        return Solution(*launch.solve(matrix, settings.nbits, settings.group_size, settings.axis, settings.solver))

    def assign(
        self, out: Tensor, matrix: Tensor, inverse_scale: Tensor, zero_point: Tensor | None, settings: EncodeSettings
    ) -> None:
        from hqqtensor.kernels.triton import launch

        assert zero_point is not None
        launch.assign(out, matrix, inverse_scale, zero_point, settings.nbits, settings.group_size, settings.axis)

    def empty_packed(self, sizes: Sequence[int], device: torch.device) -> Tensor:
        return torch.empty(*sizes, dtype=torch.uint8, device=device)
