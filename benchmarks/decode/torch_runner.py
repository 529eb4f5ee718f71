"""A Llama in transformers: prompts run eagerly, single tokens through torch.compile with a static cache.

docs/dev/decoding.md says what each of the compiler's settings is worth.
"""

import copy
from types import FunctionType

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from benchmarks.decode.weights import EMBEDDING
from hqqtensor import HQQTensor
from hqqtensor.compile import JoinLinears

OPTIONS = {
    "cpp_wrapper": True,  # no Python between two products
    "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,  # one graph serves every token
    "realize_opcount_threshold": 8,  # a query's rotation is computed once, not once for each key
    "post_grad_custom_pre_pass": JoinLinears(),
}
"""Of torch.compile, for all models here; the pass finds nothing in dense ones."""


def assemble(config: LlamaConfig, weights: dict[str, Tensor], dtype: torch.dtype) -> LlamaForCausalLM:
    """A model that computes in ``dtype`` around these weights. Packed ones are shared, not copied."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name, w in weights.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(w.to(dtype), requires_grad=False))
    model.lm_head.weight = model.get_parameter(EMBEDDING)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its frequencies were on the meta device
    return model.eval()


class TorchRunner:
    """``prefill`` starts over with a prompt, ``step`` adds a token; both give the logits of the last position."""

    kind = "torch"

    def __init__(
        self,
        name: str,
        config: LlamaConfig,
        weights: dict[str, Tensor],
        dtype: torch.dtype,
        length: int,
        compiled: bool,
    ) -> None:
        self.name = name
        self.nbytes = sum(
            w.nbytes if isinstance(w, HQQTensor) else w.numel() * dtype.itemsize for w in weights.values()
        )
        config = copy.deepcopy(config)  # the attention chosen below is kept in it
        self.model = assemble(config, weights, dtype)
        self.cache = StaticCache(config=config, max_cache_len=length)
        model, cache = self.model, self.cache

        def decode(ids: Tensor) -> Tensor:
            return model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1]

        if compiled:
            # Without guards a graph serves whatever calls its code object: each runner has one of its own.
            own = FunctionType(decode.__code__.replace(), decode.__globals__, closure=decode.__closure__)
            decode = torch.compile(own, fullgraph=True, dynamic=False, options=OPTIONS)
        self.decode = decode

    def prefill(self, tokens: list[int]) -> Tensor:
        self.rewind(0)
        self.model.set_attn_implementation("sdpa")
        out = self.model(torch.tensor([tokens]), past_key_values=self.cache, logits_to_keep=1)
        # For one token torch's CPU attention takes several times what the compiler makes of the plain products.
        self.model.set_attn_implementation("eager")
        return out.logits[0, -1]

    def step(self, token: int) -> Tensor:
        return self.decode(torch.tensor([[token]]))

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)
