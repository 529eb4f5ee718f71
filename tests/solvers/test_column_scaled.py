import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hqqtensor import HqqConfig, HQQTensor, quantize_
from hqqtensor.transforms.column_scale import LIMIT, column_scale


def uneven(rows: int = 64, columns: int = 128) -> torch.Tensor:
    """Every eighth column ten times as wide as the others."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    w[:, ::8] *= 10
    return w


def quantized(w: torch.Tensor, **options: object) -> HQQTensor:
    return HQQTensor.from_hp(w, HqqConfig(4, 32, solver="column_scaled", **options))  # type: ignore[arg-type]


def test_narrow_columns_keep_more_of_their_weights():
    w = uneven()
    narrow = [k for k in range(128) if k % 8]
    plain = HQQTensor.from_hp(w, HqqConfig(4, 32)).dequantize() - w
    scaled = quantized(w).dequantize() - w
    assert scaled[:, narrow].square().sum() < 0.5 * plain[:, narrow].square().sum()


def test_linear_multiplies_activations_by_the_column_scale():
    w, x = uneven(), torch.randn(3, 128)
    q = quantized(w)
    assert q.act_pre_scale is not None and q.act_pre_scale.dtype == torch.float16
    expected = x @ q.dequantize().T
    torch.testing.assert_close(torch.nn.functional.linear(x, q), expected, rtol=1e-4, atol=1e-3)


def test_bytes_count_the_column_scale():
    w = uneven()
    assert quantized(w).nbytes == HQQTensor.from_hp(w, HqqConfig(4, 32)).nbytes + 2 * 128


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.floats(-30, 30), st.integers(0, 1000))
def test_column_scales_are_bounded_and_do_not_depend_on_the_size_of_weights(rows, columns, exponent, seed):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    w[:, 0] = 0
    scale = column_scale(w)
    assert scale.shape == (columns,) and scale[0] == 1
    assert bool(((scale >= 1 / LIMIT) & (scale <= LIMIT)).all())
    torch.testing.assert_close(column_scale(w * 10**exponent), scale, rtol=1e-3, atol=1e-5)


def test_rows_of_different_size_do_not_change_the_column_scale():
    w = uneven()
    rows = torch.logspace(-3, 3, 64).unsqueeze(1)
    torch.testing.assert_close(column_scale(w * rows), column_scale(w), rtol=0.05, atol=0.05)


def test_the_weight_is_left_as_it_was():
    w = uneven()
    quantized(w)
    assert torch.equal(w, uneven())


def test_zeros_stay_zeros():
    q = quantized(torch.zeros(8, 64))
    assert bool((q.dequantize() == 0).all())


def test_axis_0_is_refused_and_the_model_left_as_it_was():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    before = model[0].weight
    with pytest.raises(ValueError, match=r"0\.weight.*axis 1"):
        quantize_(model, HqqConfig(4, 32, axis=0, solver="column_scaled"))
    assert model[0].weight is before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_view_as_float_and_half_precision_weights(dtype):
    w = uneven().to(dtype)
    q = quantized(w, view_as_float=True)
    assert q.dtype == dtype and q.qdata.dtype == dtype
    error = (q.dequantize().float() - w.float()).square().sum() / w.float().square().sum()
    assert error < 0.01


def test_experts_share_the_column_scale():
    w = torch.stack([uneven(), uneven() * 3])
    q = quantized(w)
    x = torch.randn(2, 5, 128)
    expected = torch.bmm(x, q.dequantize().transpose(1, 2))
    torch.testing.assert_close(torch.bmm(x, q.transpose(1, 2)), expected, rtol=1e-4, atol=1e-3)
