"""What ``test_concurrency.py`` runs in a process that may start others."""

from typing import Any

import torch
import torch.multiprocessing as mp

from hqqtensor import HqqConfig, HQQTensor


def answer(inbox: Any, outbox: Any) -> None:
    """Multiply with the weight that comes in, then give all of its rows the codes of the first; until None comes."""
    torch.set_num_threads(1)
    while (weight := inbox.get(timeout=60)) is not None:
        outbox.put(torch.nn.functional.linear(torch.eye(128), weight))
        weight[1:].qdata.copy_(weight.qdata[:1].expand(63, -1))
        outbox.put("changed")


def a_weight_goes_through_a_queue_and_shares_its_memory() -> None:
    context = mp.get_context("fork")
    inbox, outbox = context.Queue(), context.Queue()
    child = context.Process(target=answer, args=(inbox, outbox))
    child.start()
    for settings in ({}, {"quant_scale": True, "quant_zero": True}):
        weight = HQQTensor.from_hp(torch.randn(64, 128), HqqConfig(4, 64, **settings))
        product = torch.nn.functional.linear(torch.eye(128), weight)
        inbox.put(weight)
        assert torch.equal(outbox.get(timeout=60), product)
        assert outbox.get(timeout=60) == "changed"
        assert torch.equal(weight.qdata, weight.qdata[:1].expand(64, -1))  # one memory
    inbox.put(None)
    child.join(60)
    assert child.exitcode == 0
