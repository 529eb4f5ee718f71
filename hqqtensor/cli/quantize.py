"""``hqqtensor quantize``: a Hugging Face model directory in, a quantized one out."""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

from hqqtensor import HqqConfig, quantize_, save_model
from hqqtensor.cli import byte_table, calibration, dry_run, model_dir, presets, search
from hqqtensor.cli.argument_types import group_size
from hqqtensor.cli.errors import from_arguments, writing
from hqqtensor.cli.next_command import command_to_try
from hqqtensor.cli.output import print_json, progress_on_stderr
from hqqtensor.diagnostics import model_size
from hqqtensor.diagnostics.left_dense import DenseGroup, left_dense
from hqqtensor.diagnostics.size import ModelSize
from hqqtensor.diagnostics.table import megabytes
from hqqtensor.presets import BYTE_UNITS, parse_size
from hqqtensor.selection import OUTPUT_LAYER, check_shapes, choose, output_layers


def run(args: argparse.Namespace) -> int:
    """Check all that the arguments say, quantize, write, report."""
    source, out = args.model_dir.resolve(), args.out_dir.resolve()
    with from_arguments():
        config = make_config(args)
        target_bytes = search.check_arguments(args)
        parse_size(args.max_shard_size, "--max-shard-size", BYTE_UNITS)
    settings = model_dir.read_dense_config(source)
    model_dir.check_output(out, source, args.overwrite)
    text = None if args.text is None else model_dir.read_text(args.text)
    empty = model_dir.empty_model_of(source)
    config = skip_output_layer(empty, config, args)
    check_model(empty, config, target_bytes, args)
    calibration.check(empty, config, args)
    if args.dry_run:
        return dry_run.run(empty, config, search.is_search(args), args)

    model = model_dir.open_dense(source)
    before = model_size(model)
    with calibration.resumable(out, args) as kept:
        options = {**calibration.arguments_of_quantize(model, args), **kept}
        measured = None
        if search.is_search(args):
            config, measured = search.run(model, config, target_bytes, text, options, args)
        started = time.perf_counter()
        with progress_on_stderr("quantizing", not args.json) as progress:
            quantize_(model, config, progress=progress, **options)
        seconds = time.perf_counter() - started

        # The name of the original's directory says what it was; its place on this machine concerns nobody else.
        entry = {"quant_method": model_dir.QUANT_METHOD, **config.to_dict(), "source": source.name}
        settings["quantization_config"] = entry
        with writing(out), model_dir.written_at_once(out) as work:
            save_model(model, work, max_shard_size=args.max_shard_size, non_persistent_buffers=False)
            model_dir.copy_companions(source, work)
            model_dir.write_config(work, settings, next(model.parameters()).dtype)
    report(out, before, model_size(model), left_dense(model, config), seconds, config, measured, args.json)
    return 0


def parse_layers(entries: list[str]) -> dict[str, dict[str, Any] | None] | None:
    """``["self_attn.q_proj=4/64", "v_proj=6", "mlp=none"]`` as a ``dynamic_config``; ValueError for anything else."""
    layers: dict[str, dict[str, Any] | None] = {}
    for entry in entries:
        tag, _, settings = entry.partition("=")
        bits, slash, group = settings.partition("/")
        try:
            if not tag or tag in layers:
                raise ValueError
            if settings.lower() == "none":
                layers[tag] = None
            else:
                layers[tag] = {"nbits": int(bits), **({"group_size": group_size(group)} if slash else {})}
        except ValueError:
            raise ValueError(f"--layers takes TAG=BITS/GROUP or TAG=none, each tag once, got {entry!r}") from None
    return layers or None


def make_config(args: argparse.Namespace) -> HqqConfig:
    """The HqqConfig that the arguments ask for; ValueError where it refuses."""
    if args.preset is not None:
        return presets.preset_config(args, parse_layers(args.layers))
    metadata = {"quant_scale": True, "quant_zero": True, "meta_nbits": args.quant_metadata}
    return HqqConfig(
        nbits=presets.default_bits(args.format) if args.bits is None else args.bits,
        group_size=args.group_size,
        axis=args.axis,
        format=args.format,
        solver=args.solver,
        **({} if args.quant_metadata is None else metadata),
        embedding_nbits=8 if args.embeddings == "auto" else args.embeddings,
        dynamic_config=parse_layers(args.layers),
        **({} if args.skip is None else {"skip_modules": args.skip}),
    )


def skip_output_layer(empty: Any, config: HqqConfig, args: argparse.Namespace) -> HqqConfig:
    """``config`` that leaves the output layer dense if ``--skip`` names it, and so an embedding that is tied to it.

    In ``config`` alone "lm_head" would give way to ``embedding_nbits``, since it is in skip_modules by default.
    """
    if config.embedding_nbits is None or OUTPUT_LAYER not in (args.skip or []):
        return config
    matrices = {name: w for name, w in empty.named_parameters(remove_duplicate=False) if w.ndim > 1}
    layers = [name for name in output_layers(empty) if f"{name}.weight" in matrices]
    own = {id(matrices[f"{name}.weight"]) for name in layers}
    tied = [name for name, w in matrices.items() if id(w) in own and name.removesuffix(".weight") not in layers]
    if tied:
        print(
            f"--skip {OUTPUT_LAYER} leaves {', '.join(tied)} dense too: it is tied to the output layer", file=sys.stderr
        )
    tags = {**dict.fromkeys(layers), **(config.dynamic_config or {})}
    return dataclasses.replace(config, dynamic_config=tags or None)


def check_model(empty: Any, config: HqqConfig, target_bytes: int | None, args: argparse.Namespace) -> None:
    """UsageError where the arguments do not fit the model, of which ``empty`` has names and shapes and no numbers."""
    with from_arguments():
        choices, _ = choose(empty, config)
        check_shapes(choices)
        if not choices:
            raise ValueError(f"{args.model_dir}: nothing to quantize outside of --skip")
        if search.is_search(args):
            search.check_model(empty, config, target_bytes, args)


def report(
    out: Path, before: ModelSize, after: ModelSize, dense: list[DenseGroup], seconds: float, config: HqqConfig,
    measured: dict[str, Any] | None, as_json: bool,
) -> None:  # fmt: skip
    """Print what was written, how large it is, where its bytes are, and what to do next.

    measured: what a search says of itself.
    """
    parts = byte_table.parts_of(out)
    if as_json:
        print_json(
            {
                "out_dir": str(out),
                "bytes_before": before.nbytes,
                "bytes_after": after.nbytes,
                "quantized_weights": after.quantized_weights,
                "bits_per_weight": after.bits_per_weight,
                "parts": byte_table.as_dicts(parts),
                "left_dense": [dataclasses.asdict(group) for group in dense],
                "seconds": seconds,
                "config": config.to_dict(),
                **({} if measured is None else {"search": measured}),
            }
        )
        return
    print(f"wrote {out}")
    ratio = before.nbytes / after.nbytes
    print(f"size: {megabytes(before.nbytes)} -> {megabytes(after.nbytes)} ({ratio:.2f}x smaller)")
    millions = after.quantized_weights / 1e6
    print(f"quantized: {millions:.2f} million weights at {after.bits_per_weight:.3f} bits, metadata counted")
    print(f"left dense: {megabytes(after.nbytes - after.quantized_nbytes)}")
    for group in dense:
        print(f"  {group}")
    print(f"time to quantize: {seconds:.1f} s")
    byte_table.show_parts(parts)
    print(f"try it: {command_to_try(out)}")
