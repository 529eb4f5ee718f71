"""Gradients of the products, by the public operators and by the functions that the package calls."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from hqqtensor import HqqConfig, HQQTensor, backend, ops
from hqqtensor.ops import PackedWeight
from hqqtensor.ops.definitions import join_many
from hqqtensor.ops.packed import flat

OPS = torch.ops.hqqtensor
K = 96
SETTINGS = [{}, {"axis": 0}, {"quant_scale": True, "quant_zero": True}, {"format": "codebook"}]


def packed(*shape: int, **settings: object) -> PackedWeight:
    config = HqqConfig(**{"nbits": 4, "group_size": 8, **settings})  # type: ignore[arg-type]
    return HQQTensor.from_hp(torch.randn(*shape, K, generator=torch.manual_seed(sum(shape))), config).operand()


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.manual_seed(9)).to(dtype).requires_grad_()


def assert_gradients(product: Callable[[], Tensor], dense: Callable[[], Tensor], *leaves: Tensor) -> None:
    got, want = product(), dense()
    assert got.requires_grad
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
    grad = torch.randn(want.shape, generator=torch.manual_seed(3))
    for a, b in zip(*(torch.autograd.grad(y, leaves, grad) for y in (got, want)), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_linear(settings: dict, choice: str) -> None:
    w, x, bias, act = packed(12, **settings), leaf(2, 5, K), leaf(12, dtype=torch.bfloat16), torch.rand(K) + 0.5
    dense = ops.dequantize(w, torch.float32)
    flattened = flat("linear", (x, w, bias, act, "float"))
    with backend(choice):
        for product in (lambda: ops.linear(x, w, bias, act), lambda: OPS.linear(*flattened)):
            assert_gradients(product, lambda: (x * act) @ dense.T + bias.float(), x, bias)
        alone = ops.linear(x.detach(), w, bias)  # only the bias
        torch.testing.assert_close(torch.autograd.grad(alone.sum(), bias)[0], torch.full_like(bias, 10))


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_linear_many(settings: dict, choice: str) -> None:
    weights, x = [packed(n, **settings) for n in (12, 9, 12)], leaf(5, K)
    biases = [leaf(12), leaf(9), leaf(12)]
    dense = torch.cat([ops.dequantize(w, torch.float32) for w in weights])
    with backend(choice):
        for product in (
            lambda: ops.linear_many(x, weights, biases),
            lambda: OPS.linear_many(*join_many(x, weights, biases, "float")),
        ):
            assert_gradients(product, lambda: x @ dense.T + torch.cat(biases), x, *biases)
        assert_gradients(lambda: ops.linear_many(x, weights), lambda: x @ dense.T, x)
        with torch.no_grad():  # to the last bit what single products give, quantized scales included
            each = torch.cat([ops.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], -1)
            assert torch.equal(ops.linear_many(x, weights, biases), each)


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_experts(settings: dict, choice: str) -> None:
    w, batch, rows, act = packed(3, 12, **settings), leaf(3, 4, K), leaf(9, K), torch.rand(K) + 0.5
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)
    dense = ops.dequantize(w, torch.float32)

    def grouped() -> Tensor:
        parts = [rows[:2] * act @ dense[0].T, rows[2:7] * act @ dense[2].T, torch.zeros(2, 12)]
        return torch.cat(parts)

    with backend(choice):
        for batched in (
            lambda: ops.batched_linear(batch, w, act),
            lambda: OPS.batched_linear(*flat("batched_linear", (batch, w, act, "float"))),
        ):
            assert_gradients(batched, lambda: (batch * act) @ dense.mT, batch)
        for runs in (
            lambda: ops.grouped_linear(rows, ends, w, act),
            lambda: OPS.grouped_linear(*flat("grouped_linear", (rows, ends, w, act, "float"))),
        ):
            assert_gradients(runs, grouped, rows)


@pytest.mark.parametrize("settings", [{}, {"quant_scale": True}], ids=str)
def test_operators_keep_torchs_contract(settings: dict) -> None:
    """Schemas, fake kernels, autograd and AOTAutograd with static and dynamic shapes, by torch's own checks."""
    w, many, experts = packed(12, **settings), [packed(12, **settings)] * 2, packed(2, 12, **settings)
    x, ends = leaf(3, K), torch.tensor([1, 3], dtype=torch.int32)
    for name, args in {
        "linear": flat("linear", (x, w, leaf(12), None, "float")),
        "linear_many": join_many(x, many, [None, None], "float"),
        "batched_linear": flat("batched_linear", (leaf(2, 4, K), experts, torch.rand(K), "float")),
        "grouped_linear": flat("grouped_linear", (x, ends, experts, None, "float")),
        "dequantize": flat("dequantize", (experts, torch.bfloat16)),
        "embedding": flat("embedding", (torch.tensor([[1], [11]]), w, torch.float16)),
        "dequantize_into": flat("dequantize_into", (torch.empty(12, K), w)),
    }.items():
        checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        # The gradient of runs of rows reads the offsets, which a graph cannot.
        kept = checks[:3] if name == "grouped_linear" else checks
        torch.library.opcheck(getattr(OPS, name).default, args, test_utils=kept)


def test_compiled_training_has_the_gradients_of_eager_code() -> None:
    q = HQQTensor.from_hp(torch.randn(16, K, generator=torch.manual_seed(0)), HqqConfig(4, 8))
    x, bias = leaf(3, K), leaf(16)

    def loss(x: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, q, bias).square().sum()

    torch._dynamo.reset()
    got, want = (torch.autograd.grad(f(x, bias), (x, bias)) for f in (torch.compile(loss, backend="aot_eager"), loss))
    torch.testing.assert_close(got, want)


def test_without_a_gradient_none_is_recorded() -> None:
    w, x, bias = packed(12), torch.randn(3, K), torch.randn(12)
    assert not ops.linear(x, w, bias).requires_grad
    with torch.no_grad():
        assert not ops.linear(leaf(3, K), w, leaf(12)).requires_grad
    with torch.inference_mode():
        assert ops.linear(torch.randn(3, K), w).is_inference()


def assert_tangents(product: Callable[..., Tensor], dense: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Forward mode, by dual tensors and by ``torch.func.jvp``."""
    inputs = tuple(t.detach() for t in inputs)
    tangents = tuple(torch.randn(t.shape, generator=torch.manual_seed(4)).to(t.dtype) for t in inputs)
    want = torch.func.jvp(dense, inputs, tangents)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(product(*map(forward_ad.make_dual, inputs, tangents)))
        torch.testing.assert_close((dual.primal, dual.tangent), want, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(torch.func.jvp(product, inputs, tangents), want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_tangents_of_every_product(settings: dict) -> None:
    w, experts, act = packed(12, **settings), packed(2, 12, **settings), torch.rand(K) + 0.5
    x, bias, ends = leaf(3, K), leaf(12), torch.tensor([1, 3], dtype=torch.int32)
    dense, stack = ops.dequantize(w, torch.float32), ops.dequantize(experts, torch.float32)
    for linear in (ops.linear, lambda *args: OPS.linear(*flat("linear", (*args, "float")))):
        assert_tangents(lambda x, b, f=linear: f(x, w, b, act), lambda x, b: (x * act) @ dense.T + b, x, bias)
        assert_tangents(lambda b, f=linear: f(x.detach(), w, b, act), lambda b: (x.detach() * act) @ dense.T + b, bias)
    for many in (ops.linear_many, lambda *args: OPS.linear_many(*join_many(*args, "float"))):
        both = lambda x, b, f=many: f(x, [w, w], [b, b])  # noqa: E731
        assert_tangents(both, lambda x, b: (x @ dense.T + b).repeat(1, 2), x, bias)
    assert_tangents(lambda x: ops.batched_linear(x, experts, act), lambda x: (x * act) @ stack.mT, leaf(2, 4, K))
    assert_tangents(
        lambda x: ops.grouped_linear(x, ends, experts, act),
        lambda x: torch.cat([(x[:1] * act) @ stack[0].T, (x[1:] * act) @ stack[1].T]),
        x,
    )


def test_tangents_of_a_layer_under_other_transforms() -> None:
    q = HQQTensor.from_hp(torch.randn(16, K, generator=torch.manual_seed(0)), HqqConfig(4, 8))
    dense, x, t = q.dequantize(), leaf(5, K).detach(), torch.randn(5, K, generator=torch.manual_seed(1))

    def loss(weight: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.nn.functional.linear(x, weight).square().sum()

    def layer(weight: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.nn.functional.linear(x, weight)

    for transformed in (
        lambda w: torch.func.jacfwd(layer(w))(x[0]),
        lambda w: torch.func.hessian(loss(w))(x[0]),
        lambda w: torch.func.jvp(torch.func.vmap(layer(w)), (x,), (t,)),
        lambda w: torch.func.vmap(lambda t: torch.func.jvp(layer(w), (x[0],), (t,)))(t),
        lambda w: torch.func.vmap(torch.func.grad(loss(w)))(x),
    ):
        torch.testing.assert_close(transformed(q), transformed(dense), atol=1e-3, rtol=1e-3)


def test_tangents_do_not_see_that_activations_were_rounded() -> None:
    w, x, t = packed(12), torch.randn(3, K), torch.randn(3, K)
    out, tangent = torch.func.jvp(lambda x: ops.linear(x, w, activation="int8"), (x,), (t,))
    assert torch.equal(out, ops.linear(x, w, activation="int8"))
    torch.testing.assert_close(tangent, t @ ops.dequantize(w, torch.float32).T, atol=1e-3, rtol=1e-3)
    with pytest.raises(NotImplementedError, match=r"linear: torch.func cannot differentiate int8 activations"):
        torch.func.jvp(lambda x: OPS.linear(*flat("linear", (x, w, None, None, "int8"))), (x,), (t,))
