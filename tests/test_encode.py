"""Who quantizes: the encoder of the backend that serves the device, or torch's operations."""

import warnings

import pytest
import torch

from hqqtensor import HqqConfig, HQQTensor, backend
from hqqtensor.kernels import cpu
from hqqtensor.ops.backend import _BACKENDS, Backend, encoder, register_backend
from hqqtensor.solvers import Solution


class Recorder:
    """An encoder for the CPU whose scales are all 1/8 and whose codes are all 0; it refuses what ``refuses`` says."""

    passes = None

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.refuses: dict[str, str] = {}

    def why_not(self, step, matrix, settings):
        return self.refuses.get(step)

    def solve(self, matrix, settings, levels):
        self.calls.append(("solve", tuple(matrix.shape), settings.nbits, settings.group_size, levels is None))
        eight = torch.full((matrix.shape[0], matrix.shape[1] // settings.group_size), 8.0)
        return Solution(eight, torch.zeros_like(eight) if levels is None else None)

    def assign(self, out, matrix, inverse_scale, zero_point, settings):
        self.calls.append(("assign", tuple(out.shape), settings.format))
        out.zero_()

    def empty_packed(self, sizes, device):
        self.calls.append(("empty_packed", tuple(sizes), device.type))
        return torch.empty(*sizes, dtype=torch.uint8)


@pytest.fixture
def recorder():
    own = Recorder()
    register_backend(Backend("recorder", {}, ("cpu",), lambda: None, own))
    yield own
    del _BACKENDS["recorder"]


W = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))


def test_the_backend_that_serves_the_device_quantizes(recorder: Recorder) -> None:
    q = HQQTensor.from_hp(W, HqqConfig(4, 32))
    assert recorder.calls == [
        ("solve", (32, 64), 4, 32, True), ("empty_packed", (2, 16, 32), "cpu"), ("assign", (32, 32), "int"),
    ]  # fmt: skip
    assert q.scale.eq(0.125).all() and not q.dequantize().any()
    recorder.calls.clear()
    HQQTensor.from_hp(W, HqqConfig(4, 32, format="nf4"))
    assert [call[0] for call in recorder.calls] == ["solve", "empty_packed", "assign"] and not recorder.calls[0][-1]


def test_codebooks_are_learned_for_each_matrix_and_stored_in_place_of_zero_points(recorder: Recorder) -> None:
    q = HQQTensor.from_hp(W, HqqConfig(2, 32, format="codebook"))
    assert [call[:2] for call in recorder.calls] == [
        ("solve", (16, 64)), ("solve", (16, 64)), ("empty_packed", (2, 16, 16)), ("assign", (16, 16)),
        ("assign", (16, 16)),
    ]  # fmt: skip
    assert q.zero_point.shape == (2, 1, 4) and q.scale.eq(0.125).all()


def test_what_it_refuses_is_done_by_torch_and_said(recorder: Recorder) -> None:
    with backend("dequantize"):
        want = HQQTensor.from_hp(W, HqqConfig(4, 32))
    recorder.refuses = {"solve": "only on Sundays", "assign": "never"}
    with pytest.warns(UserWarning, match=r"by torch's operations, more slowly: only on Sundays"):
        got = HQQTensor.from_hp(W, HqqConfig(4, 32))
    assert torch.equal(got, want) and [call[0] for call in recorder.calls] == ["empty_packed"]


def test_another_choice_of_backend_leaves_it_out(recorder: Recorder) -> None:
    assert encoder("cpu") is recorder and encoder("meta") is None
    with backend("dequantize"):
        assert encoder("cpu") is None
        HQQTensor.from_hp(W, HqqConfig(4, 32))
    with backend("recorder"):
        assert encoder("cpu") is recorder
    assert recorder.calls == []


@pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))
def test_the_compiled_solvers_say_what_they_have_not() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({}, {"solver": "hqq"}, {"solver": "rtn"}, {"format": "nf4"}, {"lp_norm": 0.7, "solver": "rtn"}):
            HQQTensor.from_hp(W, HqqConfig(4, 32, **options))
        HQQTensor.from_hp(W, HqqConfig(4, 32, quant_scale=True, quant_zero=True, meta_nbits=4))
    with pytest.warns(UserWarning, match=r"lp_norm 0\.7: the C\+\+ solver has 2\.0 only"):
        HQQTensor.from_hp(W, HqqConfig(4, 32, lp_norm=0.7))
