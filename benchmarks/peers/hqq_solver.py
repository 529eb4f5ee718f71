"""The hqq library's own solver, on the settings of its BaseQuantizeConfig."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.contender import NotHere


def solver(w: Tensor, nbits: int, group_size: int) -> tuple[Callable[[], object], Callable[[], Tensor]]:
    """A run that quantizes ``w``, and what the result stands for."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from hqq.core.quantize import Quantizer
    except ImportError as error:
        raise NotHere(str(error)) from None
    settings = {"nbits": nbits, "group_size": group_size, "axis": 1, "round_zero": nbits == 4}
    settings |= {"device": "cpu", "compute_dtype": torch.float32}

    def run() -> tuple[Tensor, dict]:
        return Quantizer.quantize(w, **settings)

    return run, lambda: Quantizer.dequantize(*run())
