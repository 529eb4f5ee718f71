"""Calls every operator with arguments of which one or two were replaced by wrong ones, and compares the compiled
kernels with the plain path: either both refuse, or both give the same numbers. Prints how many calls were refused and
how many served.

A process of its own, so that a crash is a failure of the test that starts it: ``python wrong_calls.py SEED COUNT``.
"""

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hqqtensor import backend
from hqqtensor.ops.packed import LAYOUTS, PackedWeight, flat
from hqqtensor.packing import pack, pack_meta

OPS = torch.ops.hqqtensor
FORMATS = [("int", 4), ("int", 3), ("int", 8), ("nf4", 4), ("fp8", 8), ("codebook", 2), ("codebook rows", 4)]
NUMBERS = [-(2**63), -(2**40), -1, 0, 1, 2, 3, 5, 7, 9, 63, 64, 65, 2**31, 2**40, 2**40 + 1, 2**62, 2**63 - 1]
TEXTS = ["int", "nf4", "fp8", "codebook", "", "float", "int8", "high", "x" * 300]
DTYPES = [torch.float32, torch.float16, torch.float64, torch.uint8, torch.int64, torch.bool, torch.complex64]
OTHER_DTYPES = [*DTYPES, torch.bfloat16, torch.int8, torch.int32, torch.uint16]


def weight(rng: random.Random, lead: tuple[int, ...]) -> PackedWeight:
    """A random packed weight ``[*lead, N, K]`` that is right."""
    name, nbits = rng.choice(FORMATS)
    N, K, axis = rng.choice([0, 1, 2, 9, 40]), rng.choice([1, 8, 20, 64, 200]), rng.choice([0, 1])
    size = rng.choice([1, 4, 8, 20, 64, 200, 1 << 40])
    rows, columns = (N, -(-K // size)) if axis == 1 else (-(-max(N, 1) // size), K)
    meta: list[Tensor] = []

    def values(low: float, high: float, quantized: int) -> Tensor:
        if not quantized:
            return torch.rand(*lead, rows, columns).mul(high - low).add(low).half()
        meta.extend([torch.rand(*lead, 2, columns) * (high - low) / 2**quantized, torch.rand(*lead, 2, columns)])
        return pack_meta(torch.randint(0, 2**quantized, (*lead, rows, columns), dtype=torch.uint8), quantized)

    codes = torch.randint(0, 2**nbits, (*lead, N, K), dtype=torch.uint8)
    if name == "fp8":
        codes[codes & 127 == 127] = 0  # NaN
    scale = values(0.1, 1.1, rng.choice([0, 0, 4, 8]))
    zero = values(0.0, 2.0**nbits, rng.choice([0, 0, 4, 8])) if name == "int" else None
    if name.startswith("codebook"):
        zero = torch.randn(*lead, N if "rows" in name else 1, 2**nbits)
    return PackedWeight(pack(codes, nbits), scale, zero, meta, nbits, name.removesuffix(" rows"), size, axis, K)


def arguments(rng: random.Random, op: str) -> list[Any]:
    """Arguments of an operator that are right."""
    lead = {"batched_linear": (3,), "grouped_linear": (3,), "dequantize": rng.choice([(), (3,), (2, 2)])}.get(op, ())
    if op == "dequantize_into":
        lead = rng.choice([(), (3,), (2, 2)])
    w = weight(rng, lead)
    K, N = w.in_features, w.qdata.shape[-2]
    x = torch.randn(*{"batched_linear": (3, 5), "grouped_linear": (7,)}.get(op, (2, 5)), K)
    pre = rng.choice([None, torch.rand(K) + 0.5])
    activation = rng.choice(["float", "float", "high", "int8"])
    given = {
        "linear": lambda: (x, w, rng.choice([None, torch.randn(N)]), pre, activation),
        "batched_linear": lambda: (x, w, pre, activation),
        "grouped_linear": lambda: (x, torch.tensor([2, 2, 6], dtype=torch.int32), w, pre, activation),
        "dequantize": lambda: (w, rng.choice([torch.float32, torch.bfloat16])),
        "dequantize_into": lambda: (torch.empty(*lead, N, K, dtype=torch.float32), w),
        "embedding": lambda: (torch.randint(0, max(N, 1), (2, 2 if N else 0)), w, torch.float32),
    }
    return list(flat(op, given[op]()))


def many(rng: random.Random) -> list[Any]:
    """Arguments of linear_many that are right."""
    one = weight(rng, ())
    count, K = rng.choice([1, 2, 3]), one.in_features
    zero = None if one.zero_point is None else [one.zero_point] * count
    bias = rng.choice([None, [torch.randn(one.qdata.shape[0])] * count])
    activation = rng.choice(["float", "int8"])
    lists = ([one.qdata] * count, [one.scale] * count, zero, bias)
    return [torch.randn(2, K), *lists, *one[4:], activation, list(one.meta or ()) * count]


def wrong_tensor(rng: random.Random, t: Tensor) -> Any:
    """Something else in the place of a tensor, or the same numbers in another form."""

    def index_past_the_end() -> Tensor:
        return t + rng.choice([-1, 1, 100, 2**40]) if not t.dtype.is_floating_point and t.dtype != torch.uint8 else t

    changes: list[Callable[[], Any]] = [
        lambda: t.to(rng.choice(OTHER_DTYPES)),
        lambda: t.new_empty(0),
        lambda: t.new_empty(()),
        lambda: t.to("meta"),
        lambda: t.unsqueeze(0),
        lambda: t.unsqueeze(-1),
        lambda: t[0] if t.ndim and t.shape[0] else t,
        lambda: t[:0] if t.ndim else t,
        lambda: t[..., :-1] if t.ndim and t.shape[-1] else t,
        lambda: torch.cat([t, t], -1) if t.ndim else t,
        lambda: torch.cat([t, t]) if t.ndim else t,
        lambda: t.mT if t.ndim > 1 else t,
        lambda: t.mT.contiguous().mT if t.ndim > 1 else t,
        lambda: torch.stack([t, t], -1)[..., 0],
        lambda: t[..., :1].expand(t.shape) if t.ndim and t.shape[-1] else t,
        lambda: t[:1].expand(t.shape) if t.ndim and t.shape[0] else t,
        lambda: t.new_zeros(1).expand(2**20, 2**20),
        lambda: t.reshape(-1),
        index_past_the_end,
        lambda: None,
    ]
    return rng.choice(changes)()


def wrong(rng: random.Random, value: Any) -> Any:
    if isinstance(value, Tensor):
        return wrong_tensor(rng, value)
    if isinstance(value, list):
        choice = rng.randrange(5)
        if choice == 0 or not value:
            return rng.choice([None, [], [torch.ones(1, 1)], [torch.ones(2, 2, dtype=torch.uint8)] * 4])
        if choice == 1:
            return value[:-1]
        if choice == 2:
            return [*value, value[0]]
        i = rng.randrange(len(value))
        return [*value[:i], wrong_tensor(rng, value[i]), *value[i + 1 :]]
    if isinstance(value, torch.dtype):
        return rng.choice(DTYPES)
    if isinstance(value, str):
        return rng.choice(TEXTS)
    if isinstance(value, int):
        return rng.choice(NUMBERS)
    return rng.choice([torch.ones(3), torch.ones(2, 2), None])


def outcome(name: str, args: list[Any], choice: str) -> Any:
    copies = list(args)
    if name == "dequantize_into" and isinstance(args[0], Tensor) and args[0].numel() < 2**20:
        copies[0] = torch.zeros_like(args[0])
    with backend(choice):
        try:
            out = getattr(OPS, name)(*copies)
        except Exception as error:
            return error
    return copies[0] if name == "dequantize_into" else out


def same(a: Tensor, b: Tensor) -> bool:
    if a.device.type == "meta":
        return a.shape == b.shape and a.dtype == b.dtype
    size = b.float().nan_to_num(0, 0, 0).abs().max().item() if b.numel() else 0.0
    return a.shape == b.shape and torch.allclose(
        a.float(), b.float(), atol=0.02 * size + 1e-3, rtol=0.02, equal_nan=True
    )


def check(rng: random.Random, name: str, args: list[Any]) -> bool:
    """Whether the call was refused; raises where the two paths disagree."""
    for i in rng.sample(range(len(args)), rng.choice([0, 1, 1, 1, 2])):
        args[i] = wrong(rng, args[i])
    got, want = (outcome(name, args, choice) for choice in ("auto", "reference"))
    refused = isinstance(want, Exception)
    about = [(tuple(a.shape), a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in args]
    if refused != isinstance(got, Exception) or not (refused or same(got, want)):
        raise SystemExit(f"{name}{about}\ncompiled: {got!r}\nplain: {want!r}")
    return refused


def quantizing(rng: random.Random) -> None:
    """The operators of the encoder, which have no second path: they must only not crash."""
    w, levels = torch.randn(12, 64), torch.linspace(-1, 1, 4)
    between, codes = (levels[1:] + levels[:-1]) / 2, torch.arange(4, dtype=torch.uint8)
    inverse, packed = torch.rand(12, 4) + 0.1, torch.zeros(12, 32, dtype=torch.uint8)
    calls: dict[str, list[Any]] = {
        "_solve": [w, 4, 16, 1, "hqq_joint"],
        "_assign": [packed, w, inverse, inverse, 4, 16, 1],
        "_solve_levels": [w, levels, between, codes, -1, 0.0, 16, 1, "rtn"],
        "_assign_levels": [packed, w, inverse, levels, between, codes, -1, 0.0, 4, 16, 1],
        "_lloyd": [w.view(12, 4, 16), inverse, levels, between, codes, -1, 0.0],
        "_pool_empty": [0, [3, 4], torch.float32],
        "_empty_packed": [[3, 4]],
    }
    name = rng.choice(list(calls))
    args = calls[name]
    for i in rng.sample(range(len(args)), min(len(args), rng.choice([1, 2]))):
        args[i] = rng.choice([[-1], [2**62, 4], [0, 5]]) if isinstance(args[i], list) else wrong(rng, args[i])
    try:
        getattr(OPS, name)(*args)
    except Exception:
        return


def main(seed: int, count: int) -> None:
    torch.set_num_threads(2)
    refused = 0
    for i in range(seed, seed + count):
        rng = random.Random(i)
        torch.manual_seed(i)
        quantizing(rng)
        name = rng.choice([*LAYOUTS, "linear_many"])
        args = many(rng) if name == "linear_many" else arguments(rng, name)
        refused += check(rng, name, args)
    print(refused, count - refused)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
