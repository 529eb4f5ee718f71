"""Experts in vLLM: 3-D weights that are multiplied in one call for all tokens of a batch."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import ApplyMoEActivationConfig, apply_moe_activation
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from hqqtensor.integrations.vllm.loading import Gathering, Online, part_of
from hqqtensor.integrations.vllm.parts import routed
from hqqtensor.integrations.vllm.slices import cut_rows
from hqqtensor.tensor import HQQTensor


class ExpertsMethod(FusedMoEMethodBase):
    """Collects the experts of a layer, cuts out those (and of those what) this process has, and runs them.

    Experts that are not quantized are handed to vLLM's own method.
    """

    def __init__(self, moe: Any, online: Online, gathering: Gathering) -> None:
        super().__init__(moe)
        self.online, self.gathering = online, gathering

    def create_weights(
        self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
        params_dtype: torch.dtype, **extra_weight_attrs: Any,
    ) -> None:  # fmt: skip
        """Put this method's loader in the place of the layer's."""
        if self.moe.has_bias:
            raise ValueError(f"{self.online.prefix}: experts with a bias cannot be quantized in vLLM")
        self.sizes = (num_experts, hidden_size, intermediate_size_per_partition, params_dtype)
        self.attributes = extra_weight_attrs
        self.gathering.expect()
        self.arrived: list[tuple[str, Tensor]] = []
        for name in ("w13_weight", "w2_weight"):
            layer.register_parameter(name, nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False))
        layer.load_weights = self._load

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        for name, weight in weights:
            self.arrived.append((name, weight))
            yield "w2_weight" if _is_down(name) else "w13_weight"

    def process_weights_after_loading(self, layer: Any) -> None:
        """Turn what arrived into what runs; ValueError where experts are missing or do not fit."""
        super().process_weights_after_loading(layer)
        del layer.load_weights  # the class has its own again
        gate_up, down = self._stacked(layer)
        if gate_up is None or down is None:
            self.gathering.done(None)
            self._hand_over(layer)
            return
        layer.gate_up, layer.down = self._parts(layer, gate_up, down)
        self.arrived = []
        settings = FusedMoEQuantConfig.make(
            gemm1_alpha=layer.swiglu_alpha, gemm1_beta=layer.swiglu_beta, gemm1_clamp_limit=layer.swiglu_limit
        )
        self.activation_settings = ApplyMoEActivationConfig.from_configs(self.moe, settings)
        self.gathering.done(nn.ModuleList([*layer.gate_up, layer.down]))

    def _stacked(self, layer: Any) -> tuple[Tensor | None, Tensor | None]:
        """Gate and up, and down, each as a 3-D quantized weight; None where they are to stay dense."""
        out: list[Tensor | None] = []
        for is_down in (False, True):
            weights = {name: weight for name, weight in self.arrived if _is_down(name) == is_down}
            stacks = [weight for weight in weights.values() if weight.ndim == 3]
            whole = stacks[0] if stacks else self._stack(layer, weights, is_down)
            if isinstance(whole, HQQTensor) and whole.transposed:
                whole = whole.transpose(-1, -2)
            place = None if is_down else 0
            kept = self.online.quantized(whole, place, self.sizes[-1])
            out.append(kept if isinstance(kept, HQQTensor) else None)
        if (out[0] is None) != (out[1] is None):
            raise ValueError(f"{self.online.prefix}: experts are quantized whole, or not at all")
        return out[0], out[1]

    def _stack(self, layer: Any, weights: dict[str, Tensor], is_down: bool) -> Tensor:
        """Dense experts that are stored one by one, ``[E, N, K]``."""
        gate_up = [name for name in (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name) if name is not None]
        names = [layer.ckpt_down_proj_name] if is_down else gate_up
        rows = [[weights.get(f"{e}.{name}.weight") for name in names] for e in range(self.moe.num_logical_experts)]
        missing = [e for e, of_expert in enumerate(rows) if any(weight is None for weight in of_expert)]
        if missing:
            raise ValueError(f"{self.online.prefix}: the checkpoint lacks {'/'.join(names)} of experts {missing[:8]}")
        return torch.stack([torch.cat(of_expert) for of_expert in rows])  # type: ignore[arg-type]

    def _parts(self, layer: Any, gate_up: Any, down: Any) -> tuple[nn.ModuleList, nn.Module]:
        device, dtype = layer.w2_weight.device, self.sizes[-1]
        expert_map = layer.expert_map
        if expert_map is not None:
            numbers = (expert_map >= 0).nonzero().flatten().cpu()
            gate_up, down = gate_up[numbers], down[numbers]
        rank, size = self.moe.tp_rank, self.sizes[2]
        full, K = down.shape[-1], gate_up.shape[-1]
        if full % size:
            raise ValueError(f"{self.online.prefix}: {full} rows of an expert cannot be split into parts of {size}")
        start, end = (0, size) if full == size else (rank * size, (rank + 1) * size)
        halves = gate_up.shape[-2] // full
        pieces = (
            [gate_up] if full == size else [cut_rows(gate_up, h * full + start, h * full + end) for h in range(halves)]
        )
        parts = nn.ModuleList([part_of(piece, (0, K), device, dtype) for piece in pieces])
        return parts, part_of(down, (start, end), device, dtype)

    def _hand_over(self, layer: Any) -> None:
        """Let vLLM's method for dense experts load what arrived and run it."""
        del layer.w13_weight, layer.w2_weight
        method = UnquantizedFusedMoEMethod(self.moe)
        names = ("num_experts", "hidden_size", "intermediate_size_per_partition", "params_dtype")
        method.create_weights(layer, **dict(zip(names, self.sizes, strict=True)), **self.attributes)
        for _ in RoutedExperts.load_weights(layer, self.arrived):
            pass
        self.arrived = []
        layer.quant_method = method
        method.process_weights_after_loading(layer)

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig | None:
        """None: no kernel of vLLM's runs here."""
        return None

    def apply(
        self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The weighted sum of the experts' answers to ``x [T, K]``; experts of other processes add nothing."""
        ids = topk_ids.long()
        if layer.expert_map is not None:
            local = layer.expert_map[ids].long()
            ids = torch.where(local < 0, layer.local_num_experts, local)
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)

        def activate(hidden: Tensor) -> Tensor:
            out = hidden.new_empty(hidden.shape[0], self.sizes[2])
            return apply_moe_activation(layer.activation, out, hidden, activation_config=self.activation_settings)

        return routed(x, topk_weights, ids, layer.gate_up, layer.down, activate)


def _is_down(name: str) -> bool:
    return "down_proj" in name or "w2" in name.split(".")
