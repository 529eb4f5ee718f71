"""The input embedding and the output layer in vLLM, tied or not."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from hqqtensor.integrations.vllm.loading import Gathering, Online, check_matrix, part_of, placeholder
from hqqtensor.integrations.vllm.slices import cut_rows


class EmbeddingMethod(QuantizeMethodBase):
    """Looks rows up and multiplies with them; with tensor parallelism each process has a range of the vocabulary.

    A weight that is not quantized is handed to vLLM's own method.
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
        return self.online.quantized(weight, None, self.sizes[-1], is_embedding=True)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Turn what arrived into what runs. Tied layers have one parameter, and share it."""
        arrived = layer.weight.arrived
        if arrived.part is None:
            arrived.check(self.online.prefix)
        if arrived.part is None and arrived.is_dense:
            self.gathering.done(None)
            self._hand_over(layer, arrived)
            return
        if arrived.part is None:
            _, weight = arrived.weights[-1]
            indices = layer.shard_indices
            rows = cut_rows(weight, indices.org_vocab_start_index, indices.org_vocab_end_index)
            arrived.part = part_of(rows, (0, weight.shape[1]), layer.weight.device, self.sizes[-1])
            arrived.weights.clear()
        layer.part = arrived.part
        self.gathering.done(layer.part)

    def _hand_over(self, layer: Any, arrived: Any) -> None:
        method = UnquantizedEmbeddingMethod()
        layer.quant_method = method
        if arrived.dense_twin is not None:
            layer.weight = arrived.dense_twin.weight
        else:
            del layer.weight
            method.create_weights(layer, *self.sizes, **self.attributes)
            for _, weight in arrived.weights:
                layer.weight.weight_loader(layer.weight, weight)
            arrived.dense_twin = layer
        method.process_weights_after_loading(layer)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """The rows of the tokens ``input_``."""
        return layer.part.embedding(input_, self.sizes[-1])

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits of this process's part of the padded vocabulary; those of the padding are zero."""
        logits = layer.part(x, None)
        logits = nn.functional.pad(logits, (0, layer.num_embeddings_per_partition - logits.shape[-1]))
        return logits if bias is None else logits + bias
