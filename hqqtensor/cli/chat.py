"""``hqqtensor chat``: a conversation by lines, on a terminal or through a pipe."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from hqqtensor.cli import generate, model_dir, running
from hqqtensor.cli.output import print_json

Message = dict[str, str]


def run(args: argparse.Namespace) -> int:
    """Answer line by line until the input ends."""
    system: list[Message] = [] if args.system is None else [{"role": "system", "content": args.system}]
    model_dir.quantization_of(args.dir)  # an error before all else
    tokenizer = model_dir.open_tokenizer(args.dir)
    generate.chat_inputs(tokenizer, [*system, {"role": "user", "content": "?"}], args)  # an error before the model
    model = running.open_to_write(args.dir, args.bits, args.json, args.mmap)
    if sys.stdin.isatty() and not args.json:
        print("one line, one question; an empty line starts anew, Ctrl-C stops an answer, Ctrl-D ends", file=sys.stderr)
    conversation = Conversation(model, tokenizer, system, args)
    for question in questions(not args.json):
        if not question.strip():
            conversation.start_anew()
            continue
        try:
            conversation.ask(question)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print("\n(stopped)", file=sys.stderr)
    report(conversation, args)
    return 0


def questions(prompted: bool) -> Iterator[str]:
    """The lines of stdin; with a prompt and line editing where it is a terminal."""
    if not (prompted and sys.stdin.isatty()):
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    with contextlib.suppress(ImportError):  # without it input() has no editing
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ")
        except EOFError:
            print(file=sys.stderr)
            return


class Conversation:
    """Messages so far, with the cache of keys and values that the next question goes on from."""

    def __init__(self, model: Any, tokenizer: Any, system: list[Message], args: argparse.Namespace) -> None:
        self.model, self.tokenizer, self.system, self.args = model, tokenizer, system, args
        self.messages = list(system)
        self.history: list[Message] = []
        self.timings: list[running.Timing] = []
        self.cache: Any = None
        self.cached_ids: list[int] = []

    def start_anew(self) -> None:
        """Forget all but the system's message."""
        self.messages, self.cache, self.cached_ids = list(self.system), None, []

    def ask(self, question: str) -> None:
        """Print the answer to a question; an answer that is interrupted is no part of the conversation."""
        messages = [*self.messages, {"role": "user", "content": question}]
        inputs = generate.chat_inputs(self.tokenizer, messages, self.args)
        generate.check_length(self.model, inputs, self.args)
        cache = self._cache_for(inputs["input_ids"][0].tolist())
        self.cache = None  # an interrupt leaves it half filled
        answer, timing, ids = generate.write(self.model, self.tokenizer, inputs, self.args, cache)
        self.cache, self.cached_ids = cache, ids[: cache.get_seq_length()]
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.history += [messages[-1], self.messages[-1]]
        self.timings.append(timing)

    def _cache_for(self, ids: list[int]) -> Any:
        """The cache of the turns before if the new prompt begins with what it holds, else an empty one.

        Some templates change what was said before, and some answers are other tokens when they are encoded again.
        """
        count = len(self.cached_ids)
        if self.cache is not None and count < len(ids) and ids[:count] == self.cached_ids:
            return self.cache
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)


def report(conversation: Conversation, args: argparse.Namespace) -> None:
    """Tokens and speed of all answers on stderr, or all of it as JSON."""
    timings = conversation.timings
    new = sum(timing.new_tokens for timing in timings)
    seconds = sum(timing.decode_seconds for timing in timings)
    later = sum(max(0, timing.new_tokens - 1) for timing in timings)
    rate = later / seconds if seconds else None
    if args.json:
        print_json(
            {
                "messages": [*conversation.system, *conversation.history],
                "answers": [timing.as_dict() for timing in timings],
                "new_tokens": new,
                "tokens_per_second": rate,
            }
        )
    elif timings:
        speed = "" if rate is None else f", {rate:.1f} tokens a second"
        answers = "1 answer" if len(timings) == 1 else f"{len(timings)} answers"
        print(f"{answers}, {new} tokens{speed}", file=sys.stderr)
