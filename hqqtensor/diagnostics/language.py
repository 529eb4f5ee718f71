"""How far a quantized language model is from its original: perplexity, KL and agreement of the next token."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hqqtensor.forward import evaluating
from hqqtensor.half_products import fast_half_products

_LOGITS_PER_BATCH = 4_000_000  # bounds the memory of a batch of logits to about 16 MB in float32


@dataclass(frozen=True)
class LanguageComparison:
    """Averages over every predicted token.

    perplexity_before, perplexity_after: exp of the mean cross-entropy of the original and the quantized model.
    kl: mean KL(original || quantized) of the next-token distribution, in nats a token.
    top1_agreement: share of tokens where both models rank the same token first.
    top5_agreement: share where the quantized model's first token is among the original's first five.
    tokens: tokens predicted, ``W * (context - 1)``.
    """

    perplexity_before: float
    perplexity_after: float
    kl: float
    top1_agreement: float
    top5_agreement: float
    tokens: int


def token_windows(tokenizer: Any, text: str, context: int) -> Tensor:
    """Token ids of ``text`` as int64 ``[W, context]``.

    Each non-blank line is encoded by itself without special tokens. The ids of all lines are joined with nothing
    between them and cut into whole windows; what is left at the end is dropped. ValueError where the text does not fill
    one window.
    """
    if context < 2:
        raise ValueError(f"context must be at least 2 tokens, got {context}")
    lines = [line for line in text.split("\n") if line.strip()]
    # verbose=False: the joined text is longer than the model's context on purpose.
    encoded = tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"] if lines else []
    ids = [token for line in encoded for token in line]
    count = len(ids) // context
    if count == 0:
        raise ValueError(f"the text has {len(ids)} tokens, too few for one window of {context}")
    return torch.tensor(ids[: count * context], dtype=torch.int64).view(count, context)


@torch.no_grad()
def compare_language_models(original: nn.Module, quantized: nn.Module, windows: Tensor) -> LanguageComparison:
    """Run both models over ``windows`` (int64 ``[W, context]``) and compare what they predict after each token.

    Both must be causal language models whose output has ``.logits`` ``[batch, context, vocabulary]``. Each runs on
    the device that it is on. TypeError for a model without logits, ValueError for vocabularies that differ.
    """
    if windows.dim() != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise ValueError(f"windows must be [W, context] with W >= 1 and context >= 2, got {list(windows.shape)}")
    nll_before = nll_after = kl = 0.0
    top1 = top5 = tokens = 0
    with evaluating(original), evaluating(quantized), fast_half_products():
        vocabulary = next_token_logits(original, windows[:1, :2]).shape[-1]
        batch = max(1, _LOGITS_PER_BATCH // (vocabulary * windows.shape[1]))
        for chunk in windows.split(batch):
            before, after = next_token_logits(original, chunk), next_token_logits(quantized, chunk)
            if before.shape != after.shape:
                raise ValueError(f"vocabularies differ: {before.shape[-1]} and {after.shape[-1]} logits a token")
            log_p = F.log_softmax(before, dim=-1)
            log_q = F.log_softmax(after.to(before.device), dim=-1)
            targets = chunk[:, 1:].reshape(-1).to(before.device)
            nll_before += F.nll_loss(log_p, targets, reduction="sum").item()
            nll_after += F.nll_loss(log_q, targets, reduction="sum").item()
            kl += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
            choice = log_q.argmax(-1, keepdim=True)
            ranked = log_p.topk(min(5, vocabulary), dim=-1).indices
            top1 += int((ranked[:, :1] == choice).sum())
            top5 += int((ranked == choice).any(-1).sum())
            tokens += targets.numel()
    mean = torch.tensor([nll_before, nll_after], dtype=torch.float64) / tokens
    before_ppl, after_ppl = mean.exp().tolist()
    # Rounding can take a KL of nothing a hair below zero.
    return LanguageComparison(before_ppl, after_ppl, max(0.0, kl / tokens), top1 / tokens, top5 / tokens, tokens)


def next_token_logits(model: nn.Module, windows: Tensor) -> Tensor:
    """float32 logits ``[W * (context - 1), vocabulary]`` for every token of ``windows`` but each window's first."""
    device = next(model.parameters()).device
    options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    logits = getattr(model(windows.to(device), **options), "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise TypeError(f"{type(model).__name__} has no language-model head: its output has no logits")
    return logits[:, :-1].flatten(0, 1).float()
