"""Quantizing where the Triton kernels serve the device: they are used, and give what the plain solvers give."""

import warnings
from dataclasses import replace

import pytest
import torch

from hqqtensor import HqqConfig, HQQTensor
from hqqtensor.kernels.triton import launch
from hqqtensor.ops import backend
from hqqtensor.ops.backend import _BACKENDS
from hqqtensor.ops.reference import expand_groups
from hqqtensor.packing import unpack

CASES = [(40, 200, 64, 1), (66, 24, 16, 0), (7, 100, 12, 1)]


@pytest.fixture(autouse=True)
def used(monkeypatch) -> list[str]:
    """The kernels serve CPU tensors, as they do under the interpreter; names of those that ran."""
    monkeypatch.setitem(_BACKENDS, "triton", replace(_BACKENDS["triton"], device_types=("cpu",)))
    calls: list[str] = []
    for name in ("solve", "assign"):
        own = getattr(launch, name)
        monkeypatch.setattr(launch, name, lambda *args, own=own, name=name: calls.append(name) or own(*args))
    return calls


def both(w: torch.Tensor, config: HqqConfig) -> tuple[HQQTensor, HQQTensor]:
    with backend("triton"):
        ours = HQQTensor.from_hp(w, config)
    with backend("reference"):
        return ours, HQQTensor.from_hp(w, config)


def weight(N: int, K: int) -> torch.Tensor:
    w = torch.randn(N, K, generator=torch.manual_seed(N)) * 0.02
    w[:, :1] = 0.25
    w[1] = 0.5  # along axis 1, groups of one value
    return w


# Each width once: how widths and shapes meet is tested in test_triton_solve.py.
@pytest.mark.parametrize(("nbits", "N", "K", "size", "axis"), [(n, *CASES[n % 3]) for n in (1, 2, 3, 4, 5, 8)])
def test_rtn_is_the_plain_solver_but_for_ties(nbits: int, N: int, K: int, size: int, axis: int, used) -> None:
    w = weight(N, K)
    config = HqqConfig(nbits, size, axis=axis, solver="rtn", scale_dtype=torch.float32)
    ours, plain = both(w, config)
    assert used == ["solve", "assign"]
    torch.testing.assert_close(ours.scale, plain.scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.zero_point, plain.zero_point, rtol=1e-5, atol=1e-5)
    scale, zero = (expand_groups(t, N, K, size, axis) for t in (plain.scale, plain.zero_point))
    place = (w / scale + zero).double()
    differ = unpack(ours.qdata, nbits, K) != unpack(plain.qdata, nbits, K)
    # A code may be another one only where a weight lies in the middle of two.
    assert ((place - place.floor() - 0.5).abs()[differ] < 1e-3).all()
    assert differ.double().mean() < 0.01


@pytest.mark.parametrize(("nbits", "N", "K", "size", "axis"), [(n, *CASES[n % 3]) for n in (2, 3, 4)])
def test_joint_takes_the_plain_solvers_road(nbits: int, N: int, K: int, size: int, axis: int, used) -> None:
    w = weight(N, K)
    ours, plain = both(w, HqqConfig(nbits, size, axis=axis, scale_dtype=torch.float32))
    assert used == ["solve", "assign"]
    errors = [(t.dequantize().double() - w.double()).square().sum() for t in (ours, plain)]
    # Sums in another order may end in another of two nearly equal minima.
    assert errors[0] <= errors[1] * 1.01 + 1e-12 and errors[1] <= errors[0] * 1.01 + 1e-12
    assert torch.isclose(ours.scale, plain.scale, rtol=1e-4).double().mean() > 0.8
    if axis == 1:
        assert torch.equal(ours.dequantize()[1], w[1])


@pytest.mark.parametrize("extra", [{"integer_zero": True}, {"quant_scale": True, "quant_zero": True}, {}])
def test_what_follows_the_solver_is_the_same(extra: dict, used) -> None:
    w = torch.randn(2, 24, 128, generator=torch.manual_seed(3)).bfloat16()  # experts
    ours, plain = both(w, HqqConfig(4, 64, solver="rtn", **extra))
    assert "solve" in used and "assign" in used
    assert ours.shape == plain.shape == w.shape
    step = (w.float().amax() - w.float().amin()) / 15
    assert (ours.dequantize().float() - plain.dequantize().float()).abs().max() <= step
    assert (ours.qdata != plain.qdata).double().mean() < 0.02


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"solver": "hqq"}, "solver 'hqq'"), ({"format": "nf4"}, "format 'nf4'"), ({"lp_norm": 0.7}, "lp_norm 0.7"),
     ({"group_size": None}, "groups of 4104")],
)  # fmt: skip
def test_what_the_kernels_do_not_have_is_said(settings: dict, reason: str, used) -> None:
    w = torch.randn(2, 4104, generator=torch.manual_seed(4))
    config = HqqConfig(**{"nbits": 4, "group_size": 64, **settings})
    with backend("triton"), pytest.warns(UserWarning, match=f"more slowly: {reason}"):
        got = HQQTensor.from_hp(w, config)
    assert "solve" not in used
    with backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("error")
        want = HQQTensor.from_hp(w, config)
    assert torch.equal(got.qdata, want.qdata) or (got.qdata != want.qdata).double().mean() < 0.01
