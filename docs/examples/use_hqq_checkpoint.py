"""Use a checkpoint of the hqq library: read it, convert it, and go back.

python docs/examples/use_hqq_checkpoint.py [DIR]    DIR: config.json with model.safetensors or qmodel.pt
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from hqqtensor import HQQTensor
from hqqtensor.cli import main as hqqtensor
from hqqtensor.integrations.transformers import register

DOCLM = str(Path(__file__).parents[2] / "tests" / "assets" / "doclm")


def main(directory: str | None = None) -> None:
    work = Path(tempfile.mkdtemp())
    if directory is None:  # make one
        directory = str(work / "hqq")
        plain = ["--group-size", "64", "--embeddings", "none"]  # what hqq has a form for
        assert hqqtensor(["quantize", DOCLM, str(work / "q"), "--bits", "3", *plain, "--json"]) == 0
        assert hqqtensor(["convert", str(work / "q"), directory, "--to", "hqq"]) == 0

    # Any layout, also qmodel.pt, to one that from_pretrained and load_model read without repacking:
    assert hqqtensor(["convert", directory, str(work / "ours")]) == 0
    model = AutoModelForCausalLM.from_pretrained(work / "ours")
    quantized = [name for name, p in model.named_parameters() if isinstance(p, HQQTensor)]
    print(len(quantized), "quantized weights, e.g.", quantized[0])

    if (Path(directory) / "model.safetensors").is_file():  # flat safetensors need no conversion
        register(hqq=True)  # needed only where the hqq package is installed
        direct = AutoModelForCausalLM.from_pretrained(directory)
        assert all(torch.equal(direct.get_parameter(n), model.get_parameter(n)) for n in quantized)


if __name__ == "__main__":
    main(*sys.argv[1:])
