"""GGUF files of the llama architecture under the names, row order and configuration that transformers uses."""

from typing import Any

import torch
from torch import Tensor

from hqqtensor.serialization.gguf_blocks import read_tensor
from hqqtensor.serialization.gguf_file import GgufFile
from hqqtensor.serialization.layout import CheckpointError, InputError
from hqqtensor.tensor import HQQTensor

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_ROPE_FREQS = "rope_freqs.weight"


def from_llama(file: GgufFile) -> dict[str, Tensor]:
    """All tensors under transformers' names; the rows of q_proj and k_proj go back into its order.

    CheckpointError for another architecture, mixtures of experts, and names that the architecture has not.
    """
    return {new: read_llama(file, new, name) for new, name in llama_names(file).items()}


def llama_names(file: GgufFile) -> dict[str, str]:
    """The names of all tensors in the file, by transformers' names; CheckpointError as ``from_llama``."""
    _heads(file)
    # Factors of rotary frequencies are what transformers computes from the configuration.
    return {_rename(file, name): name for name in file.tensors if name != _ROPE_FREQS}


def read_llama(file: GgufFile, new: str, name: str) -> Tensor:
    """One tensor of ``llama_names``: dense, or an HQQTensor with the file's codes."""
    tensor = read_tensor(file, file.tensors[name])
    for part, count in zip(("q_proj", "k_proj"), _heads(file), strict=True):
        if f".{part}." in new:
            return _rows_of(tensor, count, name)
    return tensor


def llama_config(file: GgufFile) -> dict[str, Any]:
    """What ``config.json`` is to say, from the file's metadata.

    CheckpointError naming what is missing, or what is there and has no plain translation (scaled rotary
    frequencies).
    """
    heads, kv_heads = _heads(file)
    scaling = [key for key in file.metadata if key.startswith("llama.rope.scaling.")]
    if file.metadata.get("llama.rope.scaling.type", "none") == "none":
        scaling = []
    if scaling or _ROPE_FREQS in file.tensors:
        what = scaling[0] if scaling else _ROPE_FREQS
        raise InputError(f"{file.path}: scales rotary frequencies ({what}); give the model's config.json")
    width = _whole(file, "embedding_length")
    head_dim = _whole(file, "attention.key_length", width // heads)
    if _whole(file, "rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError(f"{file.path}: turns only some of the {head_dim} dimensions of a head (rope)")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path}: lacks token_embd.weight")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": _whole(file, "feed_forward_length"),
        "num_hidden_layers": _whole(file, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": _whole(file, "context_length"),
        "rms_norm_eps": _number(file, "attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": _number(file, "rope.freq_base", 10000.0)},
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": "float32",
    }
    ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    for key, short in ids.items():
        value = file.metadata.get(f"tokenizer.ggml.{short}_token_id")
        config[key] = value if isinstance(value, int) else None
    return config


def _heads(file: GgufFile) -> tuple[int, int]:
    """Numbers of heads of queries and of keys; the architecture is checked on the way."""
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{file.path}: architecture {architecture!r} is not read; 'llama' is")
    if file.metadata.get("llama.expert_count", 0):
        raise CheckpointError(f"{file.path}: mixtures of experts are not read")
    heads = _whole(file, "attention.head_count")
    return heads, _whole(file, "attention.head_count_kv", heads)


def _whole(file: GgufFile, key: str, default: int | None = None) -> int:
    value = file.metadata.get(f"llama.{key}", default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{file.path}: llama.{key} must be a positive whole number, got {value!r}")
    return value


def _number(file: GgufFile, key: str, default: float | None = None) -> float:
    value = file.metadata.get(f"llama.{key}", default)
    if not isinstance(value, float) or not 0 < value < 1e12:
        raise CheckpointError(f"{file.path}: llama.{key} must be a positive number, got {value!r}")
    return float(f"{value:.7g}")  # 1e-5 again, where its float32 is 9.99999974e-6


def _rename(file: GgufFile, name: str) -> str:
    stem, _, leaf = name.rpartition(".")
    block, _, part = stem.removeprefix("blk.").partition(".")
    if leaf in ("weight", "bias"):
        if stem in _TOP:
            return f"{_TOP[stem]}.{leaf}"
        if stem.startswith("blk.") and block.isdecimal() and part in _BLOCK:
            return f"model.layers.{int(block)}.{_BLOCK[part]}.{leaf}"
    raise CheckpointError(f"{file.path}: tensor {name!r} has no place in a llama model of transformers")


def _rows_of(tensor: Tensor, heads: int, name: str) -> Tensor:
    """Rows in transformers' order. llama.cpp turns neighbouring dimensions of a head against each other, transformers
    the first half against the second; its converter interleaves the halves, which this undoes."""
    count = tensor.shape[0]
    if count % (2 * heads):
        raise CheckpointError(f"{name}: {count} rows do not divide into {heads} heads")
    order = torch.arange(count).view(heads, count // heads // 2, 2).transpose(1, 2).flatten()
    if not isinstance(tensor, HQQTensor):
        return tensor[order]
    data = {part: getattr(tensor, part)[order] for part in ("qdata", "scale", "zero_point")}
    return tensor.with_data(**data)
