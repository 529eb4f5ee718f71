"""Several products of one input in one call give, bit for bit, what one call for each gives."""

import pytest
import torch
from in_threads import wrong_results
from torch import Tensor

from hqqtensor import HqqConfig, HQQTensor, backend, ops


def apart(x: Tensor, weights: list[HQQTensor], biases: list[Tensor]) -> Tensor:
    each = zip(weights, biases or [None] * len(weights), strict=True)
    return torch.cat([ops.linear(x, w.operand(), b, w.act_pre_scale, w.activation) for w, b in each], -1)


def together(x: Tensor, weights: list[HQQTensor], biases: list[Tensor]) -> Tensor:
    acts = [w.act_pre_scale for w in weights]
    return ops.linear_many(x, [w.operand() for w in weights], biases, weights[0].activation, acts)


def packed(**options: object) -> list[HQQTensor]:
    generator = torch.manual_seed(0)
    config = HqqConfig(**{"nbits": 4, "group_size": 64, **options})  # type: ignore[arg-type]
    return [HQQTensor.from_hp(torch.randn(n, 200, generator=generator), config) for n in (64, 70, 300)]


@pytest.mark.parametrize("shape", [(1,), (1, 1), (3,), (2, 10), (600,), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nbits": 8},
        {"nbits": 3, "axis": 0},
        {"activation": "int8"},
        {"format": "nf4"},
        {"format": "codebook"},
        {"group_size": None},
        {"group_size": "auto"},
        {"solver": "column_scaled", "activation": "int8"},
        {"nbits": 2, "group_size": 16, "quant_scale": True, "quant_zero": True, "meta_nbits": 4},
    ],
    ids=str,
)
def test_results_are_those_of_single_products(options: dict, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weights = packed(**options)
    x = torch.randn(*shape, 200, generator=torch.manual_seed(1)).to(dtype)
    biases = [torch.randn(w.shape[0], generator=torch.manual_seed(2)) for w in weights]
    for b in ([], biases):
        assert torch.equal(together(x, weights, b), apart(x, weights, b))
    strided = torch.randn(200, *shape, generator=torch.manual_seed(1)).to(dtype).movedim(0, -1)
    assert torch.equal(together(strided, weights, []), apart(strided.contiguous(), weights, []))


def test_activations_that_integers_cannot_stand_for_pass_through() -> None:
    x = torch.randn(2, 200)
    x[1, 3] = float("nan")
    for activation in ("float", "int8"):
        out = together(x, packed(activation=activation), [])
        assert out[1].isnan().all() and not out[0].isnan().any()


def test_a_chosen_backend_serves_it() -> None:
    x, weights = torch.randn(2, 200), packed()
    with backend("reference"):
        assert torch.equal(together(x, weights, []), apart(x, weights, []))


def test_many_threads_at_a_time_get_their_own_results() -> None:
    weights = packed()
    inputs = [torch.randn(1, 200, generator=torch.manual_seed(i)) for i in range(8)]
    want = [apart(x, weights, []) for x in inputs]
    calls = [lambda x=x: together(x, weights, []) for x in inputs]
    assert not wrong_results(calls, want, rounds=200)
