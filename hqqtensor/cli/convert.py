"""``hqqtensor convert``: checkpoints of hqq, GPTQ, AWQ and GGUF in, hqqtensor's layout out; or out to others."""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hqqtensor.cli import model_dir
from hqqtensor.cli.errors import UsageError, from_arguments, from_files, writing
from hqqtensor.cli.output import print_json
from hqqtensor.config import SCALE_DTYPES
from hqqtensor.diagnostics.table import megabytes
from hqqtensor.integrations.vllm.torchao_checkpoint import for_vllm
from hqqtensor.presets import BYTE_UNITS, parse_size
from hqqtensor.selection import OUTPUT_LAYER, embeddings_and_output
from hqqtensor.serialization.gguf_file import open_gguf
from hqqtensor.serialization.gguf_llama import llama_config
from hqqtensor.serialization.hqq_export import to_flat
from hqqtensor.serialization.load import read_checkpoint
from hqqtensor.serialization.save import save_state
from hqqtensor.tensor import HQQTensor
from hqqtensor.tensor.settings import common_config


def run(args: argparse.Namespace) -> int:
    """Check all that the arguments say, read, write, report."""
    with from_arguments():
        parse_size(args.max_shard_size, "--max-shard-size", BYTE_UNITS)
    settings = read_settings(args)
    with from_files():
        state, aliases, hidden = read_checkpoint(args.src, args.act_order, args.mmap)
    weights = quantized_weights(state)
    if not weights:
        raise UsageError(f"{args.src} holds no quantized weights; hqqtensor quantize makes them")
    if args.to != "hqqtensor":  # the others know no aliases and keep no buffers that are not persistent
        state = {name: tensor for name, tensor in state.items() if name not in hidden}
        aliases, hidden = {}, set()
    if args.to == "hqq":
        state = _for_hqq(state, settings)
        weights = quantized_weights(state)
        settings["quantization_config"] = hqq_config(weights, dense_modules(state))
        state = to_flat(state)
    elif args.to == "vllm":
        state, settings["quantization_config"] = _for_vllm(state, settings)
        weights = quantized_weights(state)
    else:
        settings["quantization_config"] = hqqtensor_config(weights, settings)
    with writing(args.dst), model_dir.written_at_once(args.dst) as work:
        save_state(state, work, aliases, sorted(hidden), args.max_shard_size, torchao=args.to == "vllm")
        if args.config is not None or args.src.is_dir():
            model_dir.copy_companions(args.config or args.src, work)
        model_dir.write_config(work, settings, next(iter(weights.values())).dtype)
    size = sum(file.stat().st_size for file in args.dst.glob("*.safetensors"))
    if args.json:
        print_json({"dst": str(args.dst), "layout": args.to, "quantized_weights": len(weights), "bytes": size})
    else:
        print(f"wrote {args.dst}: {len(weights)} quantized weights in the layout of {args.to}, {megabytes(size)}")
    return 0


def read_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What DST's config.json is to say but for its ``quantization_config``; UsageError for paths that do not serve."""
    gguf = args.src.suffix == ".gguf"
    if args.config is not None and not gguf:
        raise UsageError(f"--config is for .gguf files; {args.src} has its own config.json")
    if not args.src.exists():
        raise UsageError(f"{args.src} does not exist")
    if gguf and args.config is None:
        with from_files():
            settings = llama_config(open_gguf(args.src))
    else:
        settings = model_dir.read_config(args.config if gguf else args.src)
    for source in (args.src, args.config) if args.config is not None else (args.src,):
        model_dir.check_output(args.dst, source, args.overwrite)
    return settings


def quantized_weights(state: Mapping[str, Tensor]) -> dict[str, HQQTensor]:
    """The HQQTensors of a state, by name."""
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, HQQTensor)}


def _for_vllm(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    name = str(settings.get("dtype") or settings.get("torch_dtype"))
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in SCALE_DTYPES}
    converted = for_vllm(model_dir.empty_model(settings), state, dtypes.get(name, torch.float16))
    if converted.made_dense:
        _say_dense("vLLM", converted.made_dense)
    return converted.state, converted.quantization_config


def _for_hqq(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """``state`` with dense weights where ``embedding_nbits`` quantized them: hqq leaves these layers alone."""
    entry = settings.get("quantization_config")
    if not isinstance(entry, dict) or entry.get("embedding_nbits") is None:
        return dict(state)
    ends = embeddings_and_output(model_dir.empty_model(settings))
    dense = {n: t.dequantize() for n, t in quantized_weights(state).items() if n.rpartition(".")[0] in ends}
    if dense:
        _say_dense("hqq", list(dense))
    return {**state, **dense}


def _say_dense(library: str, names: list[str]) -> None:
    print(f"stored dense, since {library} quantizes linear layers alone: {', '.join(names)}", file=sys.stderr)


def hqqtensor_config(weights: Mapping[str, HQQTensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A ``quantization_config`` for what the checkpoint holds: the entries in its files rule when it is loaded."""
    entry = settings.get("quantization_config")
    entry = entry if isinstance(entry, dict) else {}
    if entry.get("quant_method") == model_dir.QUANT_METHOD:
        return dict(entry)
    skip = entry.get("skip_modules") or entry.get("modules_to_not_convert") or ["lm_head"]
    config = replace(common_config(weights.values()), compute_dtype=None, skip_modules=skip)
    return {"quant_method": model_dir.QUANT_METHOD, **config.to_dict()}


def dense_modules(state: Mapping[str, Tensor]) -> list[str]:
    """The modules with dense matrices, and the output layer where it is tied and so has none: what hqq leaves alone.

    By the last part of their names, such as "lm_head", where all modules with that part are dense.
    """
    names = {
        name.rpartition(".")[0]: isinstance(tensor, HQQTensor) for name, tensor in state.items() if tensor.ndim > 1
    }
    names.setdefault(OUTPUT_LAYER, False)
    short = {name: name.rpartition(".")[2] for name in names}
    mixed = {short[name] for name, is_quantized in names.items() if is_quantized}
    dense = [name for name, is_quantized in names.items() if not is_quantized]
    return sorted({name if short[name] in mixed else short[name] for name in dense})


def hqq_config(weights: Mapping[str, HQQTensor], dense: list[str]) -> dict[str, Any]:
    """What transformers writes for an hqq model, with the settings that most of the weights have.

    dense: modules that are not quantized.
    """
    config = common_config(weights.values())
    weight = {"nbits": config.nbits, "group_size": config.group_size, "axis": config.axis, "channel_wise": True,
              "optimize": True, "round_zero": False, "view_as_float": False}  # fmt: skip
    params = {"weight_quant_params": weight, "scale_quant_params": None, "zero_quant_params": None}
    return {"quant_method": "hqq", "quant_config": {**params, "offload_meta": False}, "skip_modules": dense}
