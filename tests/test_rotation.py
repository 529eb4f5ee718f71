import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hqqtensor import HqqConfig, HQQTensor, load_model, quantize_, save_model
from hqqtensor.calibration import calibrate
from hqqtensor.serialization.layout import CheckpointError, build, flatten, parse_entry
from hqqtensor.transforms import block_of, rotate


def weight(out_features: int = 48, in_features: int = 192, outliers: bool = True) -> torch.Tensor:
    w = torch.randn(out_features, in_features, generator=torch.manual_seed(0)) * 0.02
    if outliers:
        w[torch.rand(w.shape) < 0.01] *= 20
    return w


def rotated(w: torch.Tensor, **options) -> HQQTensor:
    return HQQTensor.from_hp(w, HqqConfig(**{"nbits": 8, "group_size": 32, "rotation": True, **options}))


@settings(deadline=None, max_examples=30)
@given(block=st.sampled_from([8, 16, 64, 256]), blocks=st.integers(1, 3), seed=st.integers(0, 99))
def test_rotating_keeps_lengths_and_undoes_itself(block: int, blocks: int, seed: int) -> None:
    x = torch.randn(3, block * blocks, generator=torch.manual_seed(seed))
    y = rotate(x, block)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(y, block), x, atol=1e-5, rtol=1e-5)
    one = torch.zeros(block)
    one[seed % block] = 1
    torch.testing.assert_close(rotate(one, block).abs(), torch.full((block,), block**-0.5))


@pytest.mark.parametrize(("in_features", "block"), [(256, 256), (704, 64), (384, 128), (4096, 4096), (11008, 256)])
def test_blocks_are_the_largest_power_of_two_that_fits(in_features: int, block: int) -> None:
    assert block_of(in_features) == block


@pytest.mark.parametrize("options", [{}, {"axis": 0}, {"solver": "column_scaled"}, {"nbits": 4, "format": "nf4"},
                                     {"quant_scale": True, "quant_zero": True}, {"rotation_seed": 7},
                                     {"quant_scale": True, "quant_zero": True, "meta_nbits": 4}])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_weight_is_the_one_that_was_rotated(options, dtype) -> None:
    w = weight().to(dtype)
    q = rotated(w, **options)
    assert q.rotation == 64
    back = q.dequantize()
    error = (back - w).float().square().sum() / w.float().square().sum()
    assert back.dtype == dtype and error < (0.02 if q.nbits == 4 else 3e-4)
    torch.manual_seed(1)
    x, b = torch.randn(5, 192, dtype=dtype), torch.randn(48, dtype=dtype)
    want = F.linear(x.float(), q.dequantize(torch.float32), b.float())
    for got in (F.linear(x, q, b), torch.addmm(b, x, q.t()), x @ q.t() + b):
        assert (got.float() - want).abs().max() < (1e-4 if dtype == torch.float32 else 4e-2) * want.abs().max()
    rows = F.embedding(torch.tensor([[3, 0]]), q)
    torch.testing.assert_close(rows, q.dequantize()[[3, 0]].unsqueeze(0))


def test_outliers_cost_less_when_they_are_mixed() -> None:
    w = weight()
    plain, turned = (rotated(w, nbits=3, rotation=on) for on in (False, True))
    errors = [(q.dequantize() - w).square().sum() for q in (plain, turned)]
    assert errors[1] < 0.9 * errors[0]
    assert turned.nbytes == plain.nbytes + 2 * 192


def test_gradients_reach_the_input_through_the_rotation() -> None:
    q = rotated(weight())
    x = torch.randn(4, 192, requires_grad=True)
    F.linear(x, q).square().sum().backward()
    other = x.detach().clone().requires_grad_()
    F.linear(other, q.dequantize()).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, atol=1e-3, rtol=1e-3)


def test_experts_are_rotated_as_well() -> None:
    w = torch.stack([weight(), weight().flip(0)])
    q = rotated(w)
    x = torch.randn(2, 3, 192)
    torch.testing.assert_close(torch.bmm(x, q.transpose(1, 2)), torch.bmm(x, q.dequantize().transpose(1, 2)))
    ends = torch.tensor([2, 6], dtype=torch.int32)
    got = F.grouped_mm(x.flatten(0, 1), q.transpose(-2, -1), offs=ends)
    want = torch.cat([x.flatten(0, 1)[:2] @ q.dequantize()[0].t(), x.flatten(0, 1)[2:] @ q.dequantize()[1].t()])
    torch.testing.assert_close(got, want)


def test_rows_and_whole_blocks_can_be_cut() -> None:
    q = rotated(weight(48, 384))
    assert q.rotation == 128
    torch.testing.assert_close(q[8:16].dequantize(), q.dequantize()[8:16])
    torch.testing.assert_close(q[:, 128:256].dequantize(), q.dequantize()[:, 128:256])
    wide = rotated(weight(48, 512))
    with pytest.raises(NotImplementedError, match="rotated in blocks of 512"):
        wide[:, :128]


def model(**options) -> nn.Sequential:
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(192, 64), nn.GELU(), nn.Linear(64, 48))
    if options:
        quantize_(m, HqqConfig(**{"nbits": 4, "group_size": 32, "rotation": True, **options}))
    return m


def test_saved_loaded_and_compiled_models_compute_the_same(tmp_path) -> None:
    m, other = model(rotation_seed=5), model()
    save_model(m, tmp_path / "m")
    load_model(other, tmp_path / "m")
    x = torch.randn(3, 192)
    assert torch.equal(other(x), m(x)) and other[0].weight.rotation == 64
    torch.testing.assert_close(torch.compile(m, fullgraph=True)(x), m(x))


@pytest.mark.parametrize("rotation", [3, 128, -64, True, "64", 1 << 41])
def test_files_with_a_rotation_that_cannot_be_are_refused(rotation) -> None:
    tensors, entry = flatten("a.weight", rotated(weight()))
    assert build("a.weight", parse_entry("a.weight", entry), tensors).rotation == 64
    with pytest.raises(CheckpointError, match="rotation"):
        parse_entry("a.weight", entry.replace('"rotation": 64', f'"rotation": {str(rotation).lower()}'
                                              if not isinstance(rotation, str) else '"rotation": "64"'))  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"), [({"rotation": 1}, "rotation must be"), ({"rotation_seed": -1}, "seed")]
)
def test_bad_settings_are_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HqqConfig(**options)
    with pytest.raises(ValueError, match="in_features that 8 divides, got 36"):
        quantize_(nn.Sequential(nn.Linear(36, 8)), HqqConfig(4, 12, rotation=True))


def test_full_calibration_lowers_the_error_of_outputs_and_diagonal_is_refused() -> None:
    torch.manual_seed(3)
    mix = torch.randn(192, 192) * torch.rand(192)
    x = torch.randn(512, 192) @ mix / 14
    errors = {}
    for calibrated in (False, True):
        m = nn.Sequential(nn.Linear(192, 64))
        with torch.no_grad():
            m[0].weight.copy_(weight(64))
        want = m(x)
        found = calibrate(m, [x]) if calibrated else None
        quantize_(m, HqqConfig(3, 32, rotation=True), calibration=found)
        errors[calibrated] = (m(x) - want).square().mean()
    assert errors[True] < 0.7 * errors[False]
    with pytest.raises(ValueError, match="rotation mixes inputs"):
        m = nn.Sequential(nn.Linear(192, 64))
        quantize_(m, HqqConfig(3, 32, rotation=True), calibration=calibrate(m, [x], "diagonal"))
