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
    if type(linear) is not nn.Linear:
        raise NotServed(f"{where} is not an nn.Linear, but a {type(linear).__name__}")
    _add_weight(decoder, i, role, weight, linear.bias, where)


def _add_weight(decoder: Decoder, i: int, role: LinearRole, weight: Any, bias: Tensor | None, where: str) -> None:
    """A projection, or a stack of experts' ones; ``NotServed`` for weights that decoders have no product for."""
    if isinstance(weight, HQQTensor):
        int8 = weight.activation == "int8"
        if weight.transposed or (weight.axis == 0 and (int8 or weight.rank == 3)):
            kind = "8-bit activations and axis 0" if int8 else "experts of axis 0"
            raise NotServed(f"{where} has {'a transposed weight' if weight.transposed else kind}")
        digits = 1 if int8 else 3 if weight.dtype == torch.float32 else 2
        decoder.linear(i, role, weight.operand(), bias, weight.act_pre_scale, digits, weight.rotation)
    elif type(weight) in (Tensor, nn.Parameter) and weight.shape[-1] % 16 == 0 and weight.is_contiguous():
        decoder.dense(i, role, weight, bias)
    else:
        shape = list(getattr(weight, "shape", ()))
        what = "neither quantized nor contiguous with a multiple of 16 inputs"
        raise NotServed(f"{where} is a {type(weight).__name__} {shape}, {what}")


def _add_experts(decoder: Decoder, i: int, mlp: Any, name: str) -> None:
    """A block that chooses experts for each token."""
    router: Any = getattr(mlp, "gate", None)
    experts = getattr(mlp, "experts", None)
    if router is None or experts is None:
        raise NotServed(f"{name} is a {type(mlp).__name__} without experts")
    weight = router.weight
    dense = weight.dequantize() if isinstance(weight, HQQTensor) else weight  # small, and read in float32
    decoder.router(i, dense, router.top_k, getattr(router, "norm_topk_prob", True))
    roles: list[tuple[str, LinearRole]] = [("gate_up_proj", "experts_gate_up"), ("down_proj", "experts_down")]
    for leaf, role in roles:
        weight = getattr(experts, leaf)
        if getattr(weight, "ndim", 0) != 3:
            raise NotServed(f"{name}.experts.{leaf} is no stack of weights, but a {type(weight).__name__}")
        _add_weight(decoder, i, role, weight, None, f"{name}.experts.{leaf}")


def _norm(norm: Any, where: str, family: Family) -> Tensor:
    if not type(norm).__name__.endswith("RMSNorm"):
        raise NotServed(f"{where} is a {type(norm).__name__}, not an RMSNorm")
    weight: Tensor = norm.weight.detach().float()
    return 1 + weight if family.norm_plus_one else weight


def _eps(norm: Any) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
