import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal import common_utils
from torchao.testing import utils as torchao_cases

from hqqtensor import HqqConfig, HQQTensor, backend


@pytest.fixture(autouse=True)
def plain_path():
    """What the tensor does is compared to the last bit; kernels have bounds of their own in tests/kernels."""
    with backend("reference"):
        yield


def quantized(shape=(96, 256), dtype=torch.float32, **options) -> HQQTensor:
    w = torch.randn(*shape, generator=torch.manual_seed(0)).to(dtype)
    return HQQTensor.from_hp(w, HqqConfig(**{"nbits": 4, "group_size": 64, **options}))


def metadata(nbits: int | None) -> dict[str, bool | int]:
    """Options for scales and zero points in ``nbits`` bits, or plain ones."""
    return {} if nbits is None else {"quant_scale": True, "quant_zero": True, "meta_nbits": nbits}


class HQQBasic(common_utils.TestCase):
    TENSOR_SUBCLASS = HQQTensor
    FACTORY_FN = staticmethod(HQQTensor.from_hp)
    kwargs = {"config": HqqConfig(8, 64)}
    LINEAR_MIN_SQNR = 40
    COMPILE_MIN_SQNR = 50


class HQQCompile(HQQBasic):
    pass


torchao_cases.copy_tests(torchao_cases.TorchAOBasicTestCase, HQQBasic, "hqq")
torchao_cases.copy_tests(torchao_cases.TorchAOCompileTestCase, HQQCompile, "hqq")
if not torch.cuda.is_available():  # calls .cuda()
    HQQBasic.test_device1_to_device2_device1_cpu_device2_cpu_hqq = None


@settings(deadline=None, max_examples=60)
@given(
    nbits=st.integers(1, 8),
    group_size=st.sampled_from([8, 16, 24, 32, 64, None]),
    axis=st.sampled_from([0, 1]),
    shape=st.tuples(st.integers(64, 90), st.integers(64, 300)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    meta=st.sampled_from([None, 8, 4]),
)
def test_every_setting_gives_a_close_weight_and_its_linear(nbits, group_size, axis, shape, dtype, meta) -> None:
    w = torch.randn(*shape, generator=torch.manual_seed(1)).to(dtype)
    q = HQQTensor.from_hp(w, HqqConfig(nbits, group_size, axis=axis, **metadata(meta)))
    d = q.dequantize()
    assert d.shape == w.shape and d.dtype == dtype
    relative = ((d - w).float().square().sum() / w.float().square().sum()).item()
    # 3-sigma full-range rounding of a Gaussian: (range / levels)^2 / 12, plus the dtype's own rounding. The zero
    # points of short last groups can lie far apart and share a scale: in 8 bits or 4 they are then coarse.
    assert relative < (8 / (2**nbits - 1)) ** 2 / 12 + {None: 1e-4, 8: 1e-2, 4: 0.1}[meta]
    x = torch.randn(3, shape[1]).to(dtype)
    assert_same_product(F.linear(x, q), F.linear(x, d))


def assert_same_product(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal but for the order of float32 sums, whose error belongs to what is largest, not to each result."""
    assert got.dtype == want.dtype and got.shape == want.shape
    if want.numel():
        assert (got - want).abs().max() <= 2e-6 * want.abs().max()


def test_linear_takes_keywords_bias_any_rank_and_empty_batches() -> None:
    q, b = quantized(), torch.randn(96)
    d = q.dequantize()
    for lead in ((), (3,), (2, 3), (0,), (2, 0, 3)):
        x = torch.randn(*lead, 256)
        assert_same_product(F.linear(x, weight=q, bias=b), F.linear(x, d, b))


def test_linear_gives_gradients_to_input_and_bias() -> None:
    torch.manual_seed(0)
    q = quantized()
    x, b = torch.randn(5, 256, requires_grad=True), torch.randn(96, requires_grad=True)
    F.linear(x, q, b).square().sum().backward()
    x2, b2 = x.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
    F.linear(x2, q.dequantize(), b2).square().sum().backward()
    size = x2.grad.abs().max()  # sums of other orders: an error of float32 in what is largest
    assert (x.grad - x2.grad).abs().max() < 1e-6 * size
    assert_same_product(b.grad, b2.grad)


def test_matrix_products_equal_the_dense_ones() -> None:
    q = quantized()
    d, x, b = q.dequantize(), torch.randn(5, 256), torch.randn(96)
    assert_same_product(torch.mm(x, q.t()), x @ d.t())
    assert_same_product(x @ q.transpose(0, 1), x @ d.t())
    assert_same_product(torch.addmm(b, x, q.t()), torch.addmm(b, x, d.t()))
    assert_same_product(torch.randn(2, 96).new_ones(2, 96) @ q, torch.ones(2, 96) @ d)
    e = quantized((3, 96, 256))
    y = torch.randn(3, 7, 256)
    assert_same_product(torch.bmm(y, e.transpose(1, 2)), torch.bmm(y, e.dequantize().transpose(1, 2)))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("meta", [None, 8, 4])
def test_embedding_equals_rows_of_the_dense_weight(axis: int, meta: int | None) -> None:
    q = quantized((96, 200), axis=axis, group_size=16, **metadata(meta))
    ids = torch.randint(0, 96, (2, 5))
    torch.testing.assert_close(F.embedding(ids, q), F.embedding(ids, q.dequantize()), atol=0, rtol=0)


def test_to_changes_the_dtype_and_keeps_the_codes() -> None:
    q = quantized()
    for dtype, other in ((torch.bfloat16, q.to(torch.bfloat16)), (torch.float16, q.half())):
        assert other.dtype == dtype and other.dequantize().dtype == dtype
        assert torch.equal(other.qdata, q.qdata) and torch.equal(other.scale, q.scale)
    layer = torch.nn.Linear(256, 96, bias=False)
    layer.weight = torch.nn.Parameter(q, requires_grad=False)
    layer.to(torch.float16)
    assert isinstance(layer.weight, HQQTensor) and layer.weight.dtype == torch.float16
    assert layer.weight.qdata.dtype == torch.uint8 and torch.equal(layer.weight.qdata, q.qdata)


@pytest.mark.parametrize("meta", [None, 8, 4])
def test_to_another_device_moves_all_data(meta: int | None) -> None:
    q = quantized(**metadata(meta)).to("meta", torch.bfloat16)
    assert q.device.type == "meta" and q.dtype == torch.bfloat16 and q.dequantize().shape == (96, 256)
    assert all(t.device.type == "meta" for t in (*q.operand()[:3], *(q.operand().meta or ())))


def test_copies_pickles_and_weights_only_loading_keep_every_bit() -> None:
    q = quantized(quant_zero=True)
    file = io.BytesIO()
    torch.save({"w": q}, file)
    file.seek(0)
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q)), torch.load(file, weights_only=True)["w"], q.clone()):
        assert torch.equal(q, other)


def test_shared_memory_is_shared() -> None:
    q = quantized()
    assert not q.is_shared()
    assert q.share_memory_() is q and q.is_shared()


def _add_one_row(q: HQQTensor) -> None:
    q.scale[0] += 1


def test_shared_memory_reaches_other_processes() -> None:
    q = quantized().share_memory_()
    before = q.scale[:2].clone()
    process = torch.multiprocessing.get_context("spawn").Process(target=_add_one_row, args=(q,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert torch.equal(q.scale[0], before[0] + 1) and torch.equal(q.scale[1], before[1])


def test_pin_memory_pins_every_part_or_says_what_is_missing() -> None:
    q = quantized()
    if torch.cuda.is_available():
        assert q.pin_memory().is_pinned()
    else:
        with pytest.raises(RuntimeError, match=r"(?i)accelerator|cuda|pin|driver"):
            q.pin_memory()


def test_cache_key_depends_on_the_settings_and_not_on_the_numbers() -> None:
    key = quantized()._stable_hash_for_caching()
    assert key == HQQTensor.from_hp(torch.ones(96, 256), HqqConfig(4, 64))._stable_hash_for_caching()
    others = [quantized(nbits=3), quantized(group_size=32), quantized((95, 256)), quantized(quant_scale=True)]
    others.append(quantized(quant_scale=True, meta_nbits=4))
    assert len({key, *(o._stable_hash_for_caching() for o in others)}) == 6


def test_autocast_computes_in_its_dtype() -> None:
    q, x = quantized(), torch.randn(3, 256)
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, q)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, F.linear(x.bfloat16(), q.to(torch.bfloat16)))


def test_nbytes_counts_the_packed_data() -> None:
    q = quantized((96, 256), nbits=3)
    assert q.nbytes == 96 * 256 * 3 // 8 + 2 * 2 * 96 * 4


def test_view_as_float_keeps_the_bytes() -> None:
    q, f = quantized(), quantized(view_as_float=True)
    assert f.qdata.dtype == torch.float32
    assert torch.equal(f.dequantize(), q.dequantize())


def test_repr_says_what_it_is() -> None:
    assert repr(quantized()) == (
        "HQQTensor([96, 256], 4-bit int, group_size=64, axis=1, scale=float16, zero_point=float16, "
        "dtype=float32, device=cpu)"
    )


def test_tiny_and_far_off_weights_keep_their_precision() -> None:
    w = torch.randn(8, 128, generator=torch.manual_seed(2))
    for weight in (w * 1e-8, w * 1e20, w * 1e-3 + 5):
        d = HQQTensor.from_hp(weight, HqqConfig(8, 64)).dequantize()
        spread = (weight - weight.mean()).square().sum()
        assert (d - weight).square().sum() < 1e-3 * spread


def test_constant_groups_are_exact() -> None:
    for value in (0.0, 0.5, -2.0):
        for solver in ("rtn", "hqq_joint"):
            w = torch.full((4, 64), value)
            assert torch.equal(HQQTensor.from_hp(w, HqqConfig(2, 64, solver=solver)).dequantize(), w)


@pytest.mark.parametrize("options", [{}, {"quant_scale": True, "quant_zero": True}], ids=str)
def test_an_operator_can_be_called_by_its_arguments(options) -> None:
    w = HQQTensor.from_hp(torch.randn(16, 64, generator=torch.manual_seed(0)), HqqConfig(4, 16, **options))
    qdata, scale, zero_point = w.packed()
    got = torch.ops.hqqtensor.dequantize(qdata, scale, zero_point, *w.settings(), w.dtype)
    assert torch.equal(got, w.dequantize())
