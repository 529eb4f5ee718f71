"""Other libraries' products of activations and packed weights, one file each.

A file has ``contenders(w)``: the library's ways to multiply by the float32 weight ``w`` ``[N, K]`` once packed. It
raises ``NotHere`` where the library is not installed.
"""

from torch import Tensor

from benchmarks.contender import Contender, NotHere
from benchmarks.peers import (
    aten,
    auto_round_lib,
    bitsandbytes_nf4,
    hqq_library,
    llama_cpp,
    onnx_runtime,
    quanto,
    vllm_operators,
)

PEERS = {
    "ATen": aten,
    "ONNX Runtime": onnx_runtime,
    "llama.cpp": llama_cpp,
    "auto-round-lib": auto_round_lib,
    "bitsandbytes": bitsandbytes_nf4,
    "vLLM": vllm_operators,
    "quanto": quanto,
    "hqq": hqq_library,
}


def all_peers(w: Tensor) -> tuple[list[Contender], dict[str, str]]:
    """The contenders of every peer that is installed, and why the others are left out."""
    found: list[Contender] = []
    missing: dict[str, str] = {}
    for name, module in PEERS.items():
        try:
            found += module.contenders(w)
        except NotHere as error:
            missing[name] = str(error)
    return found, missing
