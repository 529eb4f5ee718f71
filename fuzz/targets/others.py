"""Checkpoints of other tools: GPTQ and AWQ directories, the hqq library's safetensors and its two pickles."""

import copy
import io
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fuzz.mutate import NUMBERS, VALUES, damage_bytes, json_text
from fuzz.safetensors_bytes import damage, parse
from fuzz.target import Files, Target, Wrong, check_same, check_usable
from fuzz.wrong_calls import wrong_tensor
from hqqtensor import HqqConfig, HQQTensor
from hqqtensor.serialization.gptq_checkpoint import read_settings
from hqqtensor.serialization.hqq_export import export_layer
from hqqtensor.serialization.layout import CheckpointError
from hqqtensor.serialization.load import read_checkpoint

MODEL = "model.safetensors"
PICKLE = "qmodel.pt"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _saved(tensors: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: t.contiguous().clone() for name, t in tensors.items()})


@cache
def _packed_seeds() -> list[Files]:
    g = torch.Generator().manual_seed(0)

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, generator=g)

    seeds = []
    for version, bits in (("gptq", 4), ("gptq", 3), ("gptq_v2", 2), ("gptq_v2", 3), ("gptq_v2", 8), ("awq", 4)):
        rows, columns, size = 32, 64, 32
        groups = columns // size
        tensors = {
            "0.qzeros": words(groups, rows * bits // 32),
            "0.scales": torch.rand(groups, rows, generator=g).half(),
            "0.bias": torch.rand(rows, generator=g).half(),
        }
        if version == "awq":
            tensors["0.qweight"] = words(columns, rows * bits // 32)
            settings = {"quant_method": "awq", "bits": bits, "group_size": size, "version": "gemm", "zero_point": True}
        else:
            tensors["0.qweight"] = words(columns * bits // 32, rows)
            tensors["0.g_idx"] = (torch.arange(columns) // size).int()
            settings = {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": version}
        config = json.dumps({"quantization_config": settings}).encode()
        seeds.append({MODEL: _saved(tensors), "config.json": config})
    return seeds


def _packed(rng: random.Random, awq: bool) -> Files:
    files = dict(rng.choice([s for s in _packed_seeds() if (b'"awq"' in s["config.json"]) == awq]))
    if rng.random() < 0.35:
        files["config.json"] = json_text(rng, json.loads(files["config.json"])).encode("utf-8", "replace")
    else:
        files[MODEL] = damage(rng, files[MODEL])
    return files


def _read(files: Files, folder: Path) -> dict[str, Tensor]:
    state = read_checkpoint(folder)[0]
    check_same(state, read_checkpoint(folder)[0])
    for name, tensor in state.items():
        check_usable(name, tensor)
    return state


def _run_packed(files: Files, folder: Path) -> None:
    state = _read(files, folder)
    if "0.weight" not in state or not isinstance(state["0.weight"], HQQTensor):
        return
    settings = read_settings(folder)
    if settings.version == "gptq":
        return  # its zero points carry from one into the next, which the plain reading below does not
    stored = {t.name: t for t in parse(files[MODEL])[0]}

    def numbers(part: str, dtype: Any) -> Any:
        t = stored[f"0.{part}"]
        return np.frombuffer(t.data, dtype).reshape(t.shape)

    scales = state["0.weight"].scale
    if stored["0.scales"].dtype != "F16" or ("0.g_idx" in stored and stored["0.g_idx"].dtype != "I32"):
        return
    qweight, qzeros, scale = numbers("qweight", "<u4"), numbers("qzeros", "<u4"), numbers("scales", "<f2")
    rows, bits = scale.shape[1], settings.nbits
    zero = _stream(qzeros, bits, settings.version == "awq")[:, :rows]
    if settings.version == "awq":
        codes = _stream(qweight, bits, True)[:, :rows]
        index = np.arange(len(codes)) // min(settings.group_size or len(codes), len(codes))
    else:
        codes = _stream(qweight.T, bits, False).T
        index = numbers("g_idx", "<i4") if "0.g_idx" in stored else np.arange(len(codes)) // settings.group_size
        codes = codes[: len(index)]
    want = (codes.astype(np.float32) - zero.astype(np.float32)[index]) * scale.astype(np.float32)[index]
    got = state["0.weight"].dequantize(torch.float32).numpy()
    if got.shape != want.T.shape or not np.array_equal(got, want.T):
        raise Wrong(f"0.weight: a plain reading gives other numbers than {state['0.weight']!r} with {scales.shape}")


def _stream(words: Any, bits: int, awq: bool) -> Any:
    """The codes of rows of words that hold one stream of bits each."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    codes = stream[:, : stream.shape[1] // bits * bits].reshape(len(words), -1, bits)
    codes = (codes << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)
    if not awq:
        return codes
    order = np.argsort(AWQ_ORDER)
    return codes.reshape(len(words), -1, 8)[..., order].reshape(len(words), -1)


@cache
def _layers() -> list[dict[str, Any]]:
    """Entries of hqq's layers, of every packing and both axes."""
    torch.manual_seed(0)
    out = []
    for nbits, axis in ((8, 1), (4, 1), (3, 1), (2, 0), (1, 1), (4, 0), (3, 0)):
        config = HqqConfig(nbits, 16, axis=axis, scale_dtype="float16")
        out.append(dict(export_layer("0.weight", HQQTensor.from_hp(torch.randn(64, 64), config))))
    return out


@cache
def _flat_seeds() -> list[bytes]:
    return [_saved({f"0.{key}": value for key, value in layer.items()}) for layer in _layers()]


def _flat(rng: random.Random) -> Files:
    return {MODEL: damage(rng, rng.choice(_flat_seeds()))}


def _plain(layer: dict[str, Any]) -> dict[str, Any]:
    """The entries as hqq keeps them in memory: plain numbers and texts."""
    out: dict[str, Any] = {}
    for key, value in layer.items():
        if key in ("W_q", "scale", "zero"):
            out[key] = value
        elif key in ("packing", "unpack_view_dtype", "compute_dtype"):
            out[key] = bytes(value.tolist()).decode()
        else:
            out[key] = value.tolist()
    return {**out, "compute_dtype": torch.float16, "view_as_float": False, "quant_scale": False, "quant_zero": False}


def _pickle(rng: random.Random) -> Files:
    entries: dict[str, Any] = dict(rng.choice(_layers()))
    if rng.random() < 0.5:
        plain = _plain(entries)
        entries = {"W_q": plain.pop("W_q"), "meta": plain, "bias": rng.choice([None, torch.ones(64)])}
    if rng.random() < 0.8:
        entries = _damage_entries(rng, copy.copy(entries))
        with io.BytesIO() as out:
            torch.save({"0": entries}, out)
            return {PICKLE: out.getvalue()}
    with io.BytesIO() as out:
        torch.save({"0": entries}, out)
        return {PICKLE: damage_bytes(rng, out.getvalue())}


def _damage_entries(rng: random.Random, entries: dict[str, Any]) -> dict[str, Any]:
    for _ in range(rng.choice([1, 1, 2])):
        key = rng.choice([*entries, "group_size", "shape", "nbits", "axis", "zero_scale", "meta_scale"])
        value = entries.get(key)
        changes: list[Callable[[], Any]] = [
            lambda: rng.choice(VALUES), lambda: rng.choice(NUMBERS), lambda: torch.tensor(rng.choice([0, -1, 3, 64])),
        ]  # fmt: skip
        if isinstance(value, dict):
            inner = dict(value)
            changes = [lambda: _damage_entries(rng, inner)]  # noqa: B023
        elif isinstance(value, Tensor):
            stored = value
            changes += 3 * [lambda: wrong_tensor(rng, stored)]  # noqa: B023
        elif isinstance(value, list):
            items = list(value)
            changes += 2 * [lambda: [rng.choice([*items, *NUMBERS]) for _ in items]]  # noqa: B023
        new = rng.choice(changes)()
        if isinstance(new, Tensor) and new.numel() > 2**20:  # torch.save would write it in full
            new = new.new_empty(0)
        entries[key] = new
    return entries


def _run_plainly(files: Files, folder: Path) -> None:
    _read(files, folder)


def _run_pickle(files: Files, folder: Path) -> None:
    state = read_checkpoint(folder / PICKLE)[0]
    check_same(state, read_checkpoint(folder)[0])
    for name, tensor in state.items():
        check_usable(name, tensor)


TARGETS = (
    Target("gptq", lambda rng: _packed(rng, awq=False), _run_packed, (CheckpointError,)),
    Target("awq", lambda rng: _packed(rng, awq=True), _run_packed, (CheckpointError,)),
    Target("hqq-flat", _flat, _run_plainly, (CheckpointError,)),
    Target("hqq-pickle", _pickle, _run_pickle, (CheckpointError,)),
)
