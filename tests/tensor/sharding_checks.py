"""What ``test_sharding.py`` runs on several processes at once: each function compares them with one process.

Functions raise where something is wrong. They end on all processes, or on none: no process leaves a collective early.
"""

import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from hqqtensor import HqqConfig, HQQTensor, quantize_

QUANTIZED_SCALES = HqqConfig(3, 32, quant_scale=True, quant_zero=True)
PLAIN, AXIS_0 = HqqConfig(4, 32), HqqConfig(4, 32, axis=0)
SETTINGS = {
    "plain": PLAIN,
    "axis 0": AXIS_0,
    "quantized scales": QUANTIZED_SCALES,
    "axis 0, quantized scales": HqqConfig(4, 32, axis=0, quant_scale=True, quant_zero=True),
    "rotation": HqqConfig(2, 32, rotation=True),
    "codebook": HqqConfig(3, 32, format="codebook", codebook="row"),
    "view as float": HqqConfig(4, 32, view_as_float=True),
}


class Block(nn.Module):
    """A frozen layer pair with adapters beside it, as LoRA puts them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)
        self.down, self.up = nn.Linear(width, 4, bias=False), nn.Linear(4, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x))) + self.up(self.down(x))


def adapted(config: HqqConfig, hidden: int = 104, seed: int = 0) -> nn.Sequential:
    """Two blocks, quantized but for the adapters, which alone are trained."""
    torch.manual_seed(seed)
    model = nn.Sequential(Block(128, hidden), Block(128, hidden))
    quantize_(model, config, filter_fn=lambda module, name: name.endswith((".a", ".b")))
    for name, p in model.named_parameters():
        p.requires_grad_("down" in name or "up" in name)
    return model


def inputs() -> Tensor:
    return torch.randn(8, 128, generator=torch.Generator().manual_seed(1))


def mine(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def trained(model: nn.Module, x: Tensor) -> Tensor:
    """The losses of two steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(2):
        loss = model(x).float().pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def mean_over_ranks(t: Tensor) -> Tensor:
    dist.all_reduce(t)
    return t / dist.get_world_size()


def close(a: Tensor, b: Tensor, within: float = 1e-5) -> None:
    assert a.shape == b.shape and (a - b).abs().max() <= within, (a, b)


def sharded(model: nn.Sequential, mesh: DeviceMesh | None = None, **policy: object) -> nn.Sequential:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh, **policy)
    return model


def raises(text: str, run: object, *args: object) -> None:
    try:
        run(*args)
    except (NotImplementedError, ValueError) as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"nothing was raised, expected: {text}")


def ddp_trains_adapters_beside_quantized_weights() -> None:
    for name in ("plain", "axis 0", "quantized scales", "view as float"):
        one = adapted(SETTINGS[name])
        model = DistributedDataParallel(adapted(SETTINGS[name], seed=dist.get_rank()))  # takes over those of rank 0
        assert torch.equal(model.module[1].a.weight, one[1].a.weight), name
        close(mean_over_ranks(trained(model, mine(inputs()))), trained(one, inputs()))
        close(model.module[0].up.weight, one[0].up.weight)


def fsdp_trains_like_one_process(hidden: int = 104, names: tuple[str, ...] = tuple(SETTINGS)) -> None:
    for name in names:
        one, model = adapted(SETTINGS[name], hidden), sharded(adapted(SETTINGS[name], hidden))
        part = model[0].a.weight.to_local()
        assert isinstance(part, HQQTensor) and part.shape[0] == mine(torch.empty(hidden, 1)).shape[0], name
        close(mean_over_ranks(trained(model, mine(inputs()))), trained(one, inputs()))
        close(model[0].up.weight.full_tensor(), one[0].up.weight)


def fsdp_shards_rows_unevenly() -> None:
    fsdp_trains_like_one_process(97, ("plain", "axis 0", "quantized scales", "view as float"))


def fsdp_follows_its_policies() -> None:
    one = adapted(PLAIN).bfloat16()
    model = sharded(adapted(PLAIN), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    seen = []
    model[0].a.register_forward_hook(lambda module, args, out: seen.append((module.weight.dtype, out.dtype)))
    close(mean_over_ranks(trained(model, mine(inputs()))), trained(one, inputs().bfloat16()), within=0.02)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)} and model[0].a.weight.dtype == torch.float32
    for hidden in (104, 97):
        model = sharded(adapted(QUANTIZED_SCALES, hidden), offload_policy=CPUOffloadPolicy(pin_memory=False))
        one = adapted(QUANTIZED_SCALES, hidden)
        close(mean_over_ranks(trained(model, mine(inputs()))), trained(one, inputs()))


def fsdp_sends_the_packed_bytes_and_no_more() -> None:
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

    class Counting(DefaultAllGather):
        def __call__(self, output_tensor, input_tensor, group, async_op=False):
            sent.append(input_tensor.nbytes)
            return super().__call__(output_tensor, input_tensor, group, async_op)

    for name, config in SETTINGS.items():
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(2)))
        quantize_(model, config)
        packed = sum(p.nbytes for p in model.parameters())
        model.requires_grad_(False)
        for layer in (*model, sharded(model)):
            layer.set_custom_all_gather(Counting())
        sent: list[int] = []
        model(torch.randn(2, 256))
        on_the_wire = sum(sent) * dist.get_world_size()
        # Scales that all rows share are on every process and not sent.
        low = 0.75 if config.axis == 0 else 0.95
        assert low * packed <= on_the_wire <= 1.0001 * packed, (name, on_the_wire, packed)


def what_cannot_be_sharded_is_refused() -> None:
    ranks = dist.get_world_size()

    def linear(config: HqqConfig, rows: int, columns: int) -> nn.Module:
        layer = nn.Linear(columns, rows, bias=False).requires_grad_(False)
        quantize_(layer, config, filter_fn=lambda module, name: True)
        return layer

    mesh = init_device_mesh("cpu", (ranks,))
    few = linear(HqqConfig(4, 1, axis=0), ranks - 1, 128)
    if ranks > 2:
        raises("more processes than shards of rows, which share scales", lambda: fully_shard(few, mesh=mesh))
    fully_shard(linear(PLAIN, 1, 128), mesh=mesh)(torch.ones(1, 128))  # with scales of its own each row is independent
    across = linear(PLAIN, 128, 128 * ranks)
    place = {"mesh": mesh, "shard_placement_fn": lambda p: Shard(1)}
    raises("in its first dimension only (shard it with Shard(0))", lambda: fully_shard(across, **place))
    cut = [Shard(1)]
    raises("multiples of 128", distribute_tensor, linear(PLAIN, 128, 64 * ranks).weight, mesh, cut)
    raises("rotated in blocks", distribute_tensor, linear(SETTINGS["rotation"], 128, 128 * ranks).weight, mesh, cut)
    meta = HqqConfig(4, 32, quant_scale=True, quant_zero=True, meta_nbits=4)
    raises("meta_nbits=8", distribute_tensor, linear(meta, 128, 128 * ranks).weight, mesh, cut)
    raises(
        "use a number of processes that divides", distribute_tensor, linear(AXIS_0, 97, 128).weight, mesh, [Shard(0)]
    )


def fsdp1_trains_adapters_with_quantized_weights_left_whole() -> None:
    one, model = adapted(PLAIN), adapted(PLAIN)
    whole = [p for p in model.parameters() if isinstance(p, HQQTensor)]
    model = FullyShardedDataParallel(
        model, ignored_states=whole, use_orig_params=True, device_id=torch.device("cpu"), sync_module_states=False
    )
    close(mean_over_ranks(trained(model, mine(inputs()))), trained(one, inputs()))


class Words(nn.Module):
    """Two embeddings, two linear layers and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = nn.Embedding(100, 256), nn.Embedding(100, 256)
        self.a, self.b, self.out = nn.Linear(256, 512), nn.Linear(512, 256), nn.Linear(256, 100)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        x = x + self.rows(ids) + self.columns(ids)
        return self.out(x + self.b(torch.relu(self.a(x))))


def tensor_parallel_layers_give_the_result_of_one_process() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = {"input_layouts": Replicate(), "output_layouts": Replicate()}
    styles = {
        "rows": RowwiseParallel(**whole), "columns": ColwiseParallel(**whole), "a": ColwiseParallel(),
        "b": RowwiseParallel(), "out": ColwiseParallel(output_layouts=Replicate()),
    }  # fmt: skip
    for name in ("plain", "axis 0", "quantized scales", "codebook", "view as float"):

        def words(name: str = name) -> nn.Module:
            torch.manual_seed(0)
            model = Words().requires_grad_(False)
            quantize_(model, SETTINGS[name], filter_fn=lambda module, name: True)
            return model

        one, model, results = words(), parallelize_module(words(), mesh, styles), []
        for each in (one, model):
            x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(2)).requires_grad_()
            y = each(torch.arange(10).view(2, 5), x)
            y.sum().backward()
            results.append((y, x.grad))
        for a, b in zip(*results, strict=True):
            close(a, b, within=1e-4)
        assert model.b.weight.to_local().shape == (256, 512 // dist.get_world_size())
        assert torch.equal(model.a.weight.full_tensor(), one.a.weight), name
        if name in ("plain", "codebook", "view as float"):
            assert torch.equal(model.b.weight.full_tensor(), one.b.weight), name
        else:
            raises("shards of in_features have scales", model.b.weight.full_tensor)


def weights_are_distributed_and_gathered_again() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for config in (PLAIN, SETTINGS["codebook"]):
        weight = HQQTensor.from_hp(torch.randn(97, 128, generator=torch.Generator().manual_seed(0)), config)
        # What other ranks hold does not count: the weight of rank 0 is scattered or broadcast.
        other = weight if dist.get_rank() == 0 else weight.new_zeros(weight.shape)
        for placement in (Shard(0), Replicate()):
            assert torch.equal(distribute_tensor(other, mesh, [placement]).full_tensor(), weight)


def checkpoints_go_from_all_processes_to_two_and_to_one() -> None:
    folder = Path(os.environ["CHECKS"])
    pair = dist.new_group([0, 1])
    mesh = DeviceMesh.from_group(pair, "cpu") if dist.get_rank() < 2 else None
    for name, hidden in (("plain", 97), ("axis 0", 97), ("quantized scales", 200), ("rotation", 104)):
        one, model = adapted(SETTINGS[name], hidden), sharded(adapted(SETTINGS[name], hidden))
        file = str(folder / f"{name} {dist.get_world_size()}")
        dcp.save(get_model_state_dict(model), checkpoint_id=file)
        expected = one(inputs())
        if dist.get_rank() < 2:
            two = sharded(adapted(SETTINGS[name], hidden, seed=1), mesh)
            state = get_model_state_dict(two)
            dcp.load(state, checkpoint_id=file, process_group=pair)
            set_model_state_dict(two, state)
            close(two(inputs()), expected)
        if dist.get_rank() == 0:
            alone = adapted(SETTINGS[name], hidden, seed=2)
            state = alone.state_dict()
            dcp.load(state, checkpoint_id=file, no_dist=True)
            close(alone(inputs()), expected, within=0)
        dist.barrier()


def whole_state_dicts_are_gathered_and_spread() -> None:
    whole = StateDictOptions(full_state_dict=True)
    for name in SETTINGS:
        one, model = adapted(SETTINGS[name]), sharded(adapted(SETTINGS[name]))
        state = get_model_state_dict(model, options=whole)
        assert all(torch.equal(value, state[key]) for key, value in one.state_dict().items()), name
        fresh = sharded(adapted(SETTINGS[name], seed=3))
        fresh(inputs())  # gathered once before: shared scales have to follow
        set_model_state_dict(fresh, state, options=whole)
        close(fresh(inputs()), one(inputs()))


def fsdp_over_tensor_parallel_layers() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for name in ("plain", "quantized scales"):
        one, model = adapted(SETTINGS[name], 256), adapted(SETTINGS[name], 256)
        for block in model:
            parallelize_module(block, mesh["tensor"], {"a": ColwiseParallel(), "b": RowwiseParallel()})
        model = sharded(model, mesh["data"])
        close(model(inputs()), one(inputs()))


def a_killed_process_is_an_error_on_the_others() -> None:
    model = sharded(adapted(PLAIN))
    model(inputs())
    if dist.get_rank() == 1:
        Path(os.environ["CHECKS"], "rank1.json").write_text('{"a_killed_process_is_an_error_on_the_others": ""}')
        os._exit(9)
    try:
        model(inputs())
    except RuntimeError as error:
        assert "gloo" in str(error), error
    else:
        raise AssertionError("the pass went on without the other process")


def a_process_that_hangs_is_an_error_after_the_timeout() -> None:
    group = dist.new_group(timeout=timedelta(seconds=2))
    model = sharded(adapted(PLAIN), DeviceMesh.from_group(group, "cpu"))
    if dist.get_rank() == 1:
        time.sleep(5)
        return
    begin = time.monotonic()
    try:
        model(inputs())
    except RuntimeError as error:
        assert "imed out" in str(error) and time.monotonic() - begin < 5, error
    else:
        raise AssertionError("the pass went on without the other process")
