"""``hqqtensor quantize`` of a checkpoint larger than it may hold: speed beside the disk's, anonymous memory.

    python -m benchmarks.streaming [--small] [--layers N] [--processes N] [--calibrate SOURCE] [--place DIR]

Writes a 7B-shaped bfloat16 checkpoint of random weights piece by piece (13 GB), quantizes it with the default settings
in processes of their own, and removes everything. ``--small`` is the same with small layers. With ``--calibrate`` the
model is calibrated block by block, which takes hours for 32 layers of 7B: give fewer ``--layers``.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

SHAPES = {
    False: {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000},
    True: {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "vocab_size": 2000},
}
SHARD_BYTES = {False: 2 * 10**9, True: 4 * 10**6}
_PIECE = 16 * 2**20


def shapes_of(small: bool, layers: int | None = None) -> dict[str, int]:
    """Shapes with another number of layers."""
    return SHAPES[small] | ({} if layers is None else {"num_hidden_layers": layers})


def tensors(shapes: dict[str, int]) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes of a Llama's weights."""
    hidden, inner = shapes["hidden_size"], shapes["intermediate_size"]
    yield "model.embed_tokens.weight", [shapes["vocab_size"], hidden]
    for layer in range(shapes["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name in "qkvo":
            yield f"{prefix}.self_attn.{name}_proj.weight", [hidden, hidden]
        yield f"{prefix}.mlp.gate_proj.weight", [inner, hidden]
        yield f"{prefix}.mlp.up_proj.weight", [inner, hidden]
        yield f"{prefix}.mlp.down_proj.weight", [hidden, inner]
        yield f"{prefix}.input_layernorm.weight", [hidden]
        yield f"{prefix}.post_attention_layernorm.weight", [hidden]
    yield "model.norm.weight", [hidden]
    yield "lm_head.weight", [shapes["vocab_size"], hidden]


def write_checkpoint(directory: Path, small: bool, layers: int | None = None) -> int:
    """Write a random model in shards; the number of its weights."""
    shapes = shapes_of(small, layers)
    config = {
        **shapes, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "num_attention_heads": shapes["hidden_size"] // 128, "num_key_value_heads": shapes["hidden_size"] // 128,
        "tie_word_embeddings": False,
    }  # fmt: skip
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    shards: list[list[tuple[str, list[int]]]] = [[]]
    size = total = 0
    for name, shape in tensors(shapes):
        nbytes = 2 * torch.Size(shape).numel()
        if shards[-1] and size + nbytes > SHARD_BYTES[small]:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size, total = size + nbytes, total + nbytes // 2
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for place, shard in enumerate(shards):
        file = f"model-{place + 1:05}-of-{len(shards):05}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in shard:
            end = offset + 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
            weight_map[name], offset = file, end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(directory / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for _, shape in shard:
                left = torch.Size(shape).numel()
                while left:
                    piece = torch.randn(min(left, _PIECE), generator=generator).mul_(0.02).bfloat16()
                    out.write(piece.view(torch.uint8).numpy().data)
                    left -= len(piece)
            out.flush()
            os.fsync(out.fileno())
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def forget_pages(directory: Path) -> None:
    """Let the system drop what it keeps of the files in memory."""
    for file in directory.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read_rate(directory: Path) -> float:
    """Bytes a second at which the disk gives the first shard, which is not in memory."""
    forget_pages(directory)
    file = min(directory.glob("*.safetensors"))
    started, buffer = time.perf_counter(), bytearray(8 * 2**20)
    with open(file, "rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass
    rate = file.stat().st_size / (time.perf_counter() - started)
    forget_pages(directory)
    return rate


def anonymous(pid: int) -> int:
    """Anonymous bytes that a process has in memory."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Anonymous:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def quantize(source: Path, out: Path, processes: int, calibration: str | None = None) -> dict[str, Any]:
    """Run the command; seconds in all, those of quantizing, and the highest anonymous memory of a process."""
    command = [sys.executable, "-m", "hqqtensor", "quantize", str(source), str(out), "--json"]
    command += ["--workers-join"] if processes > 1 else []
    command += [] if calibration is None else ["--calibrate", calibration]
    threads = max(1, (os.cpu_count() or 1) // processes)
    env = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if processes > 1 else {})}
    started, peak = time.perf_counter(), 0
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) for _ in range(processes)]
    while any(process.poll() is None for process in running):
        peak = max(peak, *(anonymous(process.pid) for process in running))
        time.sleep(0.5)  # reading it costs milliseconds of the process that is measured
    seconds = time.perf_counter() - started
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"hqqtensor quantize failed: {[process.returncode for process in running]}")
    return {"seconds_in_all": seconds, "seconds": max(json.loads(text)["seconds"] for text in outputs), "peak": peak}


def measure(
    small: bool, processes: int, place: Path | None, layers: int | None = None, calibration: str | None = None
) -> dict[str, Any]:
    """All figures; SystemExit where the disk is too small."""
    shapes = [shape for _, shape in tensors(shapes_of(small, layers))]
    weights = sum(torch.Size(shape).numel() for shape in shapes)
    block = sum(torch.Size(s).numel() for n, s in tensors(shapes_of(small, 1)) if ".layers." in n)
    with tempfile.TemporaryDirectory(prefix="streaming-", dir=place) as folder:
        needed, free = 3 * weights, shutil.disk_usage(folder).free
        if needed > free:
            raise SystemExit(f"{needed / 1e9:.1f} GB of disk are needed in {folder}, {free / 1e9:.1f} GB are free")
        source = Path(folder, "dense")
        write_checkpoint(source, small, layers)
        rate = read_rate(source)
        figures = quantize(source, Path(folder, "quantized"), processes, calibration)
    return {
        "weights": weights,
        "dense_mib": 2 * weights / 2**20,
        "block_mib": 2 * block / 2**20,
        "processes": processes,
        "calibration": calibration,
        "seconds": figures["seconds"],
        "seconds_with_imports": figures["seconds_in_all"],
        "million_weights_per_second": weights / figures["seconds"] / 1e6,
        "disk_million_weights_per_second": rate / 2 / 1e6,
        "peak_anonymous_mib": figures["peak"] / 2**20,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small layers: seconds")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="share the work (default: 1)")
    parser.add_argument("--layers", type=int, metavar="N", help="blocks of the model (default: 32, small 4)")
    parser.add_argument("--calibrate", metavar="self|random|FILE", help="calibrate block by block (default: not)")
    parser.add_argument("--place", type=Path, metavar="DIR", help="where to write (default: the system's place)")
    args = parser.parse_args(argv)
    print(json.dumps(measure(args.small, args.processes, args.place, args.layers, args.calibrate), indent=2))


if __name__ == "__main__":
    main()
