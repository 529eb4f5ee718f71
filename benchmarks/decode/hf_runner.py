"""A model of transformers as its users run it: ``model.generate()``, with the time of each token."""

import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from benchmarks.decode.weights import EMBEDDING
from hqqtensor import HQQTensor


class Clock(LogitsProcessor):
    """Notes when the logits of each token were there; changes nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.times.append(time.perf_counter())
        return scores


def assemble(config: LlamaConfig, weights: dict[str, Tensor], dtype: torch.dtype) -> LlamaForCausalLM:
    """A model that computes in ``dtype`` around these weights. Packed ones are shared, not copied.

    A layer that ``weights`` does not name shares those of layer 0: a model of many layers in the memory of one.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    names = [name for name, _ in model.named_parameters()]
    for name in names:
        shared = ".".join("0" if part.isdigit() else part for part in name.split("."))
        w = weights.get(name, weights.get(shared))
        assert w is not None, name
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(w.to(dtype), requires_grad=False))
    model.lm_head.weight = model.get_parameter(EMBEDDING)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its frequencies were on the meta device
    return model.eval()


class HfRunner:
    """``generate`` gives the seconds to each token and the tokens; ``nbytes`` of the weights."""

    def __init__(self, name: str, kind: str, model: Any, cache: Any = None) -> None:
        """cache: makes ``past_key_values`` for a call; transformers' own by default."""
        self.name, self.kind, self.model, self.cache = name, kind, model, cache
        parameters = {id(p): p for p in model.parameters()}.values()
        self.nbytes = sum(p.nbytes if isinstance(p, HQQTensor) else p.numel() * p.itemsize for p in parameters)

    def generate(self, ids: Tensor, new: int) -> tuple[list[float], list[list[int]]]:
        """Greedy: seconds from the start to each of ``new`` tokens of ids ``[B, T]``, and these tokens.

        The token that ends a text is one that there is not. ``min_new_tokens`` would look through the whole vocabulary
        at every token, which takes 1 ms, and which no user asks for.
        """
        clock = Clock()
        options = {} if self.cache is None else {"past_key_values": self.cache()}
        started = time.perf_counter()
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0,
            eos_token_id=self.model.config.vocab_size, logits_processor=LogitsProcessorList([clock]), **options,
        )  # fmt: skip
        assert out.shape[1] == ids.shape[1] + new
        return [t - started for t in clock.times], out[:, ids.shape[1] :].tolist()
