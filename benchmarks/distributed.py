"""What FSDP2 sends for a pass of quantized layers, beside their packed size: ``python -m benchmarks.distributed``.

Starts the processes itself. The bytes are those that each process gives to the all-gather, counted in a communication
object of FSDP's own kind. They depend on the settings and not on the machine.
"""

import argparse
import json
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hqqtensor import HqqConfig, hqq_weight_only, quantize_

SETTINGS = {
    "default 4 bits": hqq_weight_only(4),
    "4 bits, groups of 64": HqqConfig(4, 64),
    "3 bits, groups of 64": HqqConfig(3, 64),
    "2 bits, groups of 32, scales in 8 bits": HqqConfig(2, 32, quant_scale=True, quant_zero=True),
    "4 bits, groups of 64, axis 0": HqqConfig(4, 64, axis=0),
}


class Counted:
    """FSDP's all-gather that notes what it is given. ``sent``: bytes of this process."""

    def __init__(self) -> None:
        self.sent = 0

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        self.sent += input_tensor.nbytes
        return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


def measure(rank: int, processes: int, width: int, folder: str) -> None:
    """On each process: all settings; the first writes the result as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))
    rows = []
    for name, config in SETTINGS.items():
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(2))).requires_grad_(False)
        quantize_(model, config)
        packed = sum(p.nbytes for p in model.parameters())
        dense = sum(2 * p.numel() for p in model.parameters())
        counted = Counted()
        for layer in (*model, model):
            fully_shard(layer, mesh=mesh)
        for layer in (*model, model):
            layer.set_custom_all_gather(counted)
        model(torch.ones(1, width))
        sent = torch.tensor(counted.sent)
        dist.all_reduce(sent)
        rows.append({"setting": name, "sent": int(sent), "packed": packed, "dense_bfloat16": dense})
    if rank == 0:
        with open(f"{folder}/result.json", "w") as file:
            json.dump(rows, file)
    dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (args.processes, args.width, folder), args.processes)
        with open(f"{folder}/result.json") as file:
            rows = json.load(file)
    if args.json:
        print(json.dumps({"processes": args.processes, "width": args.width, "settings": rows}))
        return
    for row in rows:
        of_packed, of_dense = row["sent"] / row["packed"], row["sent"] / row["dense_bfloat16"]
        print(f"| {row['setting']} | {of_packed:.3f} | {of_dense:.3f} |")


if __name__ == "__main__":
    main()
