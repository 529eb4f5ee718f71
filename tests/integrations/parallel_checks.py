"""What ``test_tensor_parallel.py`` runs: transformers' tensor parallel on a quantized directory."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

from hqqtensor import HqqConfig, HQQTensor

SHAPE = LlamaConfig(
    vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64,
)  # fmt: skip


def load(folder: Path, **options: object) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def a_quantized_directory_is_loaded_in_shards() -> None:
    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank()), "WORLD_SIZE": "2"}
    folder, tokens = Path(os.environ["CHECKS"]), torch.arange(10).view(2, 5)
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        LlamaForCausalLM(SHAPE).save_pretrained(folder / "dense")
        for axis in (0, 1):
            load(folder / "dense", quantization_config=HqqConfig(4, 64, axis=axis)).save_pretrained(folder / str(axis))
    dist.barrier()
    for axis in (0, 1):
        one, model = (load(folder / str(axis), **o) for o in ({}, {"distributed_config": DistributedConfig(tp_size=2)}))
        weight = model.model.layers[0].self_attn.o_proj.weight
        assert isinstance(weight.to_local(), HQQTensor) and weight.to_local().shape == (256, 128)
        assert not weight.requires_grad
        with torch.no_grad():
            error = (model(tokens).logits - one(tokens).logits).abs().max()
        assert error < 1e-4, error
        answers = [m.generate(tokens, max_new_tokens=4, do_sample=False) for m in (model, one)]
        assert torch.equal(*answers)


def quantizing_while_distributing_is_refused() -> None:
    for config, text in ((DistributedConfig(tp_size=2), "quantize and save it"),):
        try:
            load(Path(os.environ["CHECKS"], "dense"), quantization_config=HqqConfig(4, 64), distributed_config=config)
        except ValueError as error:
            assert text in str(error), error
        else:
            raise AssertionError("nothing was raised")
