"""A mixture of experts: 3-D expert weights are quantized like any other, and run on the packed codes.

python docs/examples/moe.py
"""

import tempfile

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from hqqtensor import HqqConfig


def main() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=256, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, **sizes)
    dense = tempfile.mkdtemp()
    MixtralForCausalLM(config).save_pretrained(dense)  # stands for a real one

    # Experts at 3 bits, attention at 6: a tag names the module, here the one that holds all experts of a layer.
    settings = HqqConfig(6, 64, dynamic_config={"experts": {"nbits": 3}})
    model = MixtralForCausalLM.from_pretrained(dense, quantization_config=settings)
    print(model.model.layers[0].mlp.experts.gate_up_proj)
    ids = torch.randint(3, 256, (1, 8))
    want = model(ids).logits
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        assert torch.allclose(model(ids).logits, want, atol=1e-4)
    print(model.generate(ids, max_new_tokens=4, do_sample=False).tolist())


if __name__ == "__main__":
    main()
