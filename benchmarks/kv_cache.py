"""``python -m benchmarks.kv_cache``: what a token costs with a quantized cache, ours and transformers' own.

Every cache takes the same prompt and then the same tokens, all of them token by token in turn. Before the tokens each
answer is checked: packed tokens must come back within the error of their width. Reported are milliseconds a layer: the
prompt, the median token, and the mean of a whole window of tokens, with what is quantized on the way. transformers'
backends "hqq" and "quanto" take part where those libraries are installed.
"""

import argparse
import statistics
import time
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks import aims
from benchmarks.contender import NotHere, WrongAnswer
from benchmarks.timing import machine, write_json
from hqqtensor.diagnostics.table import text_table
from hqqtensor.integrations.transformers.cache import HqqQuantizedCache

GROUP = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BOUNDS = {8: 0.02, 4: 0.2, 2: 0.8}  # of the errors' norm over the states' norm
CACHES = ("ours", "hqq", "quanto", "exact")


def make(name: str, config: Any, nbits: int, axes: tuple[int, int], window: int, solver: str) -> Any:
    """The cache ``name``; NotHere where its library is not installed or has no such width."""
    settings: dict[str, Any] = {"nbits": nbits, "q_group_size": GROUP, "residual_length": window}
    if name == "ours":
        return HqqQuantizedCache(config, axis_key=axes[0], axis_value=axes[1], solver=solver, **settings)
    if name == "exact":
        return transformers.DynamicCache(config=config)
    if name == "quanto":
        axes = (axes[0] - 1, axes[1] - 1)  # its -1 groups over tokens, its 0 over channels
    try:
        return transformers.QuantizedCache(name, config, axis_key=axes[0], axis_value=axes[1], **settings)
    except (ImportError, ValueError) as why:
        raise NotHere(str(why)) from None


def states(shape: tuple[int, ...], tokens: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Keys with channels of very different size, as real models have them, and values."""
    generator = torch.manual_seed(seed)
    size = (*shape[:2], tokens, shape[-1])
    spread = torch.logspace(-1, 1, shape[-1])
    return tuple((torch.randn(size, generator=generator) * s).to(dtype) for s in (spread, 1.0))  # type: ignore[return-value]


def check(name: str, nbits: int, got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], packed: int) -> list[float]:
    """Errors of the first ``packed`` keys and values, which no cache has in its window; WrongAnswer where they are not
    those of the width."""
    errors = []
    for out, exact in zip(got, want, strict=True):
        out, exact = out[..., :packed, :].float(), exact[..., :packed, :].float()
        errors.append(float((out - exact).norm() / exact.norm()))
    bound = 0.0 if name == "exact" else BOUNDS[nbits]
    if not all(error <= bound for error in errors):
        raise WrongAnswer(f"{name}, {nbits} bits: errors {errors}, allowed {bound}")
    return errors


def measure(setting: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each cache that can take part."""
    nbits, axes, D, prompt, window = (setting[n] for n in ("bits", "axes", "head_dim", "prompt", "window"))
    dtype, shape = DTYPES[setting["dtype"]], (args.batch, args.heads, prompt, D)
    config = transformers.LlamaConfig(
        hidden_size=args.heads * D, num_attention_heads=args.heads, num_key_value_heads=args.heads, head_dim=D,
        num_hidden_layers=args.layers,
    )  # fmt: skip
    layers, rows, caches = range(args.layers), list[dict[str, Any]](), dict[str, Any]()
    old = states(shape, prompt, dtype, 0)
    for name in args.caches:
        try:
            cache = make(name, config, nbits, axes, window, args.solver)
        except NotHere as why:
            print(f"left out: {name} at {nbits} bits ({why})")
            continue
        started = time.perf_counter()
        for layer in layers:
            cache.update(*old, layer)
        rows.append({**setting, "cache": name, "prompt ms": (time.perf_counter() - started) / args.layers * 1e3})
        new = states(shape, 1, dtype, 1)
        out = [cache.update(*new, layer) for layer in layers]
        errors = check(name, nbits, out[0], old, (prompt - window) // GROUP * GROUP)
        rows[-1] |= {"key error": errors[0], "value error": errors[1]}
        caches[name] = cache
        del out
    times: dict[str, list[float]] = {name: [] for name in caches}
    for token in range(max(window, GROUP)):
        new = states(shape, 1, dtype, token + 2)
        for name, cache in caches.items():
            # As in a model, what one layer returned is gone before the next layer asks.
            started = time.perf_counter()
            for layer in layers:
                cache.update(*new, layer)
            times[name].append((time.perf_counter() - started) / args.layers * 1e3)
    for row in rows:
        row["token ms"] = statistics.median(times[row["cache"]])
        row["mean ms"] = statistics.mean(times[row["cache"]])
    return rows


def verdict(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours must be faster and no less exact than each backend, in each setting."""
    lines: list[dict[str, Any]] = []
    worst: dict[tuple[str, int, str], float] = {}
    for peer in (row for row in rows if row["cache"] in ("hqq", "quanto")):
        ours = next(r for r in rows if r["cache"] == "ours" and all(r[k] == peer[k] for k in SETTINGS))
        for what in ("token ms", "mean ms", "key error", "value error"):
            key, ratio = (peer["cache"], peer["bits"], what), ours[what] / peer[what]
            worst[key] = max(worst.get(key, 0.0), ratio)
    for (name, nbits, what), ratio in worst.items():
        lines.append(aims.aim(f"{nbits} bits, {what}: less than {name}'s", f"at most {ratio:.2f} x", ratio < 1))
    return lines


SETTINGS = ("bits", "axes", "head_dim", "prompt", "window", "dtype")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 2], choices=list(BOUNDS))
    parser.add_argument(
        "--axes", nargs="+", default=["01"], choices=["00", "01", "10", "11"], help="of keys and values"
    )
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--prompts", nargs="+", type=int, default=[512, 2048], help="tokens")
    parser.add_argument("--windows", nargs="+", type=int, default=[128], help="most recent tokens, kept exact")
    parser.add_argument("--dtypes", nargs="+", default=["fp32"], choices=list(DTYPES))
    parser.add_argument("--caches", nargs="+", default=list(CACHES), choices=CACHES)
    parser.add_argument("--solver", default="hqq_joint", choices=["hqq_joint", "hqq", "rtn"], help="of ours")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8, help="of keys and values")
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args(argv)
    print(machine())
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        # Untimed: what is loaded, and threads started, on first use.
        measure(dict(zip(SETTINGS, (4, (0, 1), 64, 256, GROUP, "fp32"), strict=True)), args)
        for dtype in args.dtypes:
            for axes in args.axes:
                for D in args.head_dims:
                    for prompt in args.prompts:
                        for window in args.windows:
                            for nbits in args.bits:
                                cell = (nbits, (int(axes[0]), int(axes[1])), D, prompt, window, dtype)
                                rows += measure(dict(zip(SETTINGS, cell, strict=True)), args)
    shown = [
        (
            row["cache"],
            *(str(row[k]) for k in SETTINGS),
            *(f"{row[k]:.4f}" for k in ("key error", "value error")),
            *(f"{row[k]:.2f}" for k in ("prompt ms", "token ms", "mean ms")),
        )
        for row in rows
    ]
    print(text_table(("cache", *SETTINGS, "key error", "value error", "prompt ms", "token ms", "mean ms"), shown))
    lines = verdict(rows)
    aims.show(lines)
    results = {"rows": rows, "verdict": lines}
    write_json(args.json, results)
    return results


if __name__ == "__main__":
    main()
