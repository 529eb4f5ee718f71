"""Tables of docs/performance.md, README.md and docs/dev/measurements.md."""

from collections.abc import Callable, Sequence

from benchmarks.docs.figures import Row, Run, fastest_peer, ratios, row, runs
from benchmarks.docs.markdown import ms, table, times

BF16, FP32, INT8 = "4-bit bf16", "4-bit fp32", "4-bit int8 bf16"
MAIN = {
    BF16: "**hqqtensor, bf16 activations**",
    FP32: "**hqqtensor, fp32 activations**",
    INT8: '**hqqtensor, `activation="int8"`**',
    "llama.cpp Q4_K": "llama.cpp Q4_K (int8 activations)",
    "ATen int4pack": "ATen int4pack (bf16)",
    "ONNX Runtime 4-bit fp32": "ONNX Runtime, 4 bits, fp32",
    "ONNX Runtime 4-bit int8": "ONNX Runtime, 4 bits, int8",
    "auto-round-lib 4-bit fp32": "Intel auto-round-lib, 4 bits, fp32",
    "auto-round-lib 4-bit int8": "Intel auto-round-lib, 4 bits, int8",
    "bitsandbytes NF4 bf16": "bitsandbytes NF4 (bf16)",
    "vLLM W4A16": "vLLM W4A16 (bf16)",
    "vLLM W4A8": "vLLM W4A8 (int8 activations)",
    "vLLM W8A8": "vLLM W8A8 (8-bit weights, int8 activations)",
    "quanto qint4": "quanto qint4 (fp32)",
    "hqq": "hqq library (fp32)",
    "dense bf16": "dense bf16",
    "dense fp32": "dense fp32",
}
SETTINGS = {
    "8 bits": "8-bit bf16",
    "3 bits": "3-bit bf16",
    "2 bits": "2-bit bf16",
    "1 bit": "1-bit bf16",
    "FP4": "fp4 bf16",
    "NF4": "nf4 bf16",
    "groups of 128": "4-bit g128 bf16",
    "groups of 32": "4-bit g32 bf16",
    "8-bit scales and zero points": "4-bit 8-bit scales bf16",
    "`axis=0`": "4-bit axis 0 bf16",
    "fp32 activations": FP32,
    '`activation="int8"`': INT8,
}


def _tokens(tokens: Sequence[int]) -> list[str]:
    return [f"{n} token" if n == 1 else str(n) for n in tokens]


def _has(run: Run, name: str) -> bool:
    return any(one["name"] == name for one in run["rows"])


def layer(id: str, tokens: Sequence[int] | None = None, names: Sequence[str] = tuple(MAIN)) -> str:
    """Milliseconds of one layer: ours at 4 bits, the other libraries, dense."""
    run = runs("linear")[id]
    columns = [i for i, n in enumerate(run["tokens"]) if tokens is None or n in tokens]
    rows = [[MAIN[name], *(ms(row(run, name)["ms"][i]) for i in columns)] for name in names if _has(run, name)]
    return table(["ms", *_tokens([run["tokens"][i] for i in columns])], rows)


def every_row(id: str) -> str:
    """Milliseconds of all that was measured in a run."""
    run = runs("linear")[id]
    return table(["ms", *_tokens(run["tokens"])], [[one["name"], *map(ms, one["ms"])] for one in run["rows"]])


TOKENS = (1, 4, 16, 64, 128, 512)


def _against(run: Run, mine: str, rival: Callable[[int], Row | None]) -> list[str]:
    """The rival's time over ours for each of TOKENS; ``rival(column)`` names it."""
    out = []
    for n in TOKENS:
        i = run["tokens"].index(n) if n in run["tokens"] else None
        other = None if i is None else rival(i)
        time = None if i is None else row(run, mine)["ms"][i]
        out.append("" if other is None or time is None or other["ms"][i] is None else times(other["ms"][i] / time))
    return out


def against_peers() -> str:
    """How many times faster than the fastest other library, and than dense bf16."""
    names = {"zen4": "AMD", "intel": "Intel", "zen3": "AMD, AVX2"}
    rows = []
    for id, machine in names.items():
        run = runs("linear")[id]
        library = "the fastest library"
        lines: list[tuple[str, str, Callable[[int], Row | None]]] = [
            (BF16, library, lambda i, run=run: fastest_peer(run, i)),
            (BF16, f"{library}, exact activations", lambda i, run=run: fastest_peer(run, i, exact=True)),
            (INT8, library, lambda i, run=run: fastest_peer(run, i)),
        ]
        if _has(run, "dense bf16"):
            lines += [(mine, "dense bf16", lambda i, run=run: row(run, "dense bf16")) for mine in (BF16, INT8)]
        for mine, other, rival in lines:
            rows.append([machine, "int8" if mine == INT8 else "bf16", other, *_against(run, mine, rival)])
    return table(["machine", "our activations", "against", *_tokens(TOKENS)], rows)


def settings() -> str:
    """Time of other settings over 4 bits, groups of 64, bf16 activations."""
    chosen, rows = {"AMD": runs("linear")["zen4"], "Intel": runs("linear")["intel"]}, []
    tokens = (1, 16, 128)
    for label, name in SETTINGS.items():
        cells = []
        for run in chosen.values():
            have = ratios(run, name, BF16) if _has(run, name) else [None] * len(run["tokens"])
            cells += [times(have[run["tokens"].index(n)]) for n in tokens]
        rows.append([label, *cells])
    header = [f"{machine}, {text}" for machine in chosen for text in ("1 token", "16", "128")]
    return table(["in place of 4 bits, groups of 64, bf16", *header], rows)


def small_groups() -> str:
    """Time of groups with 4-bit metadata over plain groups of 64 at 4 bits."""
    run = runs("settings")["intel"]
    rows = []
    for one in run["rows"]:
        bits = one["bits"] + (9 if one["meta"] else 32) / one["group_size"]
        kind = "float16" if one["meta"] is None else "4 bits"
        rows.append(
            [str(one["bits"]), str(one["group_size"]), kind, f"{bits:.2f}", *map(times, one["times of 4-bit g64"])]
        )
    return table(["bits", "group size", "scales and zero points", "bits a weight", "1 token", "16", "128"], rows)


MODELS = {"SmolLM2": "SmolLM2-135M-Instruct", "1B": "1B shapes"}
RUNNERS = {
    "hqqtensor": "**hqqtensor**",
    "hqqtensor, 8-bit cache": "**hqqtensor, 8-bit [cache](kv_cache.md)**",
    "hqqtensor, 4-bit cache": "**hqqtensor, 4-bit [cache](kv_cache.md)**",
    "hqqtensor, not prepared": "hqqtensor, without `prepare_for_generation_`",
    "llama.cpp": "llama.cpp",
    "llama.cpp, q8_0 cache": "llama.cpp, q8_0 cache",
    "dense bf16": "dense bf16",
}


def generate(id: str) -> str:
    """What model.generate() reaches, against llama.cpp."""
    run, rows = runs("generate")[id], []
    for one in run["rows"]:
        over = over_llama(run, one)
        about = [MODELS[one["model"]], f"{one['context']:,}", str(one["batch"]), RUNNERS[one["name"]]]
        speed, first = f"{one['tokens/s']:.1f}", f"{one['first token, s']:.2f} s"
        rows.append([*about, speed, times(over[0]), first, times(over[1])])
    header = ["model", "prompt", "batch", "", "tokens a second", "over llama.cpp", "first token", "over llama.cpp"]
    return table(header, rows)


def over_llama(run: Run, one: Row) -> tuple[float, float]:
    """Tokens a second over llama.cpp's best in the same comparison, and its earliest first token over this one."""
    same = ("model", "context", "batch")
    peers = [r for r in run["rows"] if r["kind"] == "peer" and all(r[k] == one[k] for k in same)]
    best, earliest = max(r["tokens/s"] for r in peers), min(r["first token, s"] for r in peers)
    return one["tokens/s"] / best, earliest / one["first token, s"]


def quantize() -> str:
    """Million weights a second by solver."""
    rows = runs("quantize")["zen4"]["rows"]
    speed = {(r["solver"], r["format"], r["bits"], r["dtype"]): r["M weights/s"] for r in rows}
    out = []
    for solver in ("rtn", "hqq", "hqq_joint"):
        four = " / ".join(f"{speed[solver, 'int', 4, dtype]:g}" for dtype in ("fp32", "bf16", "fp16"))
        other = " / ".join(f"{speed[solver, 'int', bits, 'fp32']:g}" for bits in (8, 3, 2))
        plain = f"{speed[f'plain {solver}', 'int', 4, 'fp32']:.2g}"
        plain = f"{speed[f'plain {solver}', 'int', 4, 'fp32']:.0f}" if len(plain) > 3 else plain
        library = f"{speed['hqq library', 'int', 4, 'fp32']:.1f}" if solver == "hqq" else ""
        out.append([f"`{solver}`", four, other, plain, library])
    for name, bits in (("fp4", 4), ("nf4", 4), ("fp6", 6), ("fp8", 8), ("codebook", 4)):
        mine, plain = (speed[solver, name, bits, "fp32"] for solver in ("hqq_joint", "plain hqq_joint"))
        out.append([f"`hqq_joint`, {name}", f"{mine:.0f} (fp32, {bits} bits)", "", f"{plain:.1f}", ""])
    header = ["solver", "4 bits: fp32 / bf16 / fp16 weights", "8 / 3 / 2 bits, fp32", "torch code", "hqq library"]
    return table(header, out)
