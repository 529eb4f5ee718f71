"""``hqqtensor env``: versions, processor features and kernels, for bug reports."""

import argparse
import importlib.metadata
import os
import platform
from typing import Any

import torch

import hqqtensor
from hqqtensor.cli.output import print_json
from hqqtensor.kernels import cpu
from hqqtensor.ops.backend import describe_backends

_PACKAGES = ("torch", "torchao", "safetensors", "transformers")
_FLAGS = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512_vnni", "avx_vnni",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


def cpu_flags() -> list[str] | None:
    """Instruction sets of interest that the processor has; None where the system does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = [line for line in file if line.lower().startswith(("flags", "features"))]
    except OSError:
        return None
    present = set(lines[0].partition(":")[2].split()) if lines else set()
    return [flag for flag in _FLAGS if flag in present]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def collect() -> dict[str, Any]:
    """Everything that the command shows, JSON-safe."""
    cuda = torch.cuda.is_available()
    return {
        "versions": {
            "hqqtensor": hqqtensor.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "platform": platform.platform(),
        "cpu": {
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "flags": cpu_flags(),
            "kernels": cpu.instruction_set() if cpu.why_unavailable() is None else None,
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "backends": [
            {
                "name": status.name,
                "available": status.available,
                "reason": status.reason,
                "device_types": None if status.device_types is None else list(status.device_types),
            }
            for status in describe_backends()
        ],
    }


def run(args: argparse.Namespace) -> int:
    """Print what ``collect`` finds."""
    facts = collect()
    if args.json:
        print_json(facts)
        return 0
    for name, version in facts["versions"].items():
        print(f"{name:<14}{version or 'not installed'}")
    processor = facts["cpu"]
    flags = "unknown" if processor["flags"] is None else " ".join(processor["flags"]) or "none of interest"
    threads = f"{processor['cores']} cores, {processor['torch_threads']} torch threads"
    print(f"{'platform':<14}{facts['platform']}")
    print(f"{'cpu':<14}{processor['torch_capability']}, {threads}")
    print(f"{'cpu flags':<14}{flags}")
    print(f"{'cpu kernels':<14}{processor['kernels'] or 'none: the plain path serves the CPU'}")
    print(f"{'gpu':<14}{facts['gpu'] or 'none'}")
    print("backends, last to first in order of preference:")
    for backend in facts["backends"]:
        where = "any device" if backend["device_types"] is None else ", ".join(backend["device_types"])
        state = "available" if backend["available"] else f"not available: {backend['reason']}"
        print(f"  {backend['name']:<12}{where:<12}{state}")
    return 0
