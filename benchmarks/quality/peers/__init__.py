"""The methods hqqtensor is compared with, one file each: ``methods()`` gives those that can run here."""

import importlib

from benchmarks.quality.method import Method

NAMES = (
    "rtn", "hqq_library", "torchao_hqq", "nf4_paper", "bitsandbytes_4bit", "quanto", "sinq_paper", "sinq_package",
    "llama_cpp", "gptq_paper", "awq_paper", "autoround_package",
)  # fmt: skip


def methods() -> tuple[list[Method], dict[str, str]]:
    """All peers' methods, and for each peer that is not installed the reason."""
    found: list[Method] = []
    missing: dict[str, str] = {}
    for name in NAMES:
        try:
            found += importlib.import_module(f"benchmarks.quality.peers.{name}").methods()
        except (ImportError, OSError) as error:
            missing[name] = str(error)
    return found, missing
