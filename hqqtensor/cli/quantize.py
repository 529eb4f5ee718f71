"""``hqqtensor quantize``: a Hugging Face model directory in, a quantized one out."""

import argparse
import contextlib
import dataclasses
import sys
import time
from typing import Any

from hqqtensor import HqqConfig, quantize_, save_model
from hqqtensor.cli import calibration, dry_run, model_dir, model_source, presets, search, stream
from hqqtensor.cli.argument_types import group_size
from hqqtensor.cli.errors import CommandError, from_arguments, writing
from hqqtensor.cli.output import progress_on_stderr
from hqqtensor.cli.stream import Task
from hqqtensor.cli.summary import Summary, report
from hqqtensor.diagnostics import model_size
from hqqtensor.diagnostics.left_dense import left_dense
from hqqtensor.presets import BYTE_UNITS, parse_size
from hqqtensor.selection import OUTPUT_LAYER, check_shapes, choose, output_layers
from hqqtensor.streaming import NotStreamable


def run(args: argparse.Namespace) -> int:
    """Check all that the arguments say, quantize, write, report."""
    with from_arguments():
        config = make_config(args)
        target_bytes = search.check_arguments(args)
        parse_size(args.max_shard_size, "--max-shard-size", BYTE_UNITS)
        stream.check_arguments(args)
    out = args.out_dir.resolve()
    with model_source.located(args.model_dir) as source, contextlib.ExitStack() as stack:
        settings = model_dir.read_dense_config(source.directory)
        model_dir.check_output(out, source.gguf or source.directory, args.overwrite or stream.is_together(args))
        text = None if args.text is None else model_dir.read_text(args.text)
        files = stack.enter_context(stream.opened(source, args))
        empty = model_dir.empty_model_of(source.directory, None if files is None else files.first_floating_dtype())
        config = skip_output_layer(empty, config, args)
        check_model(empty, config, target_bytes, args)
        to_calibrate_on = calibration.check(empty, config, args)
        if args.dry_run:
            if source.gguf is None:
                dry_run.with_stored_dtype(empty, source.directory)
            return dry_run.run(empty, config, search.is_search(args), args)
        task = Task(source, out, config, settings, target_bytes, text, to_calibrate_on)
        try:
            if files is None:
                summary: Summary | None = run_in_memory(task, args)
            else:
                summary = stream.run(files, empty, task, args)
        except NotStreamable as error:
            if source.gguf is not None:
                raise CommandError(f"{source.gguf}: {error}") from error
            stream.say_why_not(error, args)
            summary = run_in_memory(task, args)
    if summary is not None:
        report(out, summary, args.json)
    return 0


def run_in_memory(task: Task, args: argparse.Namespace) -> Summary:
    """Quantize the model opened whole, for one whose files cannot be read weight by weight."""
    source, out, config = task.source.directory, task.out, task.config
    model = model_dir.open_dense(source)
    before = model_size(model)
    with calibration.resumable(out, args) as kept:
        options = {**calibration.arguments_of_quantize(model, task.to_calibrate_on, source, args), **kept}
        measured = None
        if search.is_search(args):
            config, measured = search.run(model, config, task.target_bytes, task.text, source, options, args)
        started = time.perf_counter()
        with progress_on_stderr("quantizing", not args.json) as progress:
            quantize_(model, config, progress=progress, **options)
        seconds = time.perf_counter() - started

        with writing(out), model_dir.written_at_once(out) as work:
            save_model(model, work, max_shard_size=args.max_shard_size, non_persistent_buffers=False)
            model_dir.complete(work, source, task.settings, config, next(model.parameters()).dtype, task.source.name)
    return Summary(before, model_size(model), left_dense(model, config), seconds, config, measured)


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
