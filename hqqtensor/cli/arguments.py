"""The arguments of every command and their help. Nothing here imports torch, so that help and errors come at once."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from hqqtensor import __version__
from hqqtensor.cli import use_arguments
from hqqtensor.cli.argument_types import add_json, add_mmap, add_windows, embedding_bits, group_size, number_or_none

EXIT_CODES = """exit codes:
  0    done
  1    the work failed: a damaged file, a missing package, a full disk
  2    the command cannot run as written: another command line mends it
  130  interrupted

An error is one line on stderr; HQQTENSOR_TRACEBACK=1 adds the traceback."""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, no abbreviated options, and an epilog that keeps its line breaks."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """One line, without the usage that argparse puts before it."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)


def make_parser() -> Parser:
    """The parser of ``hqqtensor``; its result has ``command``, the name of the command."""
    parser = Parser(
        prog="hqqtensor",
        description="Half-quadratic quantization of models to 1 to 8 bits.",
        epilog=f"hqqtensor COMMAND --help tells more of each command.\n\n{EXIT_CODES}",
    )
    parser.add_argument("--version", action="version", version=f"hqqtensor {__version__}", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (about, example, add_arguments) in _COMMANDS.items():
        command = commands.add_parser(name, help=about, description=_sentence(about), epilog=f"example:\n{example}")
        add_arguments(command)
    return parser


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _add_output(parser: argparse.ArgumentParser, place: str) -> None:
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE",
        help="largest weight file, such as 500MB or 2GiB; more go to several files (default: 5GB)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help=f"replace the model in {place} (default: refuse)")


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model_dir", metavar="MODEL_DIR", type=Path,
        help="directory of a dense model (config.json and safetensors), a .gguf file, or org/model on the hub",
    )  # fmt: skip
    add("out_dir", metavar="OUT_DIR", type=Path, help="directory to write; created if it is missing")
    add("--bits", type=int, metavar="N", help="bits a weight, 1 to 8 (default: 4, or what --format takes)")
    add(
        "--preset", metavar="NAME",
        help="settings by name in place of --bits and others: 8, 6, 4, 3, 2, or such as 4/64 (see docs/cli.md)",
    )  # fmt: skip
    add(
        "--format", default="int", metavar="NAME",
        help="number format: int, nf4, fp4, fp6, fp8 or codebook (default: int)",
    )  # fmt: skip
    add(
        "--group-size", type=group_size, default="auto", metavar="N",
        help="weights that share a scale, or 'none' for a whole row (default: auto, the best for the bits; up to 4 "
        "bits that is 20 with scales and zero points of 4 bits and column scales, else 64)",
    )  # fmt: skip
    add(
        "--embeddings", type=embedding_bits, default="auto", metavar="N",
        help="bits of the input embedding and the output layer, 1 to 8, or 'none' to leave them dense (default: 8; "
        "with --target-* the search chooses them)",
    )  # fmt: skip
    add("--axis", type=int, default=1, metavar="N", help="1 groups along inputs, 0 along outputs (default: 1)")
    add(
        "--solver", metavar="NAME",
        help="column_scaled, hqq_joint, hqq or rtn (default: column_scaled with the best groups, else hqq_joint)",
    )  # fmt: skip
    add(
        "--layers", nargs="+", default=[], metavar="TAG=BITS/GROUP",
        help="other settings for some layers, such as self_attn.q_proj=3/32 or, with the best groups, q_proj=3; "
        "TAG=none leaves them dense",
    )  # fmt: skip
    add("--skip", nargs="*", metavar="TAG", help="modules to leave dense, such as lm_head (default: none of their own)")
    add(
        "--quant-metadata", type=int, nargs="?", const=8, metavar="BITS",
        help="store scales and zero points in 8 bits, or in 4 (default: with the best groups 4, else as floats; 8 "
        "without a number)",
    )  # fmt: skip
    add(
        "--quality", choices=("fast", "good", "best"),
        help="fast: weights alone; good: also what the layers see, block by block, about a minute for 100 million "
        "weights; best: learned rounding too, many minutes (default: good with --calibrate, else fast)",
    )  # fmt: skip
    add(
        "--calibrate", metavar="self|random|FILE",
        help="calibrate on text that the model writes itself, on random tokens, or on a UTF-8 text file "
        "(default for --quality good and best: self, or random where the model cannot write)",
    )  # fmt: skip
    add(
        "--target-bpw", type=float, metavar="BITS",
        help="choose settings by layer for this average of their bits a weight; embedding and output layer count "
        "unless --embeddings says otherwise",
    )  # fmt: skip
    add("--target-size", metavar="SIZE", help="choose settings by layer for a model of this size, such as 4GiB")
    add(
        "--sensitivity", type=Path, metavar="FILE",
        help="JSON file of measurements for --target-*: read if it exists, and written (default: none)",
    )  # fmt: skip
    add(
        "--text", type=Path, metavar="FILE",
        help="UTF-8 text to measure on for --target-* (default: what --calibrate takes, else random tokens)",
    )  # fmt: skip
    add("--fast", action="store_true", help="measure for --target-* from weights alone, in seconds")
    add(
        "--time-limit", type=float, metavar="SECONDS",
        help="stop measuring for --target-* after this time and estimate the layers that are left (default: none)",
    )  # fmt: skip
    add("--dry-run", action="store_true", help="say what would be quantized and how large it gets; write nothing")
    add(
        "--workers-join", action="store_true",
        help="share the work with other processes that are given the same command, on any machines that share the "
        "disk; torchrun does as well (default: alone)",
    )  # fmt: skip
    _add_output(parser, "OUT_DIR")
    add_json(parser, "the summary")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("src", metavar="SRC", type=Path, help="directory of a quantized model (hqq, GPTQ, AWQ, hqqtensor) or .gguf")
    add("dst", metavar="DST", type=Path, help="directory to write; created if it is missing")
    add(
        "--to", choices=("hqqtensor", "hqq", "vllm"), default="hqqtensor",
        help="who is to read DST: hqqtensor, the hqq library or vLLM (default: hqqtensor)",
    )  # fmt: skip
    add(
        "--config", metavar="DIR", type=Path,
        help="for a .gguf file: take config.json and tokenizer from here (default: from the file, no tokenizer)",
    )  # fmt: skip
    add(
        "--act-order", choices=("error", "dense"), default="error",
        help="GPTQ layers whose inputs are grouped out of order: refuse them, or store them dense (default: error)",
    )  # fmt: skip
    add_mmap(parser)
    _add_output(parser, "DST")
    add_json(parser, "the summary")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", type=Path, help="model directory or .safetensors file")
    add_json(parser, "the list")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("dir", metavar="DIR", type=Path, help="quantized directory, or a dense one to try settings on")
    add("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text to predict")
    add(
        "--original", type=Path, metavar="DIR",
        help="for a quantized DIR: the dense model (default: the directory of the recorded name beside DIR)",
    )  # fmt: skip
    # What is not given is not there, so that a quantized DIR can refuse what is.
    for_dense: dict[str, Any] = {"default": argparse.SUPPRESS, "metavar": "N"}
    add("--bits", type=int, **for_dense, help="for a dense DIR: bits a weight, 1 to 8 (default: 4)")
    add(
        "--group-size", type=group_size, **for_dense,
        help="for a dense DIR: weights that share a scale, or 'none' for a whole row (default: auto, as for quantize)",
    )  # fmt: skip
    add(
        "--embeddings", type=number_or_none, **for_dense,
        help="for a dense DIR: bits of input embedding and output layer, or 'none' for dense ones (default: 8)",
    )  # fmt: skip
    add_windows(parser)
    add_mmap(parser)
    add_json(parser, "the figures")


def _add_env(parser: argparse.ArgumentParser) -> None:
    add_json(parser, "all of it")


def _add_pack(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("dir", metavar="DIR", type=Path, help="directory whose files are packed, such as a quantized model")
    add("file", metavar="FILE", type=Path, help="file to write, or - for stdout")
    add(
        "--compression", choices=("zstd", "deflate", "none"), default="zstd",
        help="zstd needs the package zstandard; deflate needs none but more time; none: checksums alone "
        "(default: zstd)",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace FILE (default: refuse)")
    add_json(parser, "the summary")


def _add_unpack(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="FILE", type=Path, help="file that pack wrote, or - for stdin")
    add("out_dir", metavar="OUT_DIR", type=Path, help="directory to write; created if it is missing")
    add("--overwrite", action="store_true", help="replace the model in OUT_DIR (default: refuse)")
    add_json(parser, "the summary")


_Command = tuple[str, str, Callable[[argparse.ArgumentParser], None]]
_COMMANDS: dict[str, _Command] = {
    "quantize": (
        "quantize a Hugging Face model directory",
        "  hqqtensor quantize ./llama ./llama-3bit --bits 3\n"
        "  hqqtensor quantize ./llama ./llama-4bit --bits 4 --group-size 64 --embeddings none\n"
        "  hqqtensor quantize ./llama ./llama-3bit --bits 3 --calibrate self\n"
        "  hqqtensor quantize ./llama ./llama-mixed --target-bpw 3.25 --sensitivity llama.json",
        _add_quantize,
    ),
    "convert": (
        "read a checkpoint of hqq, GPTQ, AWQ or GGUF, or write one for hqq or vLLM",
        "  hqqtensor convert ./llama-gptq ./llama-hqqtensor\n"
        "  hqqtensor convert llama.gguf ./llama-hqqtensor --config ./llama",
        _add_convert,
    ),
    "inspect": (
        "list the tensors of a checkpoint: kind, shape, bits, bytes",
        "  hqqtensor inspect ./llama-4bit",
        _add_inspect,
    ),
    "eval": (
        "compare a quantized model with its original: perplexity, KL, agreement",
        "  hqqtensor eval ./llama-4bit --text sample.txt --original ./llama\n"
        "  hqqtensor eval ./llama --text sample.txt --bits 3",
        _add_eval,
    ),
    "compare": (
        "compare two models: perplexity, KL, agreement, size",
        "  hqqtensor compare ./llama-4bit ./llama-3bit --text sample.txt",
        use_arguments.add_compare,
    ),
    "recommend": (
        "recommend settings for a memory budget, with size, quality and speed",
        "  hqqtensor recommend ./llama --memory 8GiB\n  hqqtensor recommend ./llama --memory 8GiB --speed",
        use_arguments.add_recommend,
    ),
    "chat": (
        "talk to a chat model in the terminal",
        "  hqqtensor chat ./llama-4bit\n  hqqtensor chat ./llama --bits 4 --temperature 0 < questions.txt",
        use_arguments.add_chat,
    ),
    "generate": (
        "let a model go on from a prompt",
        "  hqqtensor generate ./llama-4bit -p 'Once upon a time'\n"
        "  hqqtensor generate ./llama-4bit --chat -p 'Why is the sky blue?' --max-tokens 64",
        use_arguments.add_generate,
    ),
    "serve": (
        "serve a model by the API of OpenAI, with streaming",
        "  hqqtensor serve ./llama-4bit --port 8000",
        use_arguments.add_serve,
    ),
    "bench": (
        "measure a model on this machine: tokens a second, first token, memory",
        "  hqqtensor bench ./llama-4bit",
        use_arguments.add_bench,
    ),
    "report": (
        "write one HTML page about a quantized model: sizes, errors, quality",
        "  hqqtensor report ./llama-4bit\n"
        "  hqqtensor report ./llama-4bit --original ./llama --text sample.txt -o llama.html",
        use_arguments.add_report,
    ),
    "card": (
        "write a model card, the README.md of a quantized model",
        "  hqqtensor card ./llama-4bit -o ./llama-4bit/README.md",
        use_arguments.add_card,
    ),
    "completion": (
        "print a script that completes commands and options in a shell",
        "  hqqtensor completion bash > ~/.local/share/bash-completion/completions/hqqtensor",
        use_arguments.add_completion,
    ),
    "env": (
        "show versions, processor features and kernels, for bug reports",
        "  hqqtensor env --json",
        _add_env,
    ),
    "pack": (
        "pack a model directory into one compressed file or stream",
        "  hqqtensor pack ./llama-4bit llama-4bit.hqqpack\n"
        "  hqqtensor pack ./llama-4bit - | ssh HOST hqqtensor unpack - llama-4bit",
        _add_pack,
    ),
    "unpack": (
        "unpack what pack wrote, whole or not at all",
        "  hqqtensor unpack llama-4bit.hqqpack ./llama-4bit",
        _add_unpack,
    ),
}
"""By name: what the command does, an example, and the function that adds its arguments."""
