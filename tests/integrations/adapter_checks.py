"""What ``test_peft_distributed.py`` runs on two processes: adapters over quantized weights train as on one process."""

import os
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import transformers as tf
from peft_training import logits, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

from hqqtensor import HqqConfig, HQQTensor, quantize_
from hqqtensor.calibration import train_scales

BATCH = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(1))


def base() -> Any:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = tf.LlamaForCausalLM(config)
    quantize_(model, HqqConfig(4, 32))
    return model


def adapted() -> Any:
    model = base()
    torch.manual_seed(1)
    options = {"target_modules": "all-linear", "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **options))


def mine() -> Tensor:
    return BATCH.chunk(dist.get_world_size())[dist.get_rank()]


def expected() -> tuple[list[float], Any]:
    """The losses of one process on the whole batch, and the model after them."""
    model = adapted()
    return train(model, BATCH), model


def mean_over_ranks(losses: list[float]) -> Tensor:
    total = torch.tensor(losses)
    dist.all_reduce(total)
    return total / dist.get_world_size()


def check_same(losses: Tensor, want: list[float]) -> None:
    assert want[-1] < want[0] and torch.allclose(losses, torch.tensor(want), rtol=1e-5), (losses, want)


def check_saved(name: str, want: nn.Module) -> None:
    """The adapter that rank 0 saved is the one that one process trained."""
    dist.barrier()
    saved = peft.PeftModel.from_pretrained(base(), Path(os.environ["CHECKS"], name))
    assert torch.allclose(logits(saved, BATCH), logits(want, BATCH), atol=1e-4)


def ddp_trains_adapters_as_one_process_does() -> None:
    want, one = expected()
    model = DistributedDataParallel(adapted())
    check_same(mean_over_ranks(train(model, mine())), want)
    if dist.get_rank() == 0:
        model.module.save_pretrained(os.environ["CHECKS"] + "/ddp")
    check_saved("ddp", one)


def ddp_trains_scales_with_the_adapters() -> None:
    one, other = adapted(), adapted()
    with train_scales(one):
        want = train(one, BATCH)
    with train_scales(other):
        losses = train(DistributedDataParallel(other), mine())
    check_same(mean_over_ranks(losses), want)
    names = [name for name, p in one.named_parameters() if isinstance(p, HQQTensor)]
    for name in names:
        assert torch.allclose(other.get_parameter(name).dequantize(), one.get_parameter(name).dequantize(), atol=1e-3)


def fsdp_trains_adapters_as_one_process_does() -> None:
    want, one = expected()
    model = adapted()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (*model.get_base_model().model.layers, model):
        fully_shard(layer, mesh=mesh)
    check_same(mean_over_ranks(train(model, mine())), want)
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)  # all processes take part, rank 0 has the result
    if dist.get_rank() == 0:
        assert state and not any(isinstance(value, HQQTensor) for value in state.values())
        model.save_pretrained(os.environ["CHECKS"] + "/fsdp", state_dict=state)
    check_saved("fsdp", one)


def the_trainer_trains_adapters_as_one_process_does() -> None:
    rank, processes = str(dist.get_rank()), dist.get_world_size()
    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost"}
    os.environ |= {**torchrun, "MASTER_PORT": "0"}
    try:
        rows = [{"input_ids": row, "labels": row} for row in BATCH]
        options = {"use_cpu": True, "max_steps": 2, "report_to": [], "logging_steps": 1, "learning_rate": 1e-2}
        options |= {"save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        folder = os.environ["CHECKS"]
        size = len(BATCH) // processes
        args = tf.TrainingArguments(f"{folder}/out", per_device_train_batch_size=size, **options)
        assert args.world_size == processes
        model = adapted()
        trainer = tf.Trainer(model=model, args=args, train_dataset=rows)
        trainer.train()
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
        trainer.save_model(f"{folder}/trainer")
    finally:
        for name in (*torchrun, "MASTER_PORT"):
            del os.environ[name]
    one = adapted()
    train(one, BATCH, steps=2)
    check_saved("trainer", one)


class Stage(nn.Module):
    """A part of a pipeline: a quantized layer with an adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(64, 64)
        self.down, self.up = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.frozen(x) + self.up(self.down(x)))


def stages() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(Stage(), Stage())
    quantize_(model, HqqConfig(4, 32), filter_fn=lambda module, name: name.endswith("frozen"))
    for p in model.parameters():
        p.requires_grad_(not isinstance(p, HQQTensor))
    return model


def a_pipeline_of_stages_has_the_gradients_of_one_process() -> None:
    one, rank = stages(), dist.get_rank()
    x, want = (torch.randn(8, 64, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    nn.functional.mse_loss(one(x), want).backward()
    part = stages()[rank]
    schedule = ScheduleGPipe(PipelineStage(part, rank, 2, torch.device("cpu")), 2, loss_fn=nn.functional.mse_loss)
    if rank == 0:
        schedule.step(x)
    else:
        schedule.step(target=want)
    assert isinstance(part.frozen.weight, HQQTensor)
    for (name, got), p in zip(part.named_parameters(), one[rank].parameters(), strict=True):
        if p.requires_grad:
            assert torch.allclose(got.grad, p.grad, atol=1e-6), name
