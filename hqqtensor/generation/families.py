"""How the families of models in transformers build a decoder layer: where each part is, and what differs."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """One family: names of modules within a decoder layer, and the few ways in which layers differ.

    base: class of the module that holds ``embed_tokens``, ``layers``, ``norm`` and ``rotary_emb``.
    qkv, gate_up: projections whose outputs lie beside each other, in ``self_attn`` and ``mlp``.
    input_norm, attention_out_norm, mlp_norm, mlp_out_norm: see ``hqqtensor.ops.decoder``; None where there is none.
    norm_plus_one: whether norms multiply by 1 + weight.
    activation: where ``mlp``, or its experts, have the function of the gate.
    window_from: where the sliding window of a layer is found: "attention" (the attention module's ``sliding_window``),
        "config", or "" for none.
    rope_by_type: whether each type of layer has angles of its own.
    experts: whether ``mlp`` chooses experts.
    """

    base: str
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    input_norm: str = "input_layernorm"
    attention_out_norm: str | None = None
    mlp_norm: str = "post_attention_layernorm"
    mlp_out_norm: str | None = None
    norm_plus_one: bool = False
    activation: str = "act_fn"
    window_from: str = ""
    rope_by_type: bool = False
    experts: bool = False

    def window(self, attention: Any, config: Any) -> int:
        """Tokens that a token sees in this layer, itself among them; 0 for all before it."""
        holder = {"attention": attention, "config": config}.get(self.window_from)
        return int(getattr(holder, "sliding_window", None) or 0)


_GEMMA = {
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
    "norm_plus_one": True,
    "window_from": "attention",
}

FAMILIES = {
    family.base: family
    for family in (
        Family("LlamaModel"),  # SmolLM and SmolLM2 too
        Family("MistralModel", window_from="config"),
        Family("Qwen2Model", window_from="attention"),
        Family("Qwen3Model", window_from="attention"),
        Family("Gemma2Model", **_GEMMA),  # type: ignore[arg-type]
        Family("Gemma3TextModel", rope_by_type=True, **_GEMMA),  # type: ignore[arg-type]
        Family(
            "Phi3Model",
            qkv=("qkv_proj",),
            gate_up=("gate_up_proj",),
            activation="activation_fn",
            window_from="config",
        ),
        Family("MixtralModel", window_from="config", experts=True),
        Family("Qwen3MoeModel", window_from="attention", experts=True),
    )
}
"""By class name of the base model; one entry adds a family."""
