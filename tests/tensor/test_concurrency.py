"""Quantized weights in threads, in worker processes, and sent between processes."""

from pathlib import Path

import torch
from fresh_python import run_fresh
from ranks import run_checks
from torch import nn

from hqqtensor import HqqConfig, HQQTensor, quantize_


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Embedding(50, 128), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))
    quantize_(layers, HqqConfig(3, 64), filter_fn=lambda module, name: True)
    return layers


def test_threads_share_a_model_forward_and_backward() -> None:
    from concurrent.futures import ThreadPoolExecutor

    layers = model()
    parameters = list(layers.parameters())
    assert sum(isinstance(p, HQQTensor) for p in parameters) == 3

    def run(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(0, 50, (4,), generator=torch.Generator().manual_seed(seed))
        x = layers[0](ids).detach().requires_grad_()
        y = layers[1:](x)
        y.square().sum().backward(inputs=[x])
        return y.detach(), x.grad

    alone = [run(seed) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, list(range(16)) * 4))
    for i, (y, grad) in enumerate(together):
        assert torch.equal(y, alone[i % 16][0]) and torch.equal(grad, alone[i % 16][1])


WORKERS = """
    import torch
    from torch.utils.data import DataLoader, Dataset
    from hqqtensor import HqqConfig, HQQTensor

    weight = HQQTensor.from_hp(torch.randn(64, 128), HqqConfig(4, 64))
    torch.nn.functional.linear(torch.ones(64, 128), weight)  # the threads of this process have started

    class Rows(Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            return torch.nn.functional.linear(torch.full((128,), float(i)), weight)

    loader = DataLoader(Rows(), batch_size=2, num_workers=2, timeout=60)
    got = torch.cat(list(loader))
    want = torch.nn.functional.linear(torch.arange(6.0)[:, None].expand(-1, 128), weight)
    assert (got - want).abs().max() < 1e-3, (got - want).abs().max()
"""


def test_data_loader_workers_use_a_weight() -> None:
    result = run_fresh(WORKERS)
    assert result.returncode == 0, result.stderr


def test_weights_are_sent_between_processes_and_share_their_memory(tmp_path: Path) -> None:
    names = ["a_weight_goes_through_a_queue_and_shares_its_memory"]
    assert run_checks("sharing_checks", Path(__file__).parent, names, 1, tmp_path) == {names[0]: []}
