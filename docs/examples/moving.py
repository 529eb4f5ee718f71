"""What you had with hqq, transformers' HqqConfig, bitsandbytes or torchao, and what to write now. It runs without them
(but for torchao, which hqqtensor is built on).

python docs/examples/moving.py
"""

import sys
import tempfile
from pathlib import Path

import torch
import transformers
from torchao.quantization import FqnToConfig
from torchao.quantization import quantize_ as torchao_quantize
from transformers import AutoModelForCausalLM

from hqqtensor import HqqConfig, HQQTensor, hqq_weight_only, quantize_
from hqqtensor.integrations.transformers import register

DOCLM = str(Path(__file__).parents[2] / "tests" / "assets" / "doclm")


def report(title: str, model: torch.nn.Module) -> None:
    weights = [p for p in model.parameters() if isinstance(p, HQQTensor)]
    assert weights
    bits = sum(p.nbytes for p in weights) * 8 / sum(p.numel() for p in weights)
    print(f"{title}: {len(weights)} weights, {bits:.2f} bits each, e.g. {weights[0].describe()}")


def main(name: str = DOCLM) -> None:
    def load(**options: object) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(name, device_map="cpu", **options)

    # hqq: HQQLinear(layer, BaseQuantizeConfig(nbits=4, group_size=64)) for each layer
    model = load()
    quantize_(model, hqq_weight_only(4, 64))
    report("hqq", model)
    # ... or with the dict that BaseQuantizeConfig made
    nested = {"weight_quant_params": {"nbits": 3, "group_size": 64, "axis": 1}, "scale_quant_params": None}
    model = load()
    quantize_(model, HqqConfig(weight_quant_params=nested, solver="hqq"))  # the published solver
    report("hqq, its dict and solver", model)

    # transformers: the line stays as it is
    register(hqq=True)  # needed only where the hqq package is installed
    report("transformers", load(quantization_config=transformers.HqqConfig(nbits=4, group_size=64)))

    # bitsandbytes: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    report("bitsandbytes", load(quantization_config=HqqConfig(4, 64, format="nf4", quant_scale=True)))
    # ... or integers with zero points, which err less
    report("bitsandbytes, integers", load(quantization_config=HqqConfig(4, 64, quant_scale=True, quant_zero=True)))

    # torchao: quantize_(model, Int4WeightOnlyConfig(group_size=64))
    model = load()
    torchao_quantize(model.model, HqqConfig(4, 64))
    report("torchao", model)
    # ... and with transformers: TorchAoConfig(FqnToConfig({...: Int8WeightOnlyConfig()}))
    by_name = FqnToConfig({r"re:.*self_attn\..*": HqqConfig(8, 64), "_default": HqqConfig(4, 64)})
    model = load(quantization_config=transformers.TorchAoConfig(by_name))
    report("torchao by name", model)

    directory = tempfile.mkdtemp()
    model.save_pretrained(directory)
    again = AutoModelForCausalLM.from_pretrained(directory)
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in model.named_parameters())


if __name__ == "__main__":
    main(*sys.argv[1:])
