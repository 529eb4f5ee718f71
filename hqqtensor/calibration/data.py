"""Batches to calibrate on: text that the model writes itself, random tokens, a text file, or the user's own."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqqtensor.diagnostics.language import token_windows
from hqqtensor.forward import device_of, evaluating

TOKENS, CONTEXT, BATCH = 8192, 512, 4
"""Tokens in all, tokens of a window, windows of a batch."""
MANY_TOKENS = 4 * TOKENS
"""Tokens in all for ``quality="best"``."""


@dataclass(frozen=True)
class Text:
    """A text to calibrate on, and what messages call it."""

    content: str = field(repr=False)
    name: str


Source = str | os.PathLike[str] | Text | Iterable[Any]
"""What ``batches_of`` takes."""


def batches_of(
    source: Source, model: nn.Module, tokenizer: Any = None, tokens: int = TOKENS, seed: int = 0, windows: int = BATCH,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Any]:  # fmt: skip
    """Batches for ``model``, as ``calibrate`` takes them.

    source: "self" (the model writes the text: it must be able to generate), "random" (random tokens), the path of a
        UTF-8 text file or a ``Text``, for which ``tokenizer`` is needed, or batches, which are returned as a list.
    tokens: how many to take, a little fewer where they fill no whole window. windows: windows of a batch. seed: of
        "self" and "random". progress: called as ``progress(done, total, "writing text")`` while the model writes.
    ValueError for a model that cannot do what is asked for, a text too short for a window, or a missing tokenizer.
    """
    if not isinstance(source, (str, os.PathLike, Text)):
        return list(source)
    if tokens < 2:
        raise ValueError(f"calibration needs at least 2 tokens, got {tokens}")
    config = getattr(model, "config", None)
    context = min(CONTEXT, tokens, getattr(config, "max_position_embeddings", None) or CONTEXT)
    count = max(1, tokens // context)
    if source == "self":
        ids = _written(model, count, context, seed, progress)
    elif source == "random":
        vocabulary = getattr(config, "vocab_size", None)
        if not isinstance(vocabulary, int):
            raise ValueError(f'calibration on "random" tokens: {type(model).__name__} has no config.vocab_size')
        ids = random_ids(vocabulary, count, context, seed)
    else:
        if tokenizer is None:
            name = source.name if isinstance(source, Text) else source
            raise ValueError(f"calibration on {name}: a tokenizer is needed")
        ids = _windows(source if isinstance(source, Text) else _read(Path(source)), tokenizer, count, context)
    device = device_of(model)
    return [{"input_ids": part.to(device)} for part in ids.split(windows)]


def random_ids(vocabulary: int, count: int, length: int, seed: int) -> Tensor:
    """Token ids, int64 ``[count, length]``, uniformly random below ``vocabulary``."""
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))


def _read(path: Path) -> Text:
    try:
        return Text(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"calibration on {path}: not UTF-8 text ({error})") from None


def _windows(text: Text, tokenizer: Any, count: int, context: int) -> Tensor:
    """``count`` windows (or all that there are) spread evenly over the text."""
    windows = token_windows(tokenizer, text.content, context)
    return windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()]


def writes_text(model: Any) -> bool:
    """Whether "self" serves the model: it generates text, from nothing but text."""
    can = getattr(model, "can_generate", None)
    return callable(can) and bool(can()) and not getattr(model.config, "is_encoder_decoder", False)


class _Counter:
    """What transformers' ``generate`` takes for a streamer: it is told of the first tokens and of every one after."""

    def __init__(self, total: int, progress: Callable[[int, int, str], None]) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def put(self, _tokens: Tensor) -> None:
        self.done += 1
        self.progress(self.done, self.total, "writing text")

    def end(self) -> None:
        pass


@torch.no_grad()
def _written(
    model: Any, count: int, context: int, seed: int, progress: Callable[[int, int, str], None] | None
) -> Tensor:
    """``count`` texts of ``context`` tokens, sampled from the model's own distribution.

    Each begins with the token that begins texts, or with a random one where the model has none.
    """
    if not writes_text(model):
        raise ValueError(
            f'calibration="self": {type(model).__name__} cannot write text; use "random", a text file or batches'
        )
    from transformers import GenerationConfig

    device = device_of(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), evaluating(model):
        torch.manual_seed(seed)
        first = getattr(model.config, "bos_token_id", None)
        begin = (
            torch.randint(0, model.config.vocab_size, (count, 1))
            if first is None
            else torch.full((count, 1), first, dtype=torch.int64)
        ).to(device)
        settings = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=context - 1,
            min_new_tokens=context - 1, eos_token_id=model.config.eos_token_id, pad_token_id=0,
        )  # fmt: skip
        streamer = None if progress is None else _Counter(context, progress)
        mask = torch.ones_like(begin)
        with _decoding_fast(model):
            return model.generate(begin, attention_mask=mask, generation_config=settings, streamer=streamer)


@contextlib.contextmanager
def _decoding_fast(model: Any) -> Iterator[None]:
    """Tokens go through the decoder within the block, where it serves the model, which is left as it was."""
    from hqqtensor.generation import prepare_for_generation_, undo_generation_
    from hqqtensor.generation.forward import decoder_forward

    prepared = decoder_forward(model) is not None
    with contextlib.suppress(ValueError):  # others decode as they do
        prepare_for_generation_(model, copy_weights=False)
    try:
        yield
    finally:
        if not prepared and decoder_forward(model) is not None:
            undo_generation_(model)
