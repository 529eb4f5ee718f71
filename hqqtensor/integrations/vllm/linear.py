"""Linear layers in vLLM: one weight, or several joined ones that keep settings of their own."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod

from hqqtensor.integrations.vllm.loading import SHARDS, Gathering, Online, check_matrix, part_of, placeholder
from hqqtensor.integrations.vllm.parts import Parts
from hqqtensor.integrations.vllm.slices import cut_rows, row_ranges


class LinearMethod(LinearMethodBase):
    """Collects the weights of a layer, cuts out those of this process and multiplies with them.

    A layer of which nothing is quantized is handed to vLLM's own method.
    """

    def __init__(self, online: Online, gathering: Gathering) -> None:
        self.online, self.gathering = online, gathering

    def create_weights(
        self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **extra_weight_attrs: Any,
    ) -> None:  # fmt: skip
        """Register an empty ``weight`` that the loader's weights go through."""
        self.sizes = (input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype)
        self.attributes = extra_weight_attrs
        self.gathering.expect()
        placeholder(layer, "weight", params_dtype, self._load)

    def _load(self, shard: Any, weight: Tensor) -> Tensor:
        check_matrix(weight, self.online.prefix)
        place = SHARDS.get(shard, shard)
        return self.online.quantized(weight, place if isinstance(place, int) else None, self.sizes[-1])

    def process_weights_after_loading(self, layer: Any) -> None:
        """Turn what arrived into what runs; ValueError where weights are missing or do not fit."""
        arrived = layer.weight.arrived
        arrived.check(self.online.prefix, len(self.sizes[1]))
        if arrived.is_dense:
            self.gathering.done(None)
            _hand_over(layer, self.sizes, self.attributes, arrived.weights)
            return
        layer.parts = self._parts(layer, arrived.weights)
        arrived.weights.clear()
        self.gathering.done(layer.parts)

    def _parts(self, layer: Any, weights: list[tuple[Any, Tensor]]) -> Parts:
        local_columns, local_rows, _, _, dtype = self.sizes
        name = self.online.prefix
        parts: dict[int, Any] = {}
        for shard, weight in weights:
            place = SHARDS.get(shard, shard)
            places = list(range(len(local_rows))) if place is None else [place] if isinstance(place, int) else place
            sizes, full = [local_rows[p] for p in places], _stored_rows(layer) if shard is None else None
            ranges = row_ranges(weight.shape[0], sizes, full, layer.tp_rank, layer.tp_size, name)
            columns = _columns(weight.shape[1], local_columns, layer.tp_rank, name)
            pieces = [part_of(cut_rows(weight, *rows), columns, layer.weight.device, dtype) for rows in ranges]
            parts |= {places[0] + i: piece for i, piece in enumerate(pieces)}
        out = Parts([parts[place] for place in sorted(parts)])
        if sum(out.rows) != sum(local_rows):
            raise ValueError(f"{name}: the checkpoint has {sum(out.rows)} of {sum(local_rows)} rows of this layer")
        return out

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [..., K]`` times the transpose of the layer's weight, plus bias."""
        return layer.parts(x, bias)


def _stored_rows(layer: Any) -> list[int] | None:
    """Rows of query, key and value in a file that holds them as one weight; None for other layers."""
    if not hasattr(layer, "total_num_kv_heads"):
        return None
    heads, kv_heads = layer.total_num_heads, layer.total_num_kv_heads
    return [heads * layer.head_size, kv_heads * layer.head_size, kv_heads * layer.v_head_size]


def _columns(stored: int, local: int, rank: int, name: str) -> tuple[int, int]:
    if stored % local:
        raise ValueError(f"{name}: {stored} in_features cannot be split into parts of {local}")
    start = rank * local if stored != local else 0
    return start, start + local


def _hand_over(
    layer: Any, sizes: tuple[Any, ...], attributes: dict[str, Any], weights: list[tuple[Any, Tensor]]
) -> None:
    """Let vLLM's method for dense layers load what arrived and run it."""
    del layer.weight
    method = UnquantizedLinearMethod()
    method.create_weights(layer, *sizes, **attributes)
    for shard, weight in weights:
        layer.weight.weight_loader(layer.weight, weight, *([] if shard is None else [shard]))
    layer.quant_method = method
    method.process_weights_after_loading(layer)
