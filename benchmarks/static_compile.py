"""Compile Triton kernels for GPUs that are not there, and read what came out: machine code, registers, memory."""

import hashlib
import inspect
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


SPIN = 12
"""Loops of so few instructions wait for a barrier; they belong to the loop around them."""


@dataclass(frozen=True)
class Limits:
    """An architecture, and the device whose figures stand for it: bytes/s, Hz, dense 16-bit operations a second."""

    device: str
    processors: int
    bandwidth: float
    clock: float
    tensor: float
    warp: int
    registers: int
    warps: int
    blocks: int
    shared: int
    issue: float  # instructions of a whole warp a clock a processor


# Vendors' data sheets: NVIDIA A100 80 GB SXM, H100 SXM, B200; AMD MI300X. CDNA issues a wave of 64 over four clocks.
LIMITS = {
    "sm_80": Limits("A100", 108, 2.039e12, 1.41e9, 312e12, 32, 65536, 64, 32, 164 << 10, 4),
    "sm_90": Limits("H100", 132, 3.35e12, 1.755e9, 989e12, 32, 65536, 64, 32, 228 << 10, 4),
    "sm_100": Limits("B200", 148, 8.0e12, 1.85e9, 2250e12, 32, 65536, 64, 32, 228 << 10, 4),
    "gfx942": Limits("MI300X", 304, 5.3e12, 2.1e9, 1307e12, 64, 4 * 512 * 64, 32, 32, 64 << 10, 1),
}


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes. loop: mnemonics of its main loop, or of the whole kernel where it has none."""

    registers: int
    spills: int
    shared: int
    loop: Counter[str]
    looped: bool

    @property
    def instructions(self) -> int:
        return self.loop.total()

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.loop.items() if re.search(pattern, name))

    def occupancy(self, arch: str, warps: int) -> float:
        """Share of the processor's warps that can be resident."""
        limits = LIMITS[arch]
        granule = 8 * limits.warp
        used = -(-max(self.registers, 16) * limits.warp // granule) * granule * warps
        blocks = min(limits.blocks, limits.warps // warps, limits.registers // used)
        if self.shared:
            blocks = min(blocks, limits.shared // (self.shared + 1024))
        return blocks * warps / limits.warps

    def global_loads(self) -> dict[int, int]:
        """Loads from global memory in the loop by their width in bits."""
        found: Counter[int] = Counter()
        for name, n in self.loop.items():
            if name.startswith(("LDG.", "LDGSTS.")):
                width = re.search(r"\.(128|64|U16|S16|U8|S8)\b", name)
                found[{"U16": 16, "S16": 16, "U8": 8, "S8": 8}.get(width[1], 0) or int(width[1]) if width else 32] += n
            elif name.startswith(("global_load", "buffer_load")):
                words = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16}
                kind = name.removeprefix("global_load_").removeprefix("buffer_load_")
                found[next((bits for word, bits in words.items() if kind.startswith(word)), 8)] += n
        return dict(found)

    def tensor_instruction(self) -> str:
        """The product instruction used most, "" where there is none."""
        found = [
            (n, name) for name, n in self.loop.items() if re.match(r"(HMMA|HGMMA|IMMA|UTCHMMA|QGMMA|v_mfma)", name)
        ]
        return max(found)[1] if found else ""


def compile_kernel(
    function: Any, types: dict[str, str], constants: dict[str, Any], arch: str, options: dict[str, int],
    aligned: tuple[str, ...] = (), whole: bool = False,
) -> Compiled:  # fmt: skip
    """Compile for ``arch``. types: Triton's type of each argument that is no constant; pointers, and the integers in
    ``aligned``, are taken to be multiples of 16. whole: count the whole kernel, not a loop."""
    names = [p.name for p in function.params]
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    hints: dict[tuple[int, ...], list[list[object]]] = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in constants and (types[name].startswith("*") or name in aligned)
    }
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=hints)
    key = hashlib.sha256(
        f"{_intermediate(source, target, options)} {target} {sorted(options.items())} {whole} {_READER}".encode()
    ).hexdigest()
    found = _results.get(key)
    if found is None:
        kernel = triton.compile(source, target=target, options=options)
        if arch.startswith("gfx"):
            found = _read_amd(kernel.asm["amdgcn"], kernel.metadata.shared, whole)
        else:
            found = _read_nvidia(kernel.asm["cubin"], kernel.metadata.shared, whole)
        _remember(key, found)
    return found


def _intermediate(source: ASTSource, target: GPUTarget, options: dict[str, int]) -> str:
    """Triton's intermediate text of a kernel after its own first passes, without places in the source: all that the
    later stages see, so what compiles to the same text need not be compiled twice, whichever source it came from."""
    backend = make_backend(target)
    parsed = backend.parse_options({**options, **source.parse_options()})
    stages: dict[str, Any] = {}
    backend.add_stages(stages, parsed, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    codegen = backend.get_codegen_implementation(parsed)
    module = source.make_ir(target, parsed, codegen, backend.get_module_map(), context)
    return str(stages["ttir"](module, {}).str_nodebug())


_results: dict[str, Compiled] = {}
_file: Path | None = None


def keep_results(file: Path) -> None:
    """Take what was compiled before from ``file``, and add to it; runs for several targets can be merged so, one after
    another, and a run that was cut off goes on."""
    global _file
    _file = file
    _results.update(_read(file))


def _read(file: Path) -> dict[str, Compiled]:
    if not file.exists():
        return {}
    content = json.loads(file.read_text())
    return {key: Compiled(**{**entry, "loop": Counter(entry["loop"])}) for key, entry in content.items()}


def _remember(key: str, found: Compiled) -> None:
    _results[key] = found
    if _file is not None:
        _file.parent.mkdir(parents=True, exist_ok=True)
        merged = {**_read(_file), **_results}
        temporary = _file.with_name(f"{_file.name}.{os.getpid()}")
        temporary.write_text(json.dumps({name: vars(entry) for name, entry in merged.items()}))
        os.replace(temporary, _file)


def _read_nvidia(cubin: bytes, shared: int, whole: bool) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            lines.append(instruction[1])
    loops = [
        (labels[jump[1]], i)
        for i, line in enumerate(lines)
        if (jump := re.search(r"BRA.*?`\((\.L_x_\d+)\)", line)) and labels.get(jump[1], i) < i - SPIN
    ]
    body, looped = _main(lines, [] if whole else loops, r"MMA")
    names = Counter(re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in body)
    spills = sum(1 for line in lines if re.search(r"\b(STL|LDL)\b", line))
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", usage))
    return Compiled(registers, spills, shared, names, looped)


def _read_amd(text: str, shared: int, whole: bool) -> Compiled:
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        line, _, comment = line.partition(";")
        line = line.strip()
        if label := re.match(r"(\.LBB\w+):", line):
            if "Loop Header" in comment:  # blocks that are seldom run lie behind the kernel and jump back as well
                labels[label[1]] = len(lines)
        elif re.match(r"(v_|s_|ds_|global_|buffer_|flat_)", line):
            lines.append(line)
    loops = [
        (labels[jump[1]], i)
        for i, line in enumerate(lines)
        if (jump := re.match(r"s_c?branch\w*\s+(\.LBB\w+)", line)) and labels.get(jump[1], i) < i - SPIN
    ]
    body, looped = _main(lines, [] if whole else loops, r"v_mfma")

    def field(name: str) -> int:
        found = re.search(rf"\.{name}: *(\d+)", text)
        return int(found[1]) if found else 0

    spills = field("vgpr_spill_count") + field("sgpr_spill_count")
    return Compiled(field("vgpr_count"), spills, shared, Counter(line.split()[0] for line in body), looped)


def _main(lines: list[str], loops: list[tuple[int, int]], product: str) -> tuple[list[str], bool]:
    """The innermost loop with most products, of such the longest; the whole kernel where there is no loop."""
    inner = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    if not inner:
        return lines, False
    a, b = max(
        inner,
        key=lambda span: (sum(bool(re.search(product, s)) for s in lines[span[0] : span[1] + 1]), span[1] - span[0]),
    )
    return lines[a : b + 1], True


_READER = triton.__version__ + "".join(inspect.getsource(read) for read in (_read_nvidia, _read_amd, _main))
