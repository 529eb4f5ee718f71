"""Quantize a model while it loads, save it, load it again, generate.

python docs/examples/quantize_hub_model.py [MODEL] [OUT]    MODEL: a hub name or a directory
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hqqtensor import HqqConfig, check_quantization_status

DOCLM = str(Path(__file__).parents[2] / "tests" / "assets" / "doclm")


def main(name: str = DOCLM, out: str | None = None) -> None:
    out = out or tempfile.mkdtemp()
    config = HqqConfig(4, 64, dynamic_config={"self_attn.v_proj": {"nbits": 6}})
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config, device_map="cpu")
    print(check_quantization_status(model))
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.save_pretrained(out)

    again = AutoModelForCausalLM.from_pretrained(out)
    ids = tokenizer("The kernel reads", return_tensors="pt", add_special_tokens=False)["input_ids"]
    texts = [m.generate(ids, max_new_tokens=12, do_sample=False) for m in (model, again)]
    assert torch.equal(*texts)
    print(tokenizer.decode(texts[0][0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
