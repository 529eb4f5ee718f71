"""``hqqtensor generate``: transformers' ``generate()`` from a prompt, printed as it comes."""

import argparse
import sys
from typing import Any

import torch

from hqqtensor.cli import model_dir, running
from hqqtensor.cli.errors import UsageError
from hqqtensor.cli.output import print_json


def run(args: argparse.Namespace) -> int:
    """Open the model, let it go on from the prompt, report the speed on stderr."""
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    model_dir.quantization_of(args.dir)  # an error before all else
    tokenizer = model_dir.open_tokenizer(args.dir)
    if args.chat:
        inputs = chat_inputs(tokenizer, [{"role": "user", "content": prompt}], args)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise UsageError("--prompt has no tokens")
    model = running.open_to_write(args.dir, args.bits, args.json, args.mmap)
    check_length(model, inputs, args)
    answer, timing, _ = write(model, tokenizer, inputs, args)
    if args.json:
        print_json({"prompt": prompt, "text": answer, **timing.as_dict()})
    else:
        print(timing, file=sys.stderr)
    return 0


def chat_inputs(tokenizer: Any, messages: list[dict[str, str]], args: argparse.Namespace) -> Any:
    """Tokens of a conversation by the tokenizer's chat template; UsageError where it has none or refuses."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise UsageError(
            f"{args.dir}: the tokenizer has no chat template, so this is no chat model; use hqqtensor generate -p"
        )
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except TemplateError as error:
        raise UsageError(f"{args.dir}: the chat template refuses the conversation: {error}") from error


def check_length(model: Any, inputs: Any, args: argparse.Namespace) -> None:
    """UsageError for a prompt that leaves no place for an answer."""
    longest, tokens = running.longest_context(model), inputs["input_ids"].shape[1]
    if longest is not None and tokens >= longest:
        raise UsageError(f"a prompt of {tokens} tokens leaves no place in the {longest} positions of {args.dir}")


def write(
    model: Any, tokenizer: Any, inputs: Any, args: argparse.Namespace, cache: Any = None
) -> tuple[str, running.Timing, list[int]]:
    """The answer, its timing, and the tokens of prompt and answer. It is printed as it comes, unless for ``--json``.

    Ctrl-C ends the answer where it is and raises KeyboardInterrupt.
    """
    from transformers import TextStreamer

    inner = None if args.json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer = running.TimedStreamer(inner)
    tokens = inputs["input_ids"].shape[1]
    settings = running.sampling(model, args)
    longest = running.longest_context(model)
    if longest is not None:
        settings["max_new_tokens"] = min(settings["max_new_tokens"], longest - tokens)
    with torch.no_grad():
        ids = model.generate(**inputs, **settings, streamer=streamer, past_key_values=cache)[0].tolist()
    return tokenizer.decode(ids[tokens:], skip_special_tokens=True), streamer.timing(), ids
