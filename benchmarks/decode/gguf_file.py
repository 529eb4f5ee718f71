"""A Llama's weights in a GGUF file, quantized by ggml itself. It holds no tokenizer: token numbers go in."""

from pathlib import Path

from torch import Tensor
from transformers import LlamaConfig

from benchmarks.decode.weights import EMBEDDING
from benchmarks.peers import llama_cpp

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TYPES = {4: ("Q4_0", "Q6_K"), 8: ("Q8_0", "Q8_0")}
"""Types of the layers and of the tied embedding, as llama-quantize chooses them, by bits of the layers."""


def gguf_name(name: str) -> str:
    if name == EMBEDDING:
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, *rest = name.removesuffix(".weight").split(".")
    return f"blk.{layer}.{_NAMES['.'.join(rest)]}.weight"


def _interleaved(w: Tensor, heads: int) -> Tensor:
    """Rows of q or k in the order of llama.cpp's rotary embedding, which turns neighbours instead of halves."""
    N, K = w.shape
    return w.view(heads, 2, N // heads // 2, K).transpose(1, 2).reshape(N, K)


def write_gguf(
    path: Path, config: LlamaConfig, weights: dict[str, Tensor], types: int | tuple[str, str]
) -> tuple[int, dict[str, Tensor]]:
    """Write the file; gives the bytes of its tensors and, in float32, the weights that they stand for.

    types: of the layers and of the embedding, or the bits of the layers (``TYPES``).
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("none")
    total = 0
    dense = {}
    for name, w in weights.items():
        w = w.float()
        if w.ndim == 1:
            writer.add_tensor(gguf_name(name), w.numpy())
            total += w.nbytes
            dense[name] = w
            continue
        kind = (TYPES[types] if isinstance(types, int) else types)[name == EMBEDDING]
        packed = llama_cpp.quantize(w, kind)
        dense[name] = llama_cpp.dequantize(packed, kind, *w.shape)
        packed = packed.view(len(w), -1)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            packed = _interleaved(packed, heads)
        # The shape of a quantized tensor is given in bytes; the writer turns it into numbers of weights.
        writer.add_tensor(gguf_name(name), packed.numpy(), raw_dtype=gguf.GGMLQuantizationType[kind])
        total += packed.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return total, dense


def available() -> str | None:
    """Why there can be no such file here, or None."""
    try:
        import gguf  # noqa: F401

        llama_cpp.ggml()
    except (ImportError, llama_cpp.NotHere) as error:
        return str(error)
    return None
