"""``hqqtensor env``: versions, processor features, kernels and changes of other libraries, for bug reports."""

import argparse
import importlib
import importlib.metadata
import os
import platform
import warnings
from typing import Any

import torch

import hqqtensor
from hqqtensor.cli.output import print_json
from hqqtensor.integrations import changed_modules, patches
from hqqtensor.kernels import cpu
from hqqtensor.ops.backend import describe_backends
from hqqtensor.registration import without_torchao_notes

_PACKAGES = ("torchao", "safetensors", "transformers", "accelerate", "peft")
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


def collect_patches() -> list[dict[str, Any]]:
    """What hqqtensor changes in the libraries that are installed here, which are imported for that."""
    with warnings.catch_warnings(), without_torchao_notes():
        warnings.simplefilter("ignore")  # a patch that fails says so in its ``problem``
        for module in changed_modules():
            try:
                importlib.import_module(module)
            except Exception:  # not installed, or broken: then nothing in it is changed
                continue
    names = ("library", "version", "tested_with", "target", "reason", "problem")
    return [{name: getattr(patch, name) for name in names} for patch in patches.patches()]


def collect() -> dict[str, Any]:
    """Everything that the command shows, JSON-safe."""
    cuda = torch.cuda.is_available()
    return {
        "versions": {
            "hqqtensor": hqqtensor.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # with the kind of its build, which the package's metadata may lack
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
        "patches": collect_patches(),
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
    print_patches(facts["patches"])
    return 0


def print_patches(facts: list[dict[str, Any]]) -> None:
    """A line for each library that hqqtensor changes, and one for each change that could not be made."""
    print("changes of other libraries:")
    libraries = dict.fromkeys((fact["library"], fact["version"], fact["tested_with"]) for fact in facts)
    for library, version, tested_with in libraries:
        changes = [fact for fact in facts if fact["library"] == library]
        problems = [fact for fact in changes if fact["problem"] is not None]
        done = f"{len(changes) - len(problems)} of {len(changes)} in place"
        print(f"  {library:<14}{version}, tested with {tested_with}: {done}")
        for fact in problems:
            print(f"    {fact['target']}: {fact['problem']}; without it {fact['reason']} does not work")
