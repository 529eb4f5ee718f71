"""LoRA over 2-bit weights, trained to say what the dense model says (the idea of HQQ+), then merged.

python docs/examples/finetune_lora.py [STEPS]    needs peft
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from hqqtensor import HqqConfig
from hqqtensor.diagnostics.language import compare_language_models, token_windows

DOCLM = Path(__file__).parents[2] / "tests" / "assets" / "doclm"


def main(steps: int = 200, batch: int = 4, context: int = 256, test_windows: int = 120) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(DOCLM)
    windows = token_windows(tokenizer, (DOCLM / "valid.txt").read_text(), context)
    test, train = windows[:test_windows], windows[test_windows:]
    teacher = AutoModelForCausalLM.from_pretrained(DOCLM, dtype=torch.float32)
    config = HqqConfig(2, 64)
    student = AutoModelForCausalLM.from_pretrained(DOCLM, dtype=torch.float32, quantization_config=config)
    report = compare_language_models(teacher, student, test)
    print(f"perplexity: dense {report.perplexity_before:.2f}, 2 bits {report.perplexity_after:.2f}")

    student = get_peft_model(student, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    student.train()
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        ids = train[torch.randint(len(train), (batch,))]
        with torch.no_grad():
            want = F.log_softmax(teacher(ids).logits, -1)
        loss = F.kl_div(F.log_softmax(student(ids).logits, -1), want, reduction="none", log_target=True).sum(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    report = compare_language_models(teacher, student, test)
    extra = sum(p.numel() for p in trained)
    print(f"with adapters of {extra / 1e6:.2f} M parameters after {steps} steps: {report.perplexity_after:.2f}")
    report = compare_language_models(teacher, student.merge_and_unload(), test)
    print(f"merged and quantized to 2 bits again: {report.perplexity_after:.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
