"""Tables of docs/quality.md and README.md: errors of quantized models by method and bits."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from benchmarks.docs.figures import answers, quality
from benchmarks.docs.markdown import table

MODELS = {"doclm": "KL", "MiniLM": "1 - cosine"}
Found = dict[str, Any]
NEEDS = {"none": "nothing", "model": "its own text", "text": "text"}
"""What methods look at besides the weights of SmolLM2."""

GROUPS_20 = "hqqtensor {}-bit g20 4-bit meta"
DEFAULT = "hqqtensor {}-bit default"
TEXT = "hqqtensor {}-bit g32 4-bit meta, full calibration"
OWN = "hqqtensor {}-bit g32 4-bit meta, own text"
RANDOM = "hqqtensor {}-bit g32 4-bit meta, random tokens"


def of(model: str, method: str) -> Found:
    """The row of a method on a model; KeyError where there is none."""
    for one in quality()["rows"]:
        if one["task"] == model and one["method"] == method:
            return one
    raise KeyError(f"no row {method!r} of {model!r} in docs/data/quality.json")


def ratio(model: str, method: str) -> str:
    """Error over the hqq library's at the same nominal bits."""
    return f"{of(model, method)['to hqq'][0]:.2f}"


def settings() -> str:
    """Settings by bits, without text and with it, by error over the hqq library's at the same nominal bits."""
    out = []

    def add(bits: str, code: str, needs: str, method: str, models: Collection[str] = MODELS) -> None:
        size = f"{of('doclm', method)['bits']:.2f}"
        ratios = [ratio(model, method) if model in models else "" for model in MODELS]
        out.append([bits, f"`{code}`", needs, size, *ratios])

    for bits in (4, 3, 2):
        add(str(bits), f"HqqConfig({bits}, 64)", "nothing", f"hqqtensor {bits}-bit g64")
        if bits > 2:
            add(str(bits), f"HqqConfig({bits}, 20, **META)", "nothing", GROUPS_20.format(bits))
        else:
            add(str(bits), "HqqConfig(2, 10, **LEARNED)", "nothing", "hqqtensor 2-bit g10 learned, 4-bit scales")
        add(str(bits), f"HqqConfig({bits})", "nothing", DEFAULT.format(bits))
        add(str(bits), f"HqqConfig({bits}, 32, **META)", "calibrated on random tokens", RANDOM.format(bits))
        own, method = "calibrated on its own text", f"{DEFAULT.format(bits)}, own text"
        add(str(bits), f"HqqConfig({bits}, 32, **META)", own, OWN.format(bits), ["doclm"])
        add(str(bits), f"HqqConfig({bits})", own, method, ["doclm"])
        add(str(bits), f"HqqConfig({bits}, 32, **META)", "calibrated on text", TEXT.format(bits))
    for bpw in ("4.5", "3.5", "3.0", "2.5"):
        add("mixed", f"target_bpw={bpw}", "searched on random tokens", f"hqqtensor searched {bpw}")
    header = ["bits", "setting", "needs", "bits a weight", "error over hqq's, doclm", "MiniLM"]
    return table(header, out)


def by_kind(kinds: dict[str, str], cell: Callable[[str], str]) -> list[list[str]]:
    """A row of cells for 4, 3 and 2 bits for each kind of method: its label, and the method's name with {} for bits."""
    return [[label, *(cell(method.format(bits)) for bits in (4, 3, 2))] for label, method in kinds.items()]


def at_equal_bits() -> str:
    """The best of each kind near 4.5, 3.5 and 2.5 bits a weight."""
    kinds = {
        "hqq library": "hqq {}-bit g64",
        "round to nearest": "rtn {}-bit g64",
        "SINQ, groups of 64 (paper)": "SINQ {}-bit g64 (paper)",
        "llama.cpp": "llama.cpp Q{}_K",
        "GPTQ, on text (paper)": "GPTQ {}-bit g64 (paper)",
        "AWQ, on text (paper)": "AWQ {}-bit g64 (paper)",
        "**hqqtensor, `HqqConfig(bits, 64)`**": "hqqtensor {}-bit g64",
        "**hqqtensor, groups of 20, 4-bit metadata**": GROUPS_20,
        "**hqqtensor, the default: groups of 20, column scales**": DEFAULT,
        "**hqqtensor, groups of 32, calibrated on text**": TEXT,
    }

    def error(model: str, method: str) -> str:
        one = of(model, method)
        return f"{one['main'][0]:.4f} ({one['bits']:.2f})"

    out = []
    for model, unit in MODELS.items():
        out += [[f"{model}, {unit}", *row] for row in by_kind(kinds, partial(error, model))]
    return table(["model", "method", "4 bits", "3 bits", "2 bits"], out)


def readme() -> str:
    """Errors over the hqq library's, best kinds only."""
    kinds = {
        "hqq library, groups of 64": "hqq {}-bit g64",
        "llama.cpp": "llama.cpp Q{}_K",
        "GPTQ, calibrated on text (paper)": "GPTQ {}-bit g64 (paper)",
        "**hqqtensor, `hqq_weight_only(bits, 64)`**": "hqqtensor {}-bit g64",
        "**hqqtensor, `hqq_weight_only(bits)`: the default**": DEFAULT,
        "**hqqtensor, groups of 32, calibrated on text**": TEXT,
    }

    def ratios(method: str) -> str:
        return f"{' / '.join(ratio(model, method) for model in MODELS)} at {of('doclm', method)['bits']:.2f}"

    header = ["error over the hqq library's, doclm / MiniLM, at bits a weight", "4 bits", "3 bits", "2 bits"]
    return table(header, by_kind(kinds, ratios))


def chat_model() -> str:
    """SmolLM2, most bits first; 4 bits marked, since its weights are those of a file of 4 bits."""
    out = []
    for one in quality()["rows"]:
        if one["task"] == "SmolLM2":
            name = f"**{one['method']}**" if one["ours"] else one["method"]
            over = "" if one["to hqq"] is None else f"{one['to hqq'][0]:.2f}"
            kl, same = f"{one['main'][0]:.3f}", f"{one['top1']:.0%}"
            mark = " (flattered)" if one["nbits"] == 4 else ""
            out.append(
                [name + mark, NEEDS[one["data"]], f"{one['bits']:.2f}", kl, over, f"{one['perplexity']:.1f}", same]
            )
    header = ["method", "needs", "bits a weight", "KL", "over hqq's", "perplexity", "same next token"]
    return table(header, out)


def chat_model_short() -> str:
    """SmolLM2 at about 3.5 and 2.5 bits: ours and the best peers."""
    kinds = {
        "hqq library": "hqq 3-bit g64",
        "llama.cpp Q3_K": "llama.cpp Q3_K",
        "llama.cpp IQ3_S, importance matrix": "llama.cpp IQ3_S, imatrix",
        "**hqqtensor, `hqq_weight_only(3)`**": DEFAULT.format(3),
        '**hqqtensor, `hqq_weight_only(3)`, `quality="good"`**': f"{DEFAULT.format(3)}, own text",
        "llama.cpp Q2_K, importance matrix": "llama.cpp Q2_K, imatrix",
        '**hqqtensor, 2 bits in groups of 16, `quality="good"`**': "hqqtensor 2-bit g16 4-bit meta, own text",
    }
    rows = []
    for label, method in kinds.items():
        one = of("SmolLM2", method)
        figures = (f"{one['bits']:.2f}", f"{one['main'][0]:.2f}", f"{one['perplexity']:.1f}", f"{one['top1']:.0%}")
        rows.append([label, NEEDS[one["data"]], *figures])
    return table(["SmolLM2-135M-Instruct", "needs", "bits a weight", "KL", "perplexity", "same next token"], rows)


def agreement() -> str:
    """A chat model's greedy answers beside the dense model's."""
    kinds = ("forced", "first", "until", "place by place", "same")
    rows = [
        [name, f"{c['MB']:.0f} MB", *(f"{c[kind]:.0%}" if kind in c else "" for kind in kinds)]
        for name, c in answers()["columns"].items()
    ]
    header = [
        "model",
        "size",
        "same next token, given the dense answer",
        "first token",
        "tokens before the first other one",
    ]
    return table([*header, "tokens at the same place", "whole answers"], rows)


def side_by_side() -> str:
    """A chat model's answers, a list for each question."""
    found, out = answers(), []
    for i, question in enumerate(found["questions"]):
        out.append(f"**{question}**\n")
        for name, column in found["columns"].items():
            text = column["answers"][i].replace("`", "'").replace("|", "\\|").replace("<", "&lt;")
            out.append(f"- *{name}*: {text}")
        out.append("")
    return "\n".join(out).strip()


def every_method(model: str) -> str:
    """All that was measured on one model."""
    out = []
    for one in quality()["rows"]:
        if one["task"] != model:
            continue
        name = f"**{one['method']}**" if one["ours"] else one["method"]
        errors = [f"{one[f'{kind} error']:.5f}" for kind in ("weight", "output")]
        main = "{:.5f} ({:.5f}-{:.5f})".format(*one["main"])
        over = "" if one["to hqq"] is None else "{:.2f} ({:.2f}-{:.2f})".format(*one["to hqq"])
        if model == "doclm":
            last = [f"{one['perplexity']:.2f}", f"{one['rise']:+.2%}", f"{one['top1']:.1%}", f"{one['top5']:.1%}"]
        else:
            last = [f"{one['nearest']:.1%}", f"{one['nearest five']:.1%}"]
        star = " *" if one["best"] else ""
        out.append([name + star, one["data"], f"{one['bits']:.3f}", *errors, main, over, *last])
    extra = {"doclm": ["perplexity", "rise", "top-1", "top-5"], "MiniLM": ["nearest the same", "of the nearest five"]}
    header = [
        "method",
        "data",
        "bits/weight",
        "weight error",
        "output error",
        f"{MODELS[model]} (95 %)",
        "to hqq (95 %)",
    ]
    return table([*header, *extra[model]], out)
