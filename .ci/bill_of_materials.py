"""Writes what code of others is in a wheel: ``python .ci/bill_of_materials.py UNPACKED_WHEEL``, for ``make wheel``.

The file is ``*.dist-info/sboms/hqqtensor.cdx.json``, CycloneDX 1.6, where PEP 770 has it. Libraries that auditwheel
copies into a wheel get a file from auditwheel, beside this one; so far it copies none. What is listed here is linked or
compiled into the library of kernels, and is looked for in its bytes.
"""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from datetime import UTC, datetime
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIBRARY = "hqqtensor/kernels/cpu/libhqqtensor_cpu.so"
LLVM = "Apache-2.0 WITH LLVM-exception"


def llvm_version() -> str:
    """Of the C++ library that zig links in: ``_LIBCPP_VERSION`` is 220108 for 22.1.8."""
    config = Path(sysconfig.get_path("purelib"), "ziglang/lib/libcxx/include/__config").read_text()
    number = int(re.findall(r"define _LIBCPP_VERSION (\d+)", config)[0])
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def included() -> list[tuple[str, str, str, bytes]]:
    """Name, version and license of each part, and bytes that the library has if the part is in it."""
    llvm, torch = llvm_version(), version("torch").partition("+")[0]
    return [
        ("libc++", llvm, LLVM, b"St3__1"),
        ("libc++abi", llvm, LLVM, b"terminating due to %s exception of type %s"),
        ("libunwind", llvm, LLVM, b"libunwind: malformed"),
        ("torch", torch, "BSD-3-Clause", b"torch/include/torch/csrc/stable/library.h"),  # its headers
    ]


def component(name: str, number: str, license: str, kind: str = "library") -> dict[str, Any]:
    entry: dict[str, Any] = {"type": kind, "bom-ref": f"{name}@{number}", "name": name, "version": number}
    entry["licenses"] = [{"expression": license}]
    if name in ("hqqtensor", "torch", "ziglang"):
        entry["purl"] = f"pkg:pypi/{name}@{number}"
    return entry


def compilers() -> list[dict[str, Any]]:
    command = [*shlex.split(os.environ.get("CXX", "c++")), "--version"]
    gcc = subprocess.check_output(command, text=True).splitlines()[0]
    return [
        {"type": "application", "name": "c++", "version": gcc},
        {"type": "application", "name": "ziglang", "version": version("ziglang")},
    ]


def bill(unpacked: Path, metadata: Path) -> dict[str, Any]:
    about = Parser().parsestr((metadata / "METADATA").read_text())
    wheel = component(about["Name"], about["Version"], about["License-Expression"])
    code = (unpacked / LIBRARY).read_bytes()
    library = {"type": "file", "bom-ref": LIBRARY, "name": LIBRARY}
    library |= {"hashes": [{"alg": "SHA-256", "content": hashlib.sha256(code).hexdigest()}]}
    parts = [component(name, number, license) for name, number, license, marker in included() if marker in code]
    absent = {name for name, *_ in included()} - {part["name"] for part in parts}
    if absent:
        raise SystemExit(f"{LIBRARY} shows no trace of {sorted(absent)}: is this the library that `make wheel` links?")
    built = datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), UTC)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": built.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "tools": {"components": compilers()},
            "component": wheel,
        },
        "components": [library, *parts],
        "dependencies": [
            {"ref": wheel["bom-ref"], "dependsOn": [LIBRARY]},
            {"ref": LIBRARY, "dependsOn": [part["bom-ref"] for part in parts]},
            *({"ref": part["bom-ref"]} for part in parts),
        ],
    }


def main() -> None:
    unpacked = Path(sys.argv[1])
    (metadata,) = unpacked.glob("*.dist-info")
    (metadata / "sboms").mkdir(exist_ok=True)
    text = json.dumps(bill(unpacked, metadata), indent=1)
    (metadata / "sboms" / "hqqtensor.cdx.json").write_text(text + "\n")


main()
