"""``hqqtensor recommend``: settings for a memory budget, from config, headers and ten seconds of measuring kernels."""

import argparse
import json
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hqqtensor import HqqConfig
from hqqtensor.cli import dry_run, model_dir, quantize
from hqqtensor.cli.arguments import make_parser
from hqqtensor.cli.errors import CommandError, UsageError, from_arguments, from_files
from hqqtensor.cli.output import print_json, print_table
from hqqtensor.diagnostics.byte_parts import parts_when_quantized
from hqqtensor.diagnostics.kernel_speed import seconds_of_product
from hqqtensor.diagnostics.measured_quality import CLASSES, MEASURED, Measured, quality_class
from hqqtensor.diagnostics.table import megabytes
from hqqtensor.presets import BYTE_UNITS, parse_size
from hqqtensor.selection import check_shapes, choose

CANDIDATES = {
    "8": ["--bits", "8"],
    "6": ["--bits", "6"],
    "4": ["--bits", "4"],
    "3 good": ["--bits", "3", "--quality", "good"],
    "3": ["--bits", "3"],
    "2 good": ["--bits", "2", "--group-size", "16", "--quant-metadata", "4", "--quality", "good"],
}
"""Options of ``hqqtensor quantize``, the best quality first, by their names in ``MEASURED``."""

GENERATE_SECONDS = 0.003
"""What ``generate()`` itself, norms and attention take for a token, by docs/generation.md."""

CONTEXT = 4096
FAIR = CLASSES[2][1]


@dataclass(frozen=True)
class Product:
    """A product of one token. settings: of the weight, as JSON of ``HqqConfig.to_dict``; None where it is dense."""

    out_features: int
    in_features: int
    settings: str | None


@dataclass(frozen=True)
class Setting:
    """A setting and what it gives. name: of CANDIDATES, or "dense". options: of ``hqqtensor quantize``.

    weight_bytes: of all parameters. measured: what it lost on another model; None where that was not measured.
    tokens_per_second: estimated; None where nothing was measured. fits: whether weights and cache are within the
    budget.
    """

    name: str
    options: list[str]
    weight_bytes: int
    measured: Measured | None
    tokens_per_second: float | None
    fits: bool

    @property
    def quality(self) -> str:
        """The class of its quality in words."""
        if self.name == "dense":
            return "the original"
        return "good or better" if self.measured is None else quality_class(self.measured.agreement)

    @property
    def is_fair(self) -> bool:
        """Whether its quality is fair or better."""
        return self.measured is None or self.measured.agreement >= FAIR


def run(args: argparse.Namespace) -> int:
    """Work out the settings, choose one, report."""
    with from_arguments():
        budget = free_memory() if args.memory is None else parse_size(args.memory, "--memory", BYTE_UNITS)
        if not 0 <= args.seconds < float("inf"):
            raise ValueError(f"--seconds must be 0 or more, got {args.seconds}")
    model_dir.read_dense_config(args.dir)
    empty: Any = model_dir.empty_model_of(args.dir)
    with from_files():
        dry_run.with_stored_dtype(empty, args.dir)
    context = context_of(empty, args.context)
    cache = cache_bytes(empty, context)
    out = args.dir.resolve().name
    settings = candidates(empty, args, budget - cache)
    best = choose_one(settings, args.speed)
    if best is None:
        least = min(settings, key=lambda setting: setting.weight_bytes)
        raise UsageError(
            f"nothing fits {megabytes(budget)}: the smallest setting takes {megabytes(least.weight_bytes)} for weights "
            f"and {megabytes(cache)} for a cache of {context} tokens"
        )
    command = command_of(best, args, out)
    if args.json:
        print_json(
            {
                "memory_bytes": int(budget),
                "context": context,
                "cache_bytes": cache,
                "settings": [as_dict(setting, args, out) for setting in settings],
                "recommended": best.name,
                "command": command,
            }
        )
        return 0
    show(settings, best, budget, cache, context)
    print(f"recommended: {label(best)}\n  {command}")
    return 0


def free_memory() -> float:
    """Bytes of memory that are free for a new process; CommandError where psutil is missing."""
    try:
        import psutil
    except ImportError as error:
        raise CommandError(
            f"without --memory this command needs psutil (pip install 'hqqtensor[cli]'): {error}"
        ) from error
    return float(psutil.virtual_memory().available)


def context_of(empty: Any, given: int | None) -> int:
    """Tokens that the cache is to hold: ``--context``, else CONTEXT or the positions that the model has."""
    longest = getattr(empty.config, "max_position_embeddings", None)
    if given is not None:
        return given
    return min(CONTEXT, longest) if isinstance(longest, int) else CONTEXT


def cache_bytes(empty: Any, context: int) -> int:
    """Bytes of the keys and values of ``context`` tokens in the model's dtype; 0 for a model that writes no text."""
    if not empty.can_generate():
        return 0
    config = empty.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * context * next(empty.parameters()).dtype.itemsize


def candidates(empty: Any, args: argparse.Namespace, budget: float) -> list[Setting]:
    """Every setting with its size and speed, dense first. budget: bytes for weights."""
    configs: dict[str, HqqConfig | None] = {"dense": None}
    for name, options in CANDIDATES.items():
        config = quantize.make_config(make_parser().parse_args(["quantize", str(args.dir), "out", *options]))
        with from_arguments():
            check_shapes(choose(empty, config)[0])
        configs[name] = config
    products = {name: products_of(empty, config) for name, config in configs.items()}
    speeds = measure(products, next(empty.parameters()).dtype, args)
    out = []
    for name, settings in configs.items():
        if settings is None:
            size = sum(parameter.nbytes for parameter in empty.parameters())
        else:
            size = sum(part.nbytes for part in parts_when_quantized(empty, settings))
        options = CANDIDATES.get(name, [])
        out.append(Setting(name, options, size, MEASURED.get(name), speeds.get(name), size <= budget))
    return out


def products_of(empty: Any, config: HqqConfig | None) -> Counter[Product]:
    """The products that one new token takes, and how often: of all layers, and of the experts that it uses."""
    choices = {} if config is None else {id(choice.weight): choice for choice in choose(empty, config)[0]}
    experts_used = getattr(empty.config.get_text_config(), "num_experts_per_tok", 1)
    products: Counter[Product] = Counter()
    for module in empty.modules():
        if isinstance(module, torch.nn.Embedding):  # reads one row
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim not in (2, 3):
                continue
            choice = choices.get(id(parameter))
            shape = list(parameter.shape) if choice is None else choice.matrix_shape()
            settings = None if choice is None else json.dumps(choice.settings.to_dict())
            products[Product(shape[-2], shape[-1], settings)] += experts_used if len(shape) == 3 else 1
    return products


def measure(products: dict[str, Counter[Product]], dtype: torch.dtype, args: argparse.Namespace) -> dict[str, float]:
    """Tokens a second by setting; empty where nothing is to be measured."""
    different = list({product for of_setting in products.values() for product in of_setting})
    if args.seconds == 0 or not different:
        return {}
    if not args.json:
        print(f"measuring kernels for about {args.seconds:.0f} s ...", file=sys.stderr)
    each = 0.5 * args.seconds / len(different)  # about as long takes the making of weights
    times = {}
    for product in different:
        config = None if product.settings is None else HqqConfig.from_dict(json.loads(product.settings))
        times[product] = seconds_of_product(product.out_features, product.in_features, config, dtype, each)
    return {
        name: 1 / (GENERATE_SECONDS + sum(times[product] * count for product, count in of_setting.items()))
        for name, of_setting in products.items()
    }


def choose_one(settings: Sequence[Setting], speed: bool) -> Setting | None:
    """The best setting that fits, or with ``speed`` the fastest of those that are fair; None where none fits."""
    fitting = [setting for setting in settings if setting.fits and setting.name != "dense"]
    fair = [setting for setting in fitting if setting.is_fair]
    if not speed or not fair:
        return fitting[0] if fitting else None
    return max(fair, key=lambda setting: (setting.tokens_per_second or 0, -setting.weight_bytes))


def label(setting: Setting) -> str:
    """The setting in words."""
    if setting.name == "dense":
        return "dense, as it is"
    bits, _, calibrated = setting.name.partition(" ")
    return f"{bits} bits{', calibrated' if calibrated else ''}"


def command_of(setting: Setting, args: argparse.Namespace, name: str) -> str:
    """The command that makes the setting."""
    if setting.name == "dense":
        return ""
    out = f"{name}-{setting.name.replace(' good', '')}bit"
    return shlex.join(["hqqtensor", "quantize", str(args.dir), out, *setting.options])


def as_dict(setting: Setting, args: argparse.Namespace, name: str) -> dict[str, Any]:
    """The setting, JSON-safe."""
    measured = setting.measured
    return {
        "name": setting.name,
        "weight_bytes": setting.weight_bytes,
        "quality": setting.quality,
        "measured": None if measured is None else vars(measured),
        "tokens_per_second": setting.tokens_per_second,
        "fits": setting.fits,
        "command": command_of(setting, args, name),
    }


def show(settings: Sequence[Setting], best: Setting, budget: float, cache: int, context: int) -> None:
    """A row for each setting, and where the figures come from."""
    rows = []
    for setting in settings:
        measured, speed = setting.measured, setting.tokens_per_second
        kept = "-" if measured is None else f"{measured.agreement:.0%} ({measured.model})"
        mark = "<- this one" if setting is best else "" if setting.fits else "too large"
        speed_text = "-" if speed is None else f"{speed:.1f}"
        rows.append((label(setting), megabytes(setting.weight_bytes), setting.quality, kept, speed_text, mark))
    print_table(("setting", "weights", "quality", "same next token", "tokens/s", ""), rows)
    print(f"budget {megabytes(budget)}, of which a cache of {context} tokens takes {megabytes(cache)}")
    print(
        "quality: measured on small models (SmolLM2: 135 million parameters, doclm: 6 million); larger ones lose less"
    )
    print("tokens/s: estimated for this machine from its kernels on the model's shapes")
