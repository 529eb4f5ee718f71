"""GGUF files of a tiny llama with a tensor of every type; cross-checked with the gguf package."""

import random
import tempfile
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fuzz.mutate import damage_bytes, damage_fields, join_fields
from fuzz.run import IN_MEMORY
from fuzz.target import Files, Target, Wrong, check_same, check_usable
from hqqtensor import HQQTensor
from hqqtensor.serialization.gguf_blocks import read_tensor
from hqqtensor.serialization.gguf_file import BLOCKS, GgufFile, open_gguf
from hqqtensor.serialization.gguf_llama import from_llama, llama_config
from hqqtensor.serialization.layout import CheckpointError

try:  # here, for what an import takes would count as an input's memory
    import gguf
except ImportError:
    gguf = None

NAME = "model.gguf"
ALIGNMENT = 32
Fields = list[tuple[str, Any]]
_METADATA: dict[str, tuple[int, Any]] = {
    "general.architecture": (8, b"llama"), "general.alignment": (4, ALIGNMENT), "llama.attention.head_count": (4, 2),
    "llama.attention.head_count_kv": (4, 2), "llama.embedding_length": (4, 256), "llama.block_count": (4, 1),
    "llama.feed_forward_length": (4, 4), "llama.context_length": (4, 64),
    "llama.attention.layer_norm_rms_epsilon": (6, 1e-5), "llama.rope.freq_base": (6, 10000.0),
    "general.file_type": (10, 2), "tokenizer.ggml.add_bos_token": (7, 1),
}  # fmt: skip
_CODES = {4: "I", 6: "f", 7: "B", 10: "Q"}
_TENSORS = {
    "token_embd.weight": "Q5_1", "output_norm.weight": "F32", "blk.0.attn_norm.weight": "F16",
    "blk.0.ffn_norm.weight": "BF16", "blk.0.attn_q.weight": "Q4_0", "blk.0.attn_k.weight": "Q4_K",
    "blk.0.attn_v.weight": "Q5_0", "blk.0.attn_output.weight": "Q5_K", "blk.0.ffn_gate.weight": "Q8_0",
    "blk.0.ffn_up.weight": "Q6_K", "blk.0.ffn_down.weight": "Q4_1",
}  # fmt: skip


def _text(text: bytes) -> Fields:
    return [("Q", len(text)), ("bytes", text)]


@cache
def _seed() -> tuple[tuple[tuple[str, Any], ...], bytes]:
    """Fields of the header, and the tensors' bytes."""
    fields: Fields = [("bytes", b"GGUF"), ("I", 3), ("Q", len(_TENSORS)), ("Q", len(_METADATA) + 3)]
    for key, (kind, value) in _METADATA.items():
        fields += [*_text(key.encode()), ("I", kind)]
        fields += _text(value) if kind == 8 else [(_CODES[kind], value)]
    fields += [*_text(b"tokenizer.ggml.tokens"), ("I", 9), ("I", 8), ("Q", 3)]
    fields += [field for text in (b"a", b"bc", b"<s>") for field in _text(text)]
    fields += [*_text(b"tokenizer.ggml.scores"), ("I", 9), ("I", 6), ("Q", 3), ("f", 0.0), ("f", 1.0), ("f", 2.0)]
    fields += [*_text(b"x.nested"), ("I", 9), ("I", 9), ("Q", 2)]
    fields += [("I", 4), ("Q", 1), ("I", 7), ("I", 0), ("Q", 2), ("B", 1), ("B", 2)]
    rng = np.random.default_rng(0)
    data = b""
    for name, kind in _TENSORS.items():
        number, block, size = BLOCKS[kind]
        shape = [256] if "norm" in name else [256, 4]
        fields += [*_text(name.encode()), ("I", len(shape)), *(("Q", extent) for extent in shape)]
        fields += [("I", number), ("Q", len(data))]
        raw = rng.integers(0, 256, (int(np.prod(shape)) // block, size), dtype=np.uint8)
        if block > 1:  # a normal number where the block's float16 scales are
            places = {"Q6_K": (208,)}.get(kind, (0, 2) if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else (0,))
            for place in places:
                halves = rng.standard_normal((len(raw), 1)).astype(np.float16)
                raw[:, place : place + 2] = halves.view(np.uint8)
        data += raw.tobytes()
        data += b"\0" * (-len(data) % ALIGNMENT)
    return tuple(fields), data


def _case(rng: random.Random) -> Files:
    fields, data = _seed()
    choice = rng.random()
    damaged = list(fields) if choice < 0.25 else damage_fields(rng, fields)
    header = join_fields(damaged)
    if choice < 0.25 or choice > 0.9:
        data = damage_bytes(rng, data)
    raw = header + b"\0" * (-len(header) % ALIGNMENT) + data
    return {NAME: damage_bytes(rng, raw) if 0.25 < choice < 0.35 else raw}


def run(files: Files, folder: Path) -> None:
    file = open_gguf(folder / NAME)
    state = from_llama(file)
    check_same(state, from_llama(open_gguf(folder / NAME)))
    for name, tensor in state.items():
        check_usable(name, tensor)
    _compare_with_gguf(file, files[NAME])
    llama_config(file)


def _compare_with_gguf(file: GgufFile, raw: bytes) -> None:
    if gguf is None:
        return
    for name, placed in file.tensors.items():
        data = np.frombuffer(raw, np.uint8)[placed.offset : placed.offset + placed.nbytes]
        ours = read_tensor(file, placed)
        if not isinstance(ours, HQQTensor):
            same = ours.contiguous().view(torch.uint8).flatten().numpy().tobytes() == data.tobytes()
            if not same:
                raise Wrong(f"{name}: other bytes than the file has at {placed.offset}")
            continue
        want = _dequantized(placed.kind, placed.shape[0], data.tobytes())
        largest = want.abs().amax() + 256 * ours.scale.float().abs().amax()
        if not bool(((ours.dequantize() - want).abs() <= 1e-5 * largest).all()):
            raise Wrong(f"{name}: the gguf package reads other numbers from {ours!r}")
    first = min((placed.offset for placed in file.tensors.values()), default=len(raw))
    for name, offset, shape in _placed_by_package(raw[:first], len(raw)):
        placed = file.tensors.get(name)
        if placed is None or placed.offset != offset or placed.shape != shape:
            raise Wrong(f"{name}: the gguf package finds it at {offset}, {list(shape)}; here it is {placed}")


@lru_cache(maxsize=64)  # most damages leave most tensors as they are
def _dequantized(kind: str, rows: int, data: bytes) -> torch.Tensor:
    with np.errstate(all="ignore"):
        blocks = np.frombuffer(data, np.uint8).reshape(rows, -1)
        values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(np.ascontiguousarray(values))


@lru_cache(maxsize=8)
def _placed_by_package(header: bytes, size: int) -> list[tuple[str, int, tuple[int, ...]]]:
    """Name, offset and shape of each tensor of a file that begins so; none where the package does not read it."""
    with tempfile.NamedTemporaryFile(dir=IN_MEMORY) as file:
        file.write(header + bytes(size - len(header)))
        file.flush()
        try:
            tensors = gguf.GGUFReader(file.name).tensors
        except Exception:  # it is no standard of what is right: names with odd bytes stop it
            return []
        return [(t.name, t.data_offset, tuple(map(int, t.shape[::-1]))) for t in tensors]


TARGETS = (Target("gguf", _case, run, (CheckpointError,)),)
