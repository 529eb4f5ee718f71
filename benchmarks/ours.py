"""hqqtensor's products as contenders."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contender import Contender, NotHere, copies
from hqqtensor import HqqConfig, HQQTensor
from hqqtensor.formats import format_names

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def config_for(nbits: int, **options: Any) -> HqqConfig:
    """Round to nearest, groups of 64 unless told otherwise; NotHere where this version lacks an option or a format."""
    lacking = set(options) - {f.name for f in dataclasses.fields(HqqConfig)}
    if lacking:
        raise NotHere(f"HqqConfig has no {sorted(lacking)}")
    if options.get("format", "int") not in format_names():
        raise NotHere(f"no format {options['format']!r}")
    return HqqConfig(nbits, **{"solver": "rtn", "group_size": 64, **options})


def label(nbits: int, dtype: str, options: dict[str, Any]) -> str:
    """The name of a contender, such as "4-bit fp32" or "4-bit g32 axis 0 bf16"."""
    parts = [options.get("format", f"{nbits}-bit")]
    parts += [f"g{options['group_size']}"] if "group_size" in options else []
    parts += ["axis 0"] if options.get("axis") == 0 else []
    parts += [f"{options.get('meta_nbits', 8)}-bit scales"] if options.get("quant_scale") else []
    return " ".join([*parts, "int8" if options.get("activation") == "int8" else "", dtype]).replace("  ", " ")


def contenders(w: Tensor, nbits: int, dtypes: list[str], **options: Any) -> list[Contender]:
    """``F.linear`` on ``w`` packed with these options, once for each dtype of the activations."""
    config = config_for(nbits, **options)
    q = HQQTensor.from_hp(w, config)
    kept = copies(q, q.nbytes, lambda _: HQQTensor.from_hp(w, config))  # in memory as quantize_ takes it

    def contender(dtype: str) -> Contender:
        weights = itertools.cycle([k.to(DTYPES[dtype]) for k in kept])

        def bind(x: Tensor) -> Callable[[], Tensor]:
            x = x.to(DTYPES[dtype])
            return lambda: F.linear(x, next(weights))

        precision = "int8" if options.get("activation") == "int8" else str(DTYPES[dtype]).removeprefix("torch.")
        as_dense = lambda: q.dequantize(torch.float32)  # noqa: E731
        return Contender(label(nbits, dtype, options), "ours", nbits, precision, q.nbytes, bind, as_dense)

    return [contender(dtype) for dtype in dtypes]
