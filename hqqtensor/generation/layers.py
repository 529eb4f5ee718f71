"""From the modules of a model to the decoder that computes the same."""

from typing import Any

import torch
from torch import Tensor, nn

from hqqtensor.generation.angles import types_of
from hqqtensor.generation.families import Family
from hqqtensor.ops.backend import chosen, decoder_maker
from hqqtensor.ops.decoder import Decoder, DecoderShape, LinearRole, NormRole
from hqqtensor.tensor import HQQTensor

GATES = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}
"""Activations by the name of their class."""


class NotServed(Exception):
    """A model, or a part of it, for which there is no decoder; the text says which and why."""


def build(base: nn.Module, family: Family) -> Decoder:
    """The decoder of a base model's layers and final norm; ``NotServed`` with the module and the reason."""
    make = decoder_maker("cpu")
    if make is None:
        raise NotServed(f"the backend {chosen()!r} has no decoder for the CPU")
    shape = _shape(base, family)
    try:
        decoder = make(shape)
        for i, layer in enumerate(base.layers):  # type: ignore[arg-type]
            _add_layer(decoder, i, layer, base.config, family)
        decoder.norm(0, "final", _norm(base.norm, "norm", family))
    except RuntimeError as error:
        raise NotServed(str(error)) from None
    return decoder


def dtype_of(base: nn.Module) -> torch.dtype:
    """The dtype of the hidden states."""
    return base.norm.weight.dtype  # type: ignore[union-attr, return-value]


def _shape(base: Any, family: Family) -> DecoderShape:
    config, first = base.config, base.layers[0]
    attention, mlp = first.self_attn, first.mlp
    if family.experts:
        mlp = getattr(mlp, "experts", None)
    gate = GATES.get(type(getattr(mlp, family.activation, None)).__name__)
    if gate is None:
        raise NotServed(f"layers.0.mlp has no {family.activation} of {sorted(GATES)}")
    return DecoderShape(
        layers=len(base.layers),
        hidden=base.norm.weight.shape[0],
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        intermediate=mlp.down_proj.shape[-1] if family.experts else mlp.down_proj.in_features,
        eps=_eps(first.get_submodule(family.input_norm)),
        scaling=attention.scaling,
        softcap=getattr(attention, "attn_logit_softcapping", None) or 0.0,
        gate=gate,
    )


def _add_layer(decoder: Decoder, i: int, layer: Any, config: Any, family: Family) -> None:
    name, attention = f"layers.{i}", layer.self_attn
    rope = types_of(config, family).index(config.layer_types[i]) if family.rope_by_type else 0
    decoder.set_layer(i, family.window(attention, config), rope)
    norms: list[tuple[NormRole, str | None]] = [
        ("input", family.input_norm),
        ("attention_out", family.attention_out_norm),
        ("mlp", family.mlp_norm),
        ("mlp_out", family.mlp_out_norm),
        ("q", "self_attn.q_norm" if hasattr(attention, "q_norm") else None),
        ("k", "self_attn.k_norm" if hasattr(attention, "k_norm") else None),
    ]
    for role, path in norms:
        if path is not None:
            decoder.norm(i, role, _norm(layer.get_submodule(path), f"{name}.{path}", family))
    for path in (*(f"self_attn.{p}" for p in family.qkv), "self_attn.o_proj"):
        _add_linear(decoder, i, layer, path, name)
    if family.experts:
        _add_experts(decoder, i, layer.mlp, f"{name}.mlp")
        return
    for path in (*(f"mlp.{p}" for p in family.gate_up), "mlp.down_proj"):
        _add_linear(decoder, i, layer, path, name)


def _add_linear(decoder: Decoder, i: int, layer: nn.Module, path: str, name: str) -> None:
    linear, where = layer.get_submodule(path), f"{name}.{path}"
    role: LinearRole = path.rpartition(".")[2].removesuffix("_proj")  # type: ignore[assignment]
    weight = getattr(linear, "weight", None)
    if type(linear) is not nn.Linear or not isinstance(weight, HQQTensor):
        kind = type(linear).__name__
        raise NotServed(f"{where} is not an nn.Linear with a quantized weight, but a {kind} of {type(weight).__name__}")
    decoder.linear(i, role, weight.operand(), linear.bias, weight.act_pre_scale, _digits(weight, where))


def _digits(weight: HQQTensor, where: str) -> int:
    """Digits that the activations are quantized to; ``NotServed`` for weights that decoders have no product for."""
    if weight.rotation or weight.axis == 0 or weight.transposed:
        what = "rotated inputs" if weight.rotation else "axis 0" if weight.axis == 0 else "a transposed weight"
        raise NotServed(f"{where} has {what}")
    exact = 3 if weight.dtype == torch.float32 else 2
    return 1 if weight.activation == "int8" else exact


def _add_experts(decoder: Decoder, i: int, mlp: Any, name: str) -> None:
    """A block that chooses experts for each token."""
    router: Any = getattr(mlp, "gate", None)
    experts = getattr(mlp, "experts", None)
    if router is None or experts is None or isinstance(router.weight, HQQTensor):
        raise NotServed(f"{name} is a {type(mlp).__name__} without experts, or with a quantized router")
    decoder.router(i, router.weight, router.top_k, getattr(router, "norm_topk_prob", True))
    roles: list[tuple[str, LinearRole]] = [("gate_up_proj", "experts_gate_up"), ("down_proj", "experts_down")]
    for leaf, role in roles:
        weight = getattr(experts, leaf)
        if not isinstance(weight, HQQTensor) or weight.rank != 3:
            raise NotServed(f"{name}.experts.{leaf} is no stack of quantized weights, but a {type(weight).__name__}")
        decoder.linear(i, role, weight.operand(), None, weight.act_pre_scale, _digits(weight, f"{name}.experts.{leaf}"))


def _norm(norm: Any, where: str, family: Family) -> Tensor:
    if not type(norm).__name__.endswith("RMSNorm"):
        raise NotServed(f"{where} is a {type(norm).__name__}, not an RMSNorm")
    weight: Tensor = norm.weight.detach().float()
    return 1 + weight if family.norm_plus_one else weight


def _eps(norm: Any) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
