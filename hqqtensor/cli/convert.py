"""``hqqtensor convert``: checkpoints of hqq, GPTQ, AWQ and GGUF in, hqqtensor's layout out; or out to others."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqqtensor.cli import model_dir
from hqqtensor.cli.output import CommandError, UsageError, print_json
from hqqtensor.config import SCALE_DTYPES
from hqqtensor.diagnostics.table import megabytes
from hqqtensor.integrations.vllm import for_vllm
from hqqtensor.serialization.gguf_file import open_gguf
from hqqtensor.serialization.gguf_llama import llama_config
from hqqtensor.serialization.gptq_checkpoint import ACT_ORDER
from hqqtensor.serialization.hqq_export import to_flat
from hqqtensor.serialization.load import read_checkpoint
from hqqtensor.serialization.save import save_state
from hqqtensor.tensor import HQQTensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "src", metavar="SRC", type=Path, help="model directory (hqq, GPTQ, AWQ, hqqtensor), or a .gguf file"
    )
    parser.add_argument("dst", metavar="DST", type=Path)
    parser.add_argument("--to", choices=("hqqtensor", "hqq", "vllm"), default="hqqtensor", help="layout of DST")
    parser.add_argument(
        "--config", metavar="DIR", type=Path, help="for a .gguf file: config.json and tokenizer from here"
    )
    parser.add_argument(
        "--act-order", choices=ACT_ORDER, default="error",
        help="GPTQ layers whose groups lie in an order of their own: refuse them, or keep them dense (default error)",
    )  # fmt: skip
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file (default 5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in DST")
    parser.add_argument("--json", action="store_true", help="the summary as JSON")


def run(args: argparse.Namespace) -> int:
    """Read, check everything, write, report."""
    gguf = args.src.suffix == ".gguf"
    if args.config is not None and not gguf:
        raise UsageError(f"--config is for .gguf files; {args.src} has its own config.json")
    companions = args.config if gguf else args.src
    settings = llama_config(open_gguf(args.src)) if companions is None else model_dir.read_config(companions)
    for source in (args.src, *([args.config] if args.config is not None else [])):
        model_dir.check_output(args.dst, source, args.overwrite)
    state, aliases, hidden = read_checkpoint(args.src, args.act_order)
    weights = {name: t for name, t in state.items() if isinstance(t, HQQTensor)}
    if not weights:
        raise CommandError(f"{args.src} holds no quantized weights; hqqtensor quantize makes them")
    if args.to == "hqq":
        settings["quantization_config"] = _hqq_config(weights)
        state = to_flat({name: t for name, t in state.items() if name not in hidden})
        aliases, hidden = {}, set()
    elif args.to == "vllm":
        state, settings["quantization_config"] = _for_vllm(
            {n: t for n, t in state.items() if n not in hidden}, settings
        )
        weights = {name: t for name, t in state.items() if isinstance(t, HQQTensor)}
        aliases, hidden = {}, set()
    else:
        settings["quantization_config"] = _own_config(weights, settings)
    with model_dir.written_at_once(args.dst) as work:
        save_state(state, work, aliases, sorted(hidden), args.max_shard_size, torchao=args.to == "vllm")
        if companions is not None:
            model_dir.copy_companions(companions, work)
        (work / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in args.dst.glob("*.safetensors"))
    if args.json:
        print_json({"dst": str(args.dst), "layout": args.to, "quantized_weights": len(weights), "bytes": size})
    else:
        print(f"wrote {args.dst}: {len(weights)} quantized weights in the layout of {args.to}, {megabytes(size)}")
    return 0


def _for_vllm(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    name = str(settings.get("dtype") or settings.get("torch_dtype"))
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in SCALE_DTYPES}
    made = for_vllm(model_dir.empty_model(settings), state, dtypes.get(name, torch.float16))
    if made.made_dense:
        print(f"stored dense, since vLLM quantizes linear layers alone: {', '.join(made.made_dense)}", file=sys.stderr)
    return made.state, made.quantization_config


def _own_config(weights: Mapping[str, HQQTensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A ``quantization_config`` for what the checkpoint holds: the files' own entries rule when it is loaded."""
    from hqqtensor import HqqConfig

    entry = settings.get("quantization_config") or {}
    if entry.get("quant_method") == model_dir.QUANT_METHOD:
        return dict(entry)
    first = next(iter(weights.values()))
    skip = entry.get("skip_modules") or entry.get("modules_to_not_convert") or ["lm_head"]
    config = HqqConfig(first.nbits, first.group_size, first.axis, skip_modules=skip)
    return {"quant_method": model_dir.QUANT_METHOD, **config.to_dict()}


def _hqq_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What transformers writes for an hqq model, with the settings of the first weight."""
    first: Any = next(iter(weights.values()))
    weight = {"nbits": first.nbits, "group_size": first.group_size, "axis": first.axis, "channel_wise": True,
              "optimize": True, "round_zero": False, "view_as_float": False}  # fmt: skip
    config = {"weight_quant_params": weight, "scale_quant_params": None, "zero_quant_params": None}
    return {"quant_method": "hqq", "quant_config": {**config, "offload_meta": False}, "skip_modules": ["lm_head"]}
