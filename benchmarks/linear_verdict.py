"""What a run of ``benchmarks.cpu_linear`` says about the aims for one linear layer."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.aims import aim
from benchmarks.timing import interleaved
from hqqtensor import HqqConfig, HQQTensor
from hqqtensor.ops.packed import flat

Cell = dict[str, Any]
MAIN_SHAPE = [11008, 4096]
NOISE = 1.03
"""What two equal runs may differ by, where an aim says "no slower"."""


def _fastest(rows: list[dict[str, Any]], take: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    return min(filter(take, rows), key=lambda r: r["ms"], default=None)


def _decode(cell: Cell) -> Iterator[dict[str, Any]]:
    """M=1 on the main shape, for each dtype of the activations."""
    rows = {r["name"]: r for r in cell["rows"]}
    peer = _fastest(cell["rows"], lambda r: r["kind"] == "peer")
    for dtype in ("fp32", "bf16"):
        base = rows.get(f"4-bit {dtype}")
        if base is None:
            continue
        share = base["of read bandwidth"]
        yield aim(f"M=1, 4-bit g64 {dtype}: >= 85 % of the read bandwidth", f"{share:.0%}", share >= 0.85)
        if peer:
            ratio = peer["ms"] / base["ms"]
            yield aim(
                f"M=1, 4-bit g64 {dtype}: >= 1.4 x the fastest peer", f"{ratio:.2f} x ({peer['name']})", ratio >= 1.4
            )
        limits = (("3-bit", 0.85), ("2-bit", 0.7), ("1-bit", 0.7), ("fp4", NOISE), ("nf4", NOISE))
        for name, limit in limits:
            if row := rows.get(f"{name} {dtype}"):
                ratio = row["ms"] / base["ms"]
                yield aim(f"M=1, {name} {dtype}: <= {limit} x the 4-bit time", f"{ratio:.2f} x", ratio <= limit)
        for name, allowed in (("8-bit", 1.15), ("4-bit g32", 1.15), ("4-bit g128", 1.15)):
            if row := rows.get(f"{name} {dtype}"):
                ratio, implied = row["ms"] / base["ms"], row["bytes"] / base["bytes"]
                text = f"M=1, {name} {dtype}: <= 1.15 x what its bytes imply"
                yield aim(text, f"{ratio:.2f} x for {implied:.2f} x the bytes", ratio <= allowed * implied)
        for group in ("", "g32 ", "g128 "):
            row, other = rows.get(f"4-bit {group}axis 0 {dtype}"), rows.get(f"4-bit {group}{dtype}")
            if row and other:
                ratio = row["ms"] / other["ms"]
                yield aim(f"M=1, 4-bit {group}axis 0 {dtype}: no slower than axis 1", f"{ratio:.2f} x", ratio <= NOISE)


def _faster_than_peers(cell: Cell) -> Iterator[dict[str, Any]]:
    """Ours at 4 bits, exact and with int8 activations, against the fastest peer of its kind and of all."""
    N, K = cell["shape"]
    peer = _fastest(cell["rows"], lambda r: r["kind"] == "peer")
    exact_peer = _fastest(cell["rows"], lambda r: r["kind"] == "peer" and r["computes in"] != "int8")
    plain = {f"4-bit {activation}{dtype}" for activation in ("", "int8 ") for dtype in ("fp32", "bf16")}
    for activations, rivals in (("exact", (peer, exact_peer)), ("int8", (peer,))):
        wanted = activations == "int8"
        mine = _fastest(cell["rows"], lambda r, w=wanted: r["name"] in plain and (r["computes in"] == "int8") == w)
        for i, rival in enumerate(rivals):
            if mine is None or rival is None or rival in rivals[:i]:
                continue
            ratio = rival["ms"] / mine["ms"]
            which = "every peer" if rival is peer else "every peer with exact activations"
            text = f"M={cell['M']}, {N}x{K}, 4-bit {activations}: faster than {which}"
            yield aim(text, f"{ratio:.2f} x ({rival['name']})", ratio > 1)


def _faster_than_dense(cell: Cell) -> Iterator[dict[str, Any]]:
    N, K = cell["shape"]
    rows = {r["name"]: r for r in cell["rows"]}
    for dense in ("dense fp32", "dense bf16"):
        slowest = max((r for r in cell["rows"] if r["kind"] == "ours"), key=lambda r: r["ms"], default=None)
        if dense in rows and slowest:
            ratio = rows[dense]["ms"] / slowest["ms"]
            text = f"M={cell['M']}, {N}x{K}: every setting faster than {dense}"
            text += "" if dense == "dense fp32" else " (no aim)"
            yield aim(text, f"{ratio:.2f} x ({slowest['name']})", ratio > 1)


def verdict(cells: list[Cell]) -> list[dict[str, Any]]:
    """Each aim with what was measured and whether it holds."""
    lines: list[dict[str, Any]] = []
    for cell in cells:
        if cell["M"] == 1 and cell["shape"] == MAIN_SHAPE:
            lines += _decode(cell)
    for cell in cells:
        if cell["M"] > 1:
            lines += _faster_than_peers(cell)
    for cell in cells:
        lines += _faster_than_dense(cell)
    return lines


def overhead(seconds: float = 3) -> list[dict[str, Any]]:
    """Microseconds that F.linear on an HQQTensor costs over calling the operator, on a layer too small to matter."""
    x = torch.randn(1, 64)
    q = HQQTensor.from_hp(torch.randn(8, 64), HqqConfig(4, 64, solver="rtn"))
    operator = torch.ops.hqqtensor._linear.default
    arguments = flat("linear", (x, q.operand(), None, None, q.activation))

    def many(run: Callable[[], object]) -> Callable[[], None]:
        def loop() -> None:
            for _ in range(1000):
                run()

        return loop

    times = interleaved(
        {"subclass": many(lambda: F.linear(x, q)), "op": many(lambda: operator(*arguments))},
        rounds=15,
        seconds=seconds,
    )
    extra = 1e3 * (times["subclass"] - times["op"])
    return [aim("eager overhead of the subclass, one linear: <= 5 us over the op", f"{extra:.1f} us", extra <= 5)]
