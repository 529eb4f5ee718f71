"""Random weights of a Llama's shape, by transformers' parameter names, and which bits each layer is kept in."""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.ours import config_for
from hqqtensor import HQQTensor

EMBEDDING = "model.embed_tokens.weight"


def llama_1b(small: bool = False) -> LlamaConfig:
    """The shapes of Llama-3.2-1B, or with ``small`` a few layers for tests; the embedding is the output layer too."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
    if small:
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1024}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    return LlamaConfig(
        **sizes, **heads, max_position_embeddings=16384, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip


def llama_7b() -> LlamaConfig:
    """The shapes of Llama-2-7B with grouped heads."""
    return LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=16384, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip


def random_weights(config: LlamaConfig, shared: bool = False) -> dict[str, Tensor]:
    """bfloat16 weights, normal with standard deviation 0.02, and float32 norms of one; ``shared``: of layer 0 alone.

    To draw a billion numbers takes a minute: a prime number of them is drawn once and repeated, from another place on
    for each matrix.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    pool = torch.empty(4_194_301).normal_(0, 0.02, generator=torch.manual_seed(0)).bfloat16()
    weights = {}
    for i, (name, p) in enumerate(model.named_parameters()):  # names a tied weight once, as the embedding
        if shared and ".layers." in name and ".layers.0." not in name:
            continue
        if p.ndim == 1:
            weights[name] = torch.ones(p.shape)
            continue
        rolled = pool.roll(7919 * i)
        weights[name] = rolled.repeat(-(-p.numel() // len(pool)))[: p.numel()].view(p.shape)
    return weights


def layer_bits(nbits: int) -> dict[str, int]:
    """As llama-quantize does for Q4_0 and Q8_0: a tied embedding has 6 bits beside 4-bit layers, else 8."""
    return {"layers": nbits, "embedding": {4: 6, 8: 8}[nbits]}


def quantized(weights: dict[str, Tensor], nbits: int, **options: object) -> dict[str, Tensor]:
    """Every matrix packed in groups of 64; norms as they are."""
    bits = layer_bits(nbits)
    out = {}
    for name, w in weights.items():
        width = bits["embedding" if name == EMBEDDING else "layers"]
        out[name] = w if w.ndim == 1 else HQQTensor.from_hp(w, config_for(width, **options))
    return out


def total_bytes(weights: dict[str, Tensor]) -> int:
    return sum(w.nbytes for w in weights.values())
