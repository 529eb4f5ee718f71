"""vLLM's engine in this process, and transformers on the same directory, as the tests call them."""

import gc
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # no process of its own: imports take a minute in each
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
import transformers
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

import hqqtensor

PROMPTS = [[1, 5, 9, 200], [7, 3], list(range(20, 60))]
NEW = 12

SIZES = {"vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(**options: Any) -> Any:
    """A random Llama whose query heads share one head of keys."""
    settings = {**SIZES, "intermediate_size": 256, "num_key_value_heads": 1, **options}
    return _random(transformers.LlamaForCausalLM, transformers.LlamaConfig(**settings))


def qwen3_moe() -> Any:
    """A random Qwen3-MoE of four experts."""
    config = transformers.Qwen3MoeConfig(
        **SIZES, intermediate_size=256, moe_intermediate_size=96, num_experts=4, num_experts_per_tok=2,
        num_key_value_heads=1, head_dim=64,
    )  # fmt: skip
    return _random(transformers.Qwen3MoeForCausalLM, config)


def _random(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    config.eos_token_id = None
    model = kind(config).eval()
    for parameter in model.parameters():  # larger than a fresh model's, so that the best token is clear
        if parameter.ndim > 1:
            parameter.data.mul_(4)
    return model


def of_vllm(directory: Path, lora: Path | None = None, **options: Any) -> list[list[int]]:
    """The tokens that vLLM chooses greedily after each of PROMPTS."""
    from vllm.lora.request import LoRARequest

    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "skip_tokenizer_init": True, **options}
    if lora is not None:
        settings |= {"enable_lora": True, "max_lora_rank": 8}
    llm = LLM(str(directory), **settings)
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    request = None if lora is None else LoRARequest("adapter", 1, str(lora))
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    tokens = [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, params, lora_request=request)]
    del llm
    cleanup_dist_env_and_memory()
    gc.collect()
    return tokens


def of_transformers(model: Any) -> list[list[int]]:
    """The same from transformers' ``generate`` of a model or of the directory of a quantized one, in float32.

    The directory is read by ``hqqtensor.load``: the transformers that vLLM requires is older than ours.
    """
    if isinstance(model, Path):
        model = hqqtensor.load(model, dtype=torch.float32)
    out = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        out.append(answer[0, len(prompt) :].tolist())
    return out
