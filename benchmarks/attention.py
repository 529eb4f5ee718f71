"""``python -m benchmarks.attention``: one new token, a long cache, ``hqqtensor::attention`` beside torch's own.

Keys and values are bfloat16, as ``DynamicCache`` has them; torch's runs as transformers' "sdpa" does. Several caches
take turns, so that none is in the processor's cache already. GB/s: of keys and values read.
"""

import argparse
import itertools

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.timing import interleaved, machine, write_json
from hqqtensor.diagnostics.table import text_table
from hqqtensor.ops.attention import attention

SHAPES = {"SmolLM2": (9, 3, 64), "1B": (32, 8, 64), "7B": (32, 32, 128)}
"""Heads, heads of keys and values, numbers of a head."""
CACHE = 96 << 20
"""Bytes of the caches that take turns, at least."""


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As transformers calls it for one token without a mask."""
    return scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2).contiguous()


def measure(shape: str, tokens: int, batch: int, seconds: float) -> dict[str, float]:
    """Seconds of a call, by name."""
    heads, kv_heads, dim = SHAPES[shape]
    size = (batch, kv_heads, tokens, dim)
    count = max(1, -(-CACHE // (4 * batch * kv_heads * tokens * dim)))
    caches = [(torch.randn(size).bfloat16(), torch.randn(size).bfloat16()) for _ in range(count)]
    q, scaling = torch.randn(batch, heads, 1, dim).bfloat16(), dim**-0.5

    def ours(k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, scaling=scaling)

    torch.testing.assert_close(ours(*caches[0]), torch_attention(q, *caches[0]), rtol=2e-2, atol=2e-2)
    turns = {name: itertools.cycle(caches) for name in ("hqqtensor", "torch")}
    return interleaved(
        {
            "hqqtensor": lambda: ours(*next(turns["hqqtensor"])),
            "torch": lambda: torch_attention(q, *next(turns["torch"])),
        },
        seconds=seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 2048, 8192])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    figures = []
    for shape, batch, tokens in itertools.product(args.shapes, args.batch, args.tokens):
        _, kv_heads, dim = SHAPES[shape]
        nbytes = 4 * batch * kv_heads * tokens * dim
        figures.append(
            {"shape": shape, "batch": batch, "tokens": tokens, "bytes": nbytes}
            | measure(shape, tokens, batch, args.seconds)
        )
    rows = [
        [f["shape"], str(f["batch"]), str(f["tokens"]), f"{f['hqqtensor'] * 1e6:.0f}", f"{f['torch'] * 1e6:.0f}",
         f"{f['torch'] / f['hqqtensor']:.2f}", f"{f['bytes'] / f['hqqtensor'] / 1e9:.1f}"]
        for f in figures
    ]  # fmt: skip
    print(text_table(["shape", "batch", "tokens", "hqqtensor, us", "torch, us", "as fast", "GB/s"], rows))
    write_json(args.json, {"machine": machine(), "figures": figures})


if __name__ == "__main__":
    main()
