"""What packing gains at 8 to 2 bits, and how fast it is: ``python -m benchmarks.transfer DIR``.

DIR: a dense transformers directory. Sizes are exact anywhere; rates want an idle machine.
"""

import argparse
import io
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.timing import machine
from hqqtensor import PRESETS, quantize_, save_model
from hqqtensor.serialization.files import read_tensors
from hqqtensor.transfer import pack_directory, unpack_stream

COMPRESSIONS = ("zstd", "deflate", "none")
PARTS = ("qdata", "scale", "zero_point", "act_pre_scale")


def entropy(path: Path) -> dict[str, float]:
    """Bits of information in a stored bit, from how often each byte occurs, for each part of quantized weights."""
    counts: dict[str, Counter[int]] = {}
    for key, tensor in read_tensors(path)[0].items():
        leaf = key.rpartition(".")[2]
        part = next((p for p in PARTS if leaf.endswith((f"_weight_{p}", f"_weight_{p}_qdata"))), None)
        if part is not None:
            name = f"embedding {part}" if "embed" in key else part
            amounts = np.bincount(tensor.contiguous().view(-1).view(torch.uint8).numpy(), minlength=256)
            counts.setdefault(name, Counter()).update(dict(enumerate(amounts.tolist())))
    return {
        name: _entropy(np.array([count[i] for i in range(256)], dtype=np.float64)) for name, count in counts.items()
    }


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum()) / 8


def measure(directory: Path) -> dict[str, Any]:
    """Share of the size that is left and MB a second each way, for each compression."""
    out: dict[str, Any] = {"entropy": entropy(directory / "model.safetensors")}
    for compression in COMPRESSIONS:
        stream = io.BytesIO()
        began = time.perf_counter()
        summary = pack_directory(directory, stream, compression)
        packed = time.perf_counter()
        stream.seek(0)
        with tempfile.TemporaryDirectory() as folder:
            unpack_stream(stream, folder)
        rates = [summary.raw_bytes / seconds / 1e6 for seconds in (packed - began, time.perf_counter() - packed)]
        share = summary.packed_bytes / summary.raw_bytes
        out[compression] = {"share": share, "pack_mb_s": rates[0], "unpack_mb_s": rates[1]}
    return out


def main(argv: list[str] | None = None) -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description="size and speed of packed models")
    parser.add_argument("directory", metavar="DIR", help="dense transformers directory")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2], help="presets (default: 8 4 3 2)")
    args = parser.parse_args(argv)
    results = {}
    for bits in args.bits:
        model = transformers.AutoModelForCausalLM.from_pretrained(args.directory, dtype="auto")
        quantize_(model, PRESETS[str(bits)])
        with tempfile.TemporaryDirectory() as folder:
            save_model(model, folder, non_persistent_buffers=False)
            results[str(bits)] = measure(Path(folder))
    print(json.dumps({"machine": machine(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
