"""The three models, their texts cut into a half for tuning and a half for reporting, and what is measured on them."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality import texts
from hqqtensor import demo
from hqqtensor.calibration.inputs import watch, whole_passes
from hqqtensor.calibration.moments import MomentSums
from hqqtensor.demo.models import CACHE, load_smollm
from hqqtensor.diagnostics.language import next_token_logits, token_windows

SENTENCES, BATCH = 256, 8
CONTEXT, WINDOWS = 512, 12
"""Of SmolLM2: tokens of a window, and windows that are measured: 6,144 tokens."""


@dataclass
class Task:
    """A dense model with what the methods and the measurements need.

    layers: names of the linear layers that are quantized. tuning: batches (keyword arguments of the model) of the half
    of the text that calibration may see. model_inputs(seed): batches of random tokens, for methods without text.
    """

    name: str
    model: nn.Module
    layers: list[str]
    tuning: list[dict[str, Tensor]]
    vocabulary: int
    context: int
    _grams: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def random_tokens(self, seed: int, windows: int = 64) -> list[dict[str, Tensor]]:
        """Batches of uniformly random token ids: what a method without any text can still run the model on."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, self.vocabulary, (windows, self.context), generator=generator)
        return [{"input_ids": chunk} for chunk in ids.split(BATCH)]

    def measure(self, model: nn.Module, half: str) -> dict[str, list[float]]:
        """Figures of a quantized ``model`` for each window (or sentence) of ``half``, "tune" or "report"."""
        raise NotImplementedError

    def inputs(self, half: str) -> list[dict[str, Tensor]]:
        """Batches of the texts that ``measure`` uses."""
        raise NotImplementedError

    def weight_errors(self, model: nn.Module, half: str) -> dict[str, float]:
        """Squared error of all weights, and mean over the layers of that of the layer's output, both relative.

        The output error is tr(E S E^T) / tr(W S W^T) with S the second moments of the dense model's inputs.
        """
        if half not in self._grams:
            self._grams[half] = second_moments(self.model, self.layers, self.inputs(half))
        error = size = output = 0.0
        for name in self.layers:
            w = self.model.get_submodule(name).weight.detach()
            e = model.get_submodule(name).weight.detach() - w
            s = self._grams[half][name]
            error, size = error + e.square().sum().item(), size + w.square().sum().item()
            output += (((e @ s) * e).sum() / ((w @ s) * w).sum()).item() / len(self.layers)
        return {"weight": error / size, "output": output}


def second_moments(model: nn.Module, layers: Iterable[str], batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of x x^T, ``[K, K]``, over the inputs x that each layer sees."""
    sums = {name: MomentSums() for name in layers}
    watch(model, sums, whole_passes(model, batches), lambda name, x: sums[name].add(x), stop=True)
    return {name: of_layer.means()[0] for name, of_layer in sums.items()}


class LanguageTask(Task):
    """A language model: KL, cross-entropy and agreement of the next token, by window of its context.

    halves: windows of tokens ``[W, context]`` to choose settings on ("tune") and to report ("report"). tuning: windows
    that methods may calibrate on.
    """

    def __init__(
        self, name: str, model: nn.Module, context: int, halves: dict[str, Tensor], tuning: Tensor, batch: int = BATCH
    ) -> None:
        layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
        batches = [{"input_ids": chunk} for chunk in tuning.split(BATCH)]
        super().__init__(name, model, layers, batches, model.config.vocab_size, context)
        self.halves, self.batch = halves, batch
        self._before: dict[str, list[Tensor]] = {}

    def inputs(self, half: str) -> list[dict[str, Tensor]]:
        return [{"input_ids": chunk} for chunk in self.halves[half].split(self.batch)]

    @torch.no_grad()
    def measure(self, model: nn.Module, half: str) -> dict[str, list[float]]:
        windows = self.halves[half]
        if half not in self._before:
            self._before = {half: [next_token_logits(self.model, c).log_softmax(-1) for c in windows.split(self.batch)]}
        out: dict[str, list[float]] = {"kl": [], "loss": [], "dense_loss": [], "top1": [], "top5": []}
        for chunk, log_p in zip(windows.split(self.batch), self._before[half], strict=True):
            log_q = next_token_logits(model, chunk).log_softmax(-1)
            target = chunk[:, 1:].reshape(-1, 1)
            choice = log_q.argmax(-1, keepdim=True)
            ranked = log_p.topk(5, dim=-1).indices
            each = {
                "kl": F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1),
                "loss": -log_q.gather(-1, target),
                "dense_loss": -log_p.gather(-1, target),
                "top1": (ranked[:, :1] == choice).float(),
                "top5": (ranked == choice).any(-1).float(),
            }
            for key, value in each.items():
                out[key] += value.reshape(len(chunk), -1).mean(-1).tolist()
        return out


class EmbeddingTask(Task):
    """MiniLM: one minus the cosine of sentence embeddings before and after, and agreement of what is retrieved."""

    def __init__(self) -> None:
        model, self.tokenizer = demo.load_minilm()
        lines = demo.held_out_lines(1 << 30)
        middle = len(lines) // 2
        # Both ends of the text, so that neither half's sentences are next to the other's.
        self.halves = {"tune": lines[:middle][:SENTENCES], "report": lines[middle:][-SENTENCES:]}
        layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "pooler" not in n]
        super().__init__("MiniLM", model, layers, [], model.config.vocab_size, 64)
        self.tuning = self.inputs("tune")

    def inputs(self, half: str) -> list[dict[str, Tensor]]:
        lines = self.halves[half]
        options = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
        return [dict(self.tokenizer(lines[i : i + 1], **options)) for i in range(len(lines))]

    @functools.cached_property
    def _embeddings(self) -> dict[str, Tensor]:
        return {half: demo.embed(self.model, self.tokenizer, lines) for half, lines in self.halves.items()}

    @torch.no_grad()
    def measure(self, model: nn.Module, half: str) -> dict[str, list[float]]:
        before, after = self._embeddings[half], demo.embed(model, self.tokenizer, self.halves[half])
        first, then = (nearest(e, 5) for e in (before, after))
        return {
            "distance": (1 - (before * after).sum(-1)).tolist(),
            "retrieval": (first[:, 0] == then[:, 0]).float().tolist(),
            "retrieval5": (first.unsqueeze(-1) == then.unsqueeze(-2)).any(-1).float().mean(-1).tolist(),
        }


def nearest(embeddings: Tensor, count: int) -> Tensor:
    """For each of ``[S, D]`` unit vectors the ``count`` nearest others, ``[S, count]``, nearest first."""
    return (embeddings @ embeddings.T).fill_diagonal_(-2).topk(count, dim=-1).indices


def doclm() -> LanguageTask:
    """doclm on the two halves of its held-out text; calibrated on the half that settings are chosen on."""
    model, tokenizer = demo.load_doclm()
    windows = token_windows(tokenizer, (demo.DOCLM / "valid.txt").read_text(encoding="utf-8"), demo.CONTEXT)
    middle = len(windows) // 2
    halves = {"tune": windows[:middle], "report": windows[middle:]}
    return LanguageTask("doclm", model, demo.CONTEXT, halves, halves["tune"])


def smollm_windows(text: str, count: int) -> Tensor:
    """``count`` windows of SmolLM2's tokens, spread evenly over a text."""
    windows = token_windows(smollm_tokenizer(), text, CONTEXT)
    return windows[torch.linspace(0, len(windows) - 1, count).long()]


def smollm_tokenizer() -> Any:
    return _smollm()[1]


_smollm = functools.cache(load_smollm)


def smollm() -> LanguageTask:
    """SmolLM2-135M-Instruct: reported on Wikipedia, settings chosen on Python's documentation, calibrated on news."""
    halves = {
        "tune": smollm_windows(texts.documentation(), WINDOWS),
        "report": smollm_windows(texts.wikipedia(CACHE), WINDOWS),
    }
    return LanguageTask("SmolLM2", _smollm()[0], CONTEXT, halves, smollm_windows(texts.news(CACHE), 16), batch=2)


TASKS = {"SmolLM2": smollm, "doclm": doclm, "MiniLM": EmbeddingTask}
