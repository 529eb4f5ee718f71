"""Adapters beside frozen quantized weights, trained on several processes with DDP, with FSDP2 and over tensor parallel
layers.

Run with ``torchrun --nproc-per-node 2 docs/examples/distributed.py``, or alone.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from hqqtensor import HqqConfig, HQQTensor, quantize_


class Block(nn.Module):
    """Two linear layers that are quantized, and a small adapter beside them that is trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width, bias=False)
        self.adapter = nn.Sequential(nn.Linear(width, 8, bias=False), nn.Linear(8, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x))) + self.adapter(x)


def build() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(256) for _ in range(3)))
    quantize_(model, HqqConfig(4, 64), filter_fn=lambda module, name: name.endswith(("up", "down")))
    for p in model.parameters():
        p.requires_grad_(not isinstance(p, HQQTensor))
    return model


def train(model: nn.Module, x: Tensor) -> float:
    """The loss after a few steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(5):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


def held(model: nn.Module) -> int:
    """Bytes of quantized weights on this process."""
    local = [getattr(p, "_local_tensor", p) for p in model.parameters()]
    return sum(p.nbytes for p in local if isinstance(p, HQQTensor))


def main() -> None:
    if "RANK" in os.environ:  # torchrun sets it
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, processes = dist.get_rank(), dist.get_world_size()
    try:
        mesh = init_device_mesh("cpu", (processes,))
        torch.manual_seed(1)
        everything = torch.randn(8 * processes, 256)
        mine = everything.chunk(processes)[rank]

        replicated = DistributedDataParallel(build())

        sharded = build()
        for layer in (*sharded, sharded):
            fully_shard(layer, mesh=mesh)

        parallel = build()
        for block in parallel:
            parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})

        for name, model, x in (("DDP", replicated, mine), ("FSDP2", sharded, mine), ("TP", parallel, everything)):
            packed = held(model)
            loss = train(model, x)
            if rank == 0:
                print(f"{name}: {packed / 2**10:.0f} KiB of quantized weights on a process, loss {loss:.6f}")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
