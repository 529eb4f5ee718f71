"""The two tables of docs/performance.md that sum it up: what is gained, and what falls short."""

from collections.abc import Iterator

from benchmarks.docs.figures import Row, Run, fastest_peer, ratios, row, runs
from benchmarks.docs.markdown import span, table
from benchmarks.docs.speed import BF16, FP32, INT8, over_llama

LAYERS = ("zen4", "zen3", "intel")
MACHINES = ("zen3", "intel")
"""Runs of layers and of models, by id, in the order of the columns."""


def _gains(machine: list[Run], mine: str, tokens: range) -> str:
    """The range of the fastest other library's time over ours, over runs and the numbers of tokens in ``tokens``."""
    out = []
    for run in machine:
        for i, n in enumerate(run["tokens"]):
            peer, time = fastest_peer(run, i), row(run, mine)["ms"][i]
            if n in tokens and peer is not None and time is not None:
                out.append(peer["ms"][i] / time)
    return span(out)


def _generate(model: str, first_token: bool = False) -> list[str]:
    """Our tokens a second over llama.cpp's (or its seconds to the first token over ours), one sequence, by machine."""
    each = [runs("generate")[id] for id in MACHINES]
    return [span([over_llama(run, one)[first_token] for one in _ours(run, model)]) for run in each]


def _ours(run: Run, model: str) -> list[Row]:
    return [one for one in run["rows"] if (one["model"], one["name"], one["batch"]) == (model, "hqqtensor", 1)]


def summary() -> str:
    """How many times faster than the best of the others."""
    linear = runs("linear")
    layers = [[linear[id]] for id in LAYERS]
    one, more = range(1, 2), range(4, 513)
    solvers = {r["solver"]: r["M weights/s"] for r in reversed(runs("quantize")["zen4"]["rows"]) if r["bits"] == 4}
    fastest, over_hqq = "the fastest of the others", f"{solvers['hqq_joint'] / solvers['hqq library']:.0f} x"
    rows = [
        ["one layer, 1 token, bf16 activations", fastest, *(_gains(machine, BF16, one) for machine in layers)],
        ["one layer, 4 to 512 tokens, bf16 activations", fastest, *(_gains(machine, BF16, more) for machine in layers)],
        ['the same, `activation="int8"`', fastest, *(_gains(machine, INT8, more) for machine in layers)],
        ["`generate()`, SmolLM2-135M-Instruct", "llama.cpp, the same file", "", *_generate("SmolLM2")],
        ["its first token", "llama.cpp, the same file", "", *_generate("SmolLM2", True)],
        ["`generate()`, 1B shapes, 4 bits", "llama.cpp Q4_0", "", *_generate("1B")],
        ["its first token", "llama.cpp Q4_0", "", *_generate("1B", True)],
        ["quantizing, `hqq_joint`", "the hqq library", over_hqq, "", ""],
    ]
    return table(["4-bit weights, speed of hqqtensor", "over", "AMD Zen 4", "AMD Zen 3 (AVX2)", "Intel Xeon"], rows)


def _at(id: str, over: str, under: str, *tokens: int) -> str:
    """Times of ``over`` divided by those of ``under``, such as "1.07 and 1.65 x"."""
    run = runs("linear")[id]
    found = []
    for n in tokens:
        value = ratios(run, over, under)[run["tokens"].index(n)]
        if value is None:
            raise ValueError(f"{over!r} or {under!r} was not measured at {n} tokens in run {id!r}")
        found.append(f"{value:.2f}")
    return " and ".join(found) + " x"


def _bandwidth(id: str) -> str:
    shares = [one for one in runs("linear")[id]["bandwidth"] if one["name"] == BF16]
    return ", ".join(f"{100 * one['share']:.0f} % of {one['read_gb_s']} GB/s" for one in shares)


def _shortfalls() -> Iterator[list[str]]:
    small = {(r["bits"], r["group_size"]): r["times of 4-bit g64"] for r in runs("settings")["intel"]["rows"]}
    twenty, thirty_two = (" and ".join(f"{one:.2f}" for one in small[4, size][:2]) + " x" for size in (20, 32))
    yield [
        "1 token: share of the memory's read bandwidth, bf16 activations",
        _bandwidth("zen4"),
        _bandwidth("intel"),
        "",
    ]
    yield [
        "128 and 512 tokens, bf16 activations: our time over dense bf16's",
        _at("zen4", BF16, "dense bf16", 128, 512),
        _at("intel", BF16, "dense bf16", 128, 512),
        '`activation="int8"`',
    ]
    yield [
        "16 and 512 tokens, int8 activations: our time over vLLM's W8A8 (8-bit weights, a scale for each row)",
        "",
        _at("intel", INT8, "vLLM W8A8", 16, 512),
        "8-bit weights where they fit",
    ]
    yield [
        "512 tokens, int8 activations: our time over dense bf16's",
        _at("zen4", INT8, "dense bf16", 512),
        _at("intel", INT8, "dense bf16", 512),
        "dense weights where most work is long prompts",
    ]
    yield [
        "1 token: 3 bits over 4 bits",
        _at("zen4", "3-bit bf16", BF16, 1),
        f"{small[3, 64][0]:.2f} to {_at('intel', '3-bit bf16', BF16, 1)}",
        "take 3 bits to save memory, not time",
    ]
    yield [
        "1 token: NF4 over integers, bf16 activations",
        _at("zen4", "nf4 bf16", BF16, 1),
        _at("intel", "nf4 bf16", BF16, 1),
        '`format="int"`',
    ]
    yield [
        "the same, fp32 activations",
        _at("zen4", "nf4 fp32", FP32, 1),
        _at("intel", "nf4 fp32", FP32, 1),
        "bf16 activations",
    ]
    yield [
        "1 and 128 tokens: `axis=0` over `axis=1`",
        _at("zen4", "4-bit axis 0 bf16", BF16, 1, 128),
        _at("intel", "4-bit axis 0 bf16", BF16, 1, 128),
        "`axis=1`",
    ]
    yield [
        "128 and 512 tokens, fp32 activations: `axis=0` over dense fp32",
        _at("zen4", "4-bit axis 0 fp32", "dense fp32", 128),
        _at("intel", "4-bit axis 0 fp32", "dense fp32", 128, 512),
        "`axis=1` or bf16 activations",
    ]
    yield [
        "128 and 512 tokens, fp32 activations: groups of 20 over dense fp32",
        "",
        _at("intel", "4-bit g20 4-bit scales fp32", "dense fp32", 128, 512),
        "groups of 32 or bf16 activations",
    ]
    yield [
        "1 and 16 tokens: groups of 20 with 4-bit metadata over plain groups of 64",
        "",
        twenty,
        f"groups of 32: {thirty_two}",
    ]
    yield [
        "AMD Zen 3 (AVX2), 64 and 512 tokens, bf16 activations: our time over that of auto-round-lib (fp32)",
        _at("zen3", BF16, "auto-round-lib 4-bit fp32", 64, 512),
        "",
        '`activation="int8"`',
    ]


def shortfalls() -> str:
    """What is slower than a user may expect, and what to do instead."""
    return table(["what", "AMD Zen 4", "Intel Xeon", "use instead"], list(_shortfalls()))
