"""The models, texts and adapters of ``benchmarks.qlora``."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hqqtensor import HqqConfig, HQQTensor, quantize_
from hqqtensor.diagnostics.language import token_windows

DOCLM = Path(__file__).parents[1] / "tests" / "assets" / "doclm"
MOE = "qwen3-moe"
MODELS = ("doclm", "smollm", MOE)
BASES = ("dense", "8", "4", "3", "2", "nf4")
OPTIONS = {
    "default": "the base is HqqConfig(bits), the library's default, in place of groups of 64 with plain scales",
    "calibrated": "the base is calibrated on the calibration text",
    "error": "adapters begin from the error of the weights",
    "seen": "adapters begin from the error of the outputs on the calibration text",
    "rounds": "the base is quantized again three times against the adapters, with error feedback after seen",
    "scales": "scales and zero points are trained with the adapters",
}
ROUNDS = 3
HELD_OUT, CALIBRATION = 60, 32
"""Windows of the text that are held out, then those for calibration; all others are trained on."""


class Text(NamedTuple):
    """Token ids int64 ``[windows, context]``; no window is in two of them."""

    held_out: Tensor
    calibration: Tensor
    train: Tensor


def check_row(row: str) -> None:
    """ValueError where ``row`` is not a base with options, joined by plus signs."""
    base, *options = row.split("+")
    if base not in BASES or set(options) - OPTIONS.keys():
        raise ValueError(f"{row}: must be one of {', '.join(BASES)}, then any of {', '.join(f'+{o}' for o in OPTIONS)}")
    if options and not base.isdigit():
        raise ValueError(f"{row}: options need a base of 8, 4, 3 or 2 bits")


def directory_of(name: str) -> Path:
    """The dense directory of "doclm" or "smollm"."""
    if name == "doclm":
        return DOCLM
    from hqqtensor.demo.models import smollm_dir

    return smollm_dir()


def text_of(name: str, context: int) -> Text:
    """doclm's validation text in three parts; random tokens for the mixture."""
    if name == MOE:
        ids = torch.randint(0, 4096, (12, context), generator=torch.Generator().manual_seed(0))
        return Text(ids[:2], ids[2:4], ids[4:])
    from transformers import AutoTokenizer

    windows = token_windows(
        AutoTokenizer.from_pretrained(directory_of(name)), (DOCLM / "valid.txt").read_text(), context
    )
    last = HELD_OUT + CALIBRATION
    return Text(windows[:HELD_OUT], windows[HELD_OUT:last], windows[last:])


def adapted(row: str, name: str, rank: int, text: Text) -> tuple[Any, int]:
    """The model with the weights of ``row`` and untrained adapters, and the bytes of its weights without them."""
    from peft import LoraConfig, get_peft_model

    from hqqtensor.integrations.peft import initialize_lora_from_error

    base, *options = row.split("+")
    batches = [{"input_ids": ids} for ids in text.calibration.split(4)]
    targets: dict[str, Any] = {"target_modules": "all-linear"}
    torch.manual_seed(0)
    if name == MOE:
        if options or base == "nf4":
            raise ValueError(f"{row}: the mixture has random weights; its rows are dense and bits alone")
        model = _mixture(base)
        targets["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
        targets["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
    else:
        model = _language_model(base, options, name, batches)
    size = sum(p.nbytes for p in model.parameters())
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, **targets))
    if {"error", "seen", "rounds"} & set(options):
        rounds = ROUNDS if "rounds" in options else 0
        seen = batches if "seen" in options else None
        initialize_lora_from_error(model, directory_of(name), batches=seen, rounds=rounds)
    return model, size


def _language_model(base: str, options: list[str], name: str, batches: list[dict[str, Tensor]]) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization: Any = None
    if base == "nf4":
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    elif base != "dense":
        quantization = HqqConfig(int(base)) if "default" in options else HqqConfig(int(base), 64)
    directory, later = directory_of(name), "calibrated" in options
    loading: dict[str, Any] = {"dtype": torch.float32, "quantization_config": None if later else quantization}
    model = AutoModelForCausalLM.from_pretrained(directory, **loading)
    if later:
        quantize_(model, quantization, calibration=batches)
    return model


def _mixture(base: str) -> Any:
    """Two layers of Qwen3-30B-A3B with a small vocabulary, in bfloat16 with random weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=2,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        norm_topk_prob=True, dtype=torch.bfloat16,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Qwen3MoeForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False)
    if base != "dense":
        quantize_(model, HqqConfig(int(base), 64))
        experts = model.model.layers[0].mlp.experts
        assert isinstance(experts.gate_up_proj, HQQTensor) and isinstance(experts.down_proj, HQQTensor)
    return model
