"""What a user does with the wheel: README's lines, every command, a product on every instruction set.

Run by ``make wheel-test`` with the Python of a fresh environment that the wheel was installed into.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
from fresh_python import run_fresh  # noqa: E402

DOCLM = ROOT / "tests" / "assets" / "doclm"
PRODUCT = """
import torch, hqqtensor
from hqqtensor.kernels import cpu
w = hqqtensor.HQQTensor.from_hp(torch.randn(96, 256), hqqtensor.HqqConfig(4, 64))
for M in (1, 3, 40):
    x = torch.randn(M, 256)
    torch.testing.assert_close(torch.nn.functional.linear(x, w), x @ w.dequantize().T, rtol=1e-4, atol=1e-4)
print("products on", cpu.instruction_set())
"""

AVX2 = {"avx2", "fma", "f16c", "bmi2"}
AVX512 = {*AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
NEEDED: dict[str, set[str]] = {
    "portable": set(), "avx2": AVX2, "avx512": AVX512, "amx": {*AVX512, "amx_tile", "amx_int8", "amx_bf16"}
}  # fmt: skip
"""Instruction sets, and the processor's features that each needs."""


def run(*command: str, code: int = 0, **env: str) -> str:
    """The output of a command; ends the test where the exit code is another."""
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    if done.returncode != code:
        raise SystemExit(f"{command} ended with {done.returncode}, not {code}:\n{done.stdout}\n{done.stderr}")
    return done.stdout + done.stderr


def check_a_model_through_the_commands() -> str:
    """Quantize, inspect, evaluate and convert one model, each by its command; what `eval` printed."""
    run("hqqtensor", "quantize", str(DOCLM), "small", "--bits", "4", "--group-size", "64")
    run("hqqtensor", "inspect", "small")
    text = str(DOCLM / "valid.txt")
    evaluated = run("hqqtensor", "eval", "small", "--original", str(DOCLM), "--text", text, "--max-tokens", "512")
    run("hqqtensor", "convert", "small", "theirs", "--to", "hqq")
    run("hqqtensor", "convert", "theirs", "ours")
    run("hqqtensor", "quantize", str(DOCLM), "nowhere", "--preset", "3", "--dry-run")
    run("hqqtensor", "recommend", str(DOCLM), "--memory", "8MB", "--seconds", "1")
    run("hqqtensor", "compare", "small", "ours", "--text", text, "--max-tokens", "512")
    run("hqqtensor", "generate", "small", "-p", "The list", "--max-tokens", "4")
    run("hqqtensor", "bench", "small", "--new-tokens", "4", "--rounds", "1")
    run("hqqtensor", "card", "small", "-o", "small/README.md")
    check_says("has no chat template", 2, "chat", "small")
    check_says("pip install 'hqqtensor[serve]'", 1, "serve", "small")
    check_says("pip install 'hqqtensor[report]'", 1, "report", "small")
    return evaluated


def check_says(message: str, code: int, *arguments: str) -> None:
    """End the test where a command that cannot run here does not say why."""
    if message not in (said := run("hqqtensor", *arguments, code=code)):
        raise SystemExit(f"hqqtensor {arguments} says {said!r}, not {message!r}")


def check_the_bill_of_materials() -> None:
    """The wheel says what code of others is in its library: by the hash of this very file, in the format's terms."""
    files = {str(file): file for file in distribution("hqqtensor").files or ()}
    (name,) = (name for name in files if name.endswith(".dist-info/sboms/hqqtensor.cdx.json"))
    bill = json.loads(files[name].read_text())
    if (bill["bomFormat"], bill["specVersion"]) != ("CycloneDX", "1.6"):
        raise SystemExit(f"{name} is {bill['bomFormat']} {bill['specVersion']}")
    described = bill["metadata"]["component"]["version"], bill["components"][0]["hashes"][0]["content"]
    library = Path(str(files[bill["components"][0]["name"]].locate()))
    installed = distribution("hqqtensor").version, hashlib.sha256(library.read_bytes()).hexdigest()
    if described != installed:
        raise SystemExit(f"{name} describes {described}, installed is {installed}")
    # Shared libraries that auditwheel copied in would be a folder of their own, and a bill of auditwheel's.
    shared = [file for file in files if re.search(r"\.so(\.|$)", file) and file != bill["components"][0]["name"]]
    if shared:
        raise SystemExit(f"the wheel has libraries that {name} does not name: {shared}")
    print("bill of materials:", *(f"{part['name']} {part['version']}," for part in bill["components"][1:]))


def check_what_is_installed() -> None:
    """The import, README's lines, products on every instruction set, and commands that need no model."""
    python = sys.executable
    installed = Path(run(python, "-c", "import hqqtensor; print(hqqtensor.__file__)").split()[-1])
    if ROOT / "hqqtensor" in installed.parents:
        raise SystemExit(f"hqqtensor comes from the checkout, {installed}, not from the wheel")
    check_the_bill_of_materials()
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        run(python, "-c", block)
        print("README: a block of", len(block.splitlines()), "lines runs")
    flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    for name, needed in NEEDED.items():
        has = needed <= flags
        done = run_fresh(PRODUCT, HQQTENSOR_CPU=name)
        # Of AMX the system may say no where the processor says yes.
        if (has and done.returncode and name != "amx") or (
            not has and "but this processor lacks it" not in done.stderr
        ):
            raise SystemExit(f"{name}: exit code {done.returncode}, processor {sorted(needed & flags)}: {done.stderr}")
        print(f"{name}: {'not on this machine' if done.returncode else done.stdout.strip()}")
    print(run("hqqtensor", "--version").strip())
    run("hqqtensor", "env")
    for shell in ("bash", "zsh", "fish"):
        run("hqqtensor", "completion", shell)
    run("hqqtensor", "quantize", "nowhere", "out", code=2)


def main() -> None:
    compilers = [name for name in ("cc", "c++", "gcc", "g++", "clang", "clang++", "ninja") if shutil.which(name)]
    if compilers:
        raise SystemExit(f"{compilers} are in PATH: this test is about a machine without a compiler")
    work = Path(tempfile.mkdtemp())
    os.chdir(work)
    # Each process spends most of its time in imports, on one core: so two run at a time.
    with ThreadPoolExecutor(1) as pool:
        evaluated = pool.submit(check_a_model_through_the_commands)
        check_what_is_installed()
        print(evaluated.result())
    shutil.rmtree(work)
    print("the wheel works")


main()
