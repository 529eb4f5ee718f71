import copy

import pytest
import torch
from torch import nn

from hqqtensor import HqqConfig, quantize_
from hqqtensor.calibration import finetune

OPTIONS = [
    {"nbits": 2}, {"nbits": 3, "axis": 0}, {"nbits": 2, "quant_scale": True, "quant_zero": True},
    {"nbits": 2, "format": "codebook", "quant_scale": True}, {"nbits": 4, "format": "nf4"},
    {"nbits": 2, "rotation": True}, {"nbits": 2, "quant_scale": True, "quant_zero": True, "meta_nbits": 4},
    {"nbits": 2, "solver": "column_scaled"}, {"nbits": 2, "integer_zero": True},
]  # fmt: skip


def models(**options) -> tuple[nn.Sequential, nn.Sequential, list[torch.Tensor]]:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 32))
    quantized = copy.deepcopy(dense)
    quantize_(quantized, HqqConfig(**{"group_size": 32, **options}))
    return quantized, dense, [torch.randn(64, 64) for _ in range(4)]


def error(model: nn.Module, dense: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return ((model(x) - dense(x)).square().sum() / dense(x).square().sum()).item()


@pytest.mark.parametrize("options", OPTIONS)
def test_outputs_come_nearer_on_batches_not_seen_and_codes_stay(options) -> None:
    model, dense, batches = models(**options)
    old = {n: p.detach() for n, p in model.named_parameters() if n.endswith("weight")}
    fresh = torch.randn(256, 64)
    before = error(model, dense, fresh)
    steps: list[tuple[int, int, str]] = []
    done = finetune(model, dense, batches, steps=60, lr=5e-3, progress=lambda *a: steps.append(a))
    assert done.kept and done.tuned == ["0", "2", "4"] and done.left == []
    assert done.after == pytest.approx(sum(error(model, dense, b) for b in batches) / 4, rel=1e-3)
    assert done.after < 0.95 * done.before and error(model, dense, fresh) < before
    assert [s[:2] for s in steps] == [(i + 1, 60) for i in range(60)] and steps[-1][2].startswith("loss ")
    for name, weight in old.items():
        new = model.get_parameter(name)
        assert torch.equal(new.qdata, weight.qdata) and new.describe() == weight.describe()
        assert new.scale.dtype == weight.scale.dtype and new.nbytes == weight.nbytes
        if options.get("integer_zero"):
            assert torch.equal(new.zero_point, weight.zero_point)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_numbers_that_do_no_good_are_not_kept() -> None:
    model, dense, batches = models(nbits=4)
    old = copy.deepcopy(model.state_dict())
    done = finetune(model, dense, batches, steps=3, lr=1.0)
    assert not done.kept and done.after >= done.before
    assert all(torch.equal(value, old[key]) for key, value in model.state_dict().items())


def test_an_error_on_the_way_leaves_the_model_as_it_was() -> None:
    model, dense, batches = models(nbits=2)
    old = copy.deepcopy(model.state_dict())

    def stop(done: int, total: int, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(model, dense, batches, progress=stop)
    with pytest.raises(ValueError, match="do not fit the dense model's"):
        finetune(model, dense[:3], batches)
    assert all(torch.equal(value, old[key]) for key, value in model.state_dict().items())
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_tied_weights_are_tuned_once_and_stay_tied() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    dense[2].weight = dense[0].weight
    model = copy.deepcopy(dense)
    quantize_(model, HqqConfig(2, 32))
    done = finetune(model, dense, [torch.randn(64, 64)], steps=20)
    assert done.kept and model[0].weight is model[2].weight


def test_what_cannot_be_tuned_is_said() -> None:
    _, dense, batches = models(nbits=2)
    with pytest.raises(ValueError, match="nothing to train"):
        finetune(copy.deepcopy(dense), dense, batches)
    for bad in ({"steps": 0}, {"lr": 0.0}, {"batches": []}):
        with pytest.raises(ValueError, match="finetune needs batches"):
            finetune(dense, dense, **{"batches": batches, **bad})
