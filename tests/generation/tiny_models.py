"""Tiny random models of every family that has a description, quantized."""

from typing import Any

import torch
import transformers as tf
from torch import Tensor

from hqqtensor import HqqConfig, quantize_

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
WINDOW = 7
ALTERNATE = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, Any] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama3 rope": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, rope_parameters={
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16})),
    "phi3 longrope": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SIZES, original_max_position_embeddings=16,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
                         "long_factor": [1.5] * 8, "original_max_position_embeddings": 16})),
    "dynamic rope": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**{**SIZES, "max_position_embeddings": 16},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SIZES, sliding_window=WINDOW)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, layer_types=ALTERNATE, sliding_window=WINDOW,
                                                        use_sliding_window=True)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZES, sliding_window=WINDOW, layer_types=ALTERNATE,
                                                           query_pre_attn_scalar=24, attn_logit_softcapping=5.0)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SIZES, sliding_window=WINDOW, layer_types=ALTERNATE,
                                                               query_pre_attn_scalar=24)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SIZES, sliding_window=None)),
    "phi3 partial": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SIZES, sliding_window=WINDOW, rope_parameters={
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5})),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3 moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SIZES, num_experts=8, num_experts_per_tok=3,
                                                                  moe_intermediate_size=32, norm_topk_prob=False)),
}  # fmt: skip


def quantized(name: str, dtype: torch.dtype = torch.float32, config: HqqConfig | None = None) -> Any:
    """The model of a family, its norms and biases random, quantized."""
    torch.manual_seed(sum(map(ord, name)))
    model = FAMILIES[name]()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    model = model.to(dtype).eval()
    quantize_(model, config or HqqConfig(4, 32))
    return model


def prompts(batch: int = 1, length: int = 11) -> dict[str, Tensor]:
    """Random tokens; of a batch, each sequence but the first is padded on the left by one more."""
    ids = torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.manual_seed(3))
    mask = torch.ones_like(ids)
    for i in range(batch):
        mask[i, :i] = 0
        ids[i, :i] = 0
    return {"input_ids": ids, "attention_mask": mask}
