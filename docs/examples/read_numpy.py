"""Read a checkpoint of hqqtensor with numpy alone: every weight as a dense array, as docs/format.md describes it.

It shows the format in the shortest way and trusts the file: `hqqtensor.load_model` is what checks one from a stranger.
"""

import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I16": np.int16,
    "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def minifloat(exponent_bits: int, mantissa_bits: int, bias: int) -> list[float]:
    """The value of every code: a sign bit, the exponent, the mantissa."""
    positive = []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, fraction = divmod(code, 2**mantissa_bits)
        fraction /= 2**mantissa_bits
        positive.append((1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias))
    return positive + [-value for value in positive]


TABLES = {"nf4": NF4, "fp4": minifloat(2, 1, 1), "fp6": minifloat(3, 2, 3), "fp8": minifloat(4, 3, 7)}
TABLES["fp8"][127] = TABLES["fp8"][255] = math.nan


def read_safetensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """All arrays of one file (bfloat16 as float32), and its metadata."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    metadata, arrays = header.pop("__metadata__", {}), {}
    for name, info in header.items():
        begin, end = info["data_offsets"]
        if info["dtype"] == "BF16":
            array = (np.frombuffer(data[begin:end], np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            array = np.frombuffer(data[begin:end], DTYPES[info["dtype"]])
        arrays[name] = array.reshape(info["shape"])
    return arrays, metadata


def unpack(rows: Array, nbits: int, columns: int, is_padded: bool) -> Array:
    """Packed rows [..., bytes] to codes [..., columns]: blocks of 128 codes, each a run of planes."""
    codes, at = [], 0
    for first in range(0, columns, 128):
        count = min(128, columns - first)
        count = -(-count // 8) * 8 if is_padded else count
        block, low = np.zeros((*rows.shape[:-1], count), np.uint8), 0
        for plane in PLANES[nbits]:
            width = -(-count * plane // 8)
            for place in range(8 // plane):
                slab = rows[..., at : at + width] >> (plane * place) & (2**plane - 1)
                target = block[..., place * width : (place + 1) * width]
                target |= slab[..., : target.shape[-1]] << low
            low, at = low + plane, at + width
        codes.append(block)
    return np.concatenate([np.zeros((*rows.shape[:-1], 0), np.uint8), *codes], -1)[..., :columns]


def rotate(weights: Array, block: int) -> Array:
    """A normalized Hadamard matrix times every run of ``block`` numbers of a row."""
    y, size = weights.reshape(*weights.shape[:-1], -1, block), 1
    while size < block:
        pairs = y.reshape(*y.shape[:-1], -1, 2, size)
        even, odd = pairs[..., 0, :], pairs[..., 1, :]
        y, size = np.stack((even + odd, even - odd), -2).reshape(y.shape), size * 2
    return (y * np.float32(block**-0.5)).reshape(weights.shape)


def rounded(values: Array, dtype: str) -> Array:
    """The nearest numbers of ``dtype``; bfloat16 as float32, which holds all of its numbers."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = values.astype(np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)  # of two equally near the even one
    return np.where(np.isnan(values), np.float32(np.nan), nearest.view(np.float32)).astype(np.float32)


def dequantize(prefix: str, entry: dict[str, Any], arrays: dict[str, Array]) -> Array:
    """The weight that ``entry`` describes, of the arrays whose names begin with ``prefix``."""
    data = entry["_data"]
    nbits, axis, size, rows_in_shape = data["nbits"], data["axis"], data["group_size"], data.get("row_dims", 1)
    dtype = data["dtype"] if isinstance(data["dtype"], str) else data["dtype"]["_data"]  # torchao writes an object
    dtype = dtype.removeprefix("torch.")
    shape = data["shape"][:-2] + data["shape"][-2:][::-1] if data["transposed"] else data["shape"]
    columns = math.prod(shape[-rows_in_shape:])
    parts: dict[str, Array] = {"qdata": arrays[prefix + "qdata"]}
    for part in set(entry["_tensor_data_names"]) - {"qdata"}:
        nested = entry.get("_nested", {}).get(part)
        values = dequantize(f"{prefix}{part}_", nested, arrays) if nested else arrays[prefix + part]
        parts[part] = values.astype(np.float32)
    rows, width = parts["qdata"].shape[-2:]
    codes = unpack(parts["qdata"], nbits, columns, is_padded=width == -(-columns // 8) * nbits)
    groups = np.arange(columns) // size if axis else np.arange(rows) % max(1, parts["scale"].shape[-2])
    scale = np.take(parts["scale"], groups, axis=-1 if axis else -2)
    if data["format"] == "int":
        weights = (codes.astype(np.float32) - np.take(parts["zero_point"], groups, axis=-1 if axis else -2)) * scale
    elif data["format"] == "codebook":
        entries = np.broadcast_to(parts["zero_point"], (*codes.shape[:-1], 2**nbits))
        weights = np.take_along_axis(entries, codes.astype(np.int64), -1) * scale
    else:
        weights = np.array(TABLES[data["format"]], np.float32)[codes] * scale
    weights = rounded(rotate(weights, data["rotation"]) if data.get("rotation") else weights, dtype)
    if "act_pre_scale" in parts:
        act = rounded(parts["act_pre_scale"], dtype)
        weights = rounded(weights * act, dtype)
    weights = weights.reshape(shape)
    return weights.swapaxes(-1, -2) if data["transposed"] else weights


def read(path: Path) -> dict[str, Array]:
    """Every parameter and buffer of a file or directory; a shared weight under each of its names."""
    arrays: dict[str, Array] = {}
    metadata: dict[str, str] = {}
    for file in sorted(path.glob("model*.safetensors")) if path.is_dir() else [path]:
        some, metadata_of_file = read_safetensors(file)
        arrays, metadata = arrays | some, metadata | metadata_of_file
    shared = json.loads(metadata.get("hqqtensor", '{"version": 1, "aliases": {}}'))
    if shared["version"] > 1:
        raise ValueError(f"{path}: format version {shared['version']} is not read here")
    dense = dict(arrays)
    for name in json.loads(metadata["tensor_names"]):
        if '"HQQTensor"' in metadata.get(name, ""):
            module, _, leaf = name.rpartition(".")
            prefix = f"{module}{'.' if module else ''}_{leaf}_"
            dense = {key: array for key, array in dense.items() if not key.startswith(prefix)}
            dense[name] = dequantize(prefix, json.loads(metadata[name]), arrays)
    return dense | {name: dense[stored] for name, stored in shared["aliases"].items()}


def main(path: str = str(Path(__file__).parents[2] / "tests" / "assets" / "checkpoints" / "v1" / "nested4")) -> None:
    for name, array in read(Path(path)).items():
        print(f"{name}: {array.dtype} {list(array.shape)}, mean square {np.square(array, dtype=np.float64).mean():.6g}")


if __name__ == "__main__":
    main(*sys.argv[1:])
