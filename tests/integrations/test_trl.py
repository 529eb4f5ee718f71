"""TRL's SFTTrainer as its documentation uses it, over quantized weights. Needs ``pip install trl`` (not in CI)."""

from pathlib import Path

import pytest
import torch
import transformers as tf

from hqqtensor import HqqConfig, HQQTensor

pytest.importorskip("peft")
trl = pytest.importorskip("trl")
DOCLM = Path(__file__).parents[1] / "assets" / "doclm"


def test_sft_trainer_trains_adapters_of_a_quantized_model(tmp_path: Path) -> None:
    from datasets import Dataset
    from peft import LoraConfig

    tokenizer = tf.AutoTokenizer.from_pretrained(DOCLM)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lines = [line for line in (DOCLM / "valid.txt").read_text().split("\n") if len(line) > 80][:8]
    model = tf.AutoModelForCausalLM.from_pretrained(DOCLM, quantization_config=HqqConfig(4, 64), dtype=torch.float32)
    args = trl.SFTConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, max_length=32, learning_rate=1e-3, use_cpu=True,
        bf16=False, report_to=[], logging_steps=1, disable_tqdm=True, save_strategy="no", gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model, args=args, train_dataset=Dataset.from_dict({"text": lines}), processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    adapters = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_B" in n}
    codes = {n: p.qdata.clone() for n, p in trainer.model.named_parameters() if isinstance(p, HQQTensor)}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert adapters and all(not torch.equal(after[n], p) for n, p in adapters.items())
    assert codes and all(torch.equal(after[n].qdata, q) for n, q in codes.items())
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
