"""What an HQQTensor can do, it can do in every format."""

import copy
import io
import json
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hqqtensor import HqqConfig, HQQTensor, backend, collect_quantization_debug_info, load_model, quantize_, save_model
from hqqtensor.kernels import cpu
from hqqtensor.serialization import inspect_checkpoint

FORMATS: dict[str, dict[str, Any]] = {
    "fp4": {"nbits": 4, "format": "fp4", "solver": "rtn"},
    "fp6": {"nbits": 6, "format": "fp6", "solver": "rtn"},
    "fp8": {"nbits": 8, "format": "fp8", "solver": "rtn"},
    "nf4": {"nbits": 4, "format": "nf4"},
    "nf4 axis 0": {"nbits": 4, "format": "nf4", "axis": 0, "solver": "rtn", "group_size": 12},
    "nf4 quantized scales": {"nbits": 4, "format": "nf4", "quant_scale": True, "solver": "rtn"},
    "nf4 scales in 4 bits": {"nbits": 4, "format": "nf4", "quant_scale": True, "meta_nbits": 4},
    "int in 4 bits": {"nbits": 3, "format": "int", "quant_scale": True, "quant_zero": True, "meta_nbits": 4},
    "int in 4 bits axis 0": {
        "nbits": 3,
        "format": "int",
        "quant_zero": True,
        "meta_nbits": 4,
        "axis": 0,
        "group_size": 12,
    },
    "tensor codebook": {"nbits": 3, "format": "codebook"},
    "tensor codebook axis 0": {"nbits": 2, "format": "codebook", "axis": 0, "group_size": 12},
    "row codebook": {"nbits": 4, "format": "codebook", "codebook": "row", "scale_dtype": torch.float32},
}
every_format = pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)


@pytest.fixture(autouse=True)
def plain_path():
    """What the tensor does is compared to the last bit; tests of kernels are further down."""
    with backend("reference"):
        yield


def quantized(options: dict[str, Any], shape: tuple[int, ...] = (96, 256), seed: int = 0) -> HQQTensor:
    w = torch.randn(*shape, generator=torch.manual_seed(seed))
    return HQQTensor.from_hp(w, HqqConfig(**{"group_size": 64, **options}))


@every_format
def test_products_and_rows_equal_the_dense_ones(options) -> None:
    q, x = quantized(options), torch.randn(2, 3, 256, requires_grad=True)
    d, bias = q.dequantize(), torch.randn(96)
    torch.testing.assert_close(F.linear(x, q, bias), F.linear(x, d, bias))
    torch.testing.assert_close(x @ q.t(), x @ d.t())
    (found,), (expected,) = (torch.autograd.grad(F.linear(x, w).sin().sum(), x) for w in (q, d))
    torch.testing.assert_close(found, expected)
    ids = torch.randint(0, 96, (2, 5))
    assert torch.equal(F.embedding(ids, q), F.embedding(ids, d))


@every_format
def test_experts_multiply_and_can_be_selected(options) -> None:
    e, x = quantized(options, (3, 32, 256)), torch.randn(3, 7, 256)
    d = e.dequantize()
    torch.testing.assert_close(torch.bmm(x, e.transpose(1, 2)), torch.bmm(x, d.transpose(1, 2)), atol=1e-4, rtol=1e-5)
    assert torch.equal(e[1].dequantize(), d[1]) and torch.equal(e[1:].dequantize(), d[1:])
    assert torch.equal(torch.cat([e[2:], e[:1]]).dequantize(), torch.cat([d[2:], d[:1]]))
    alone = quantized(options, (3, 32, 256))[2]
    torch.testing.assert_close(F.linear(x, alone), F.linear(x, d[2]), atol=1e-4, rtol=1e-5)


@every_format
def test_slices_are_views_and_join_again(options) -> None:
    q = quantized(options, (96, 384))
    d = q.dequantize()
    step = q.scale.shape[0] if options.get("axis") == 0 else 1  # axis 0: whole periods of the groups
    first = 3 * step
    part = q[first : 8 * step]
    assert torch.equal(part.dequantize(), d[first : 8 * step])
    assert part.qdata.data_ptr() == q.qdata[first].data_ptr()
    dims = (0,) if options.get("quant_scale") else (0, 1)  # few scales a row, packed, cannot be cut along it
    for dim in dims:
        assert torch.equal(torch.cat(q.chunk(3, dim), dim).dequantize(), d)
    if 1 in dims:
        assert torch.equal(q.t()[128:].dequantize(), d.t()[128:])


def test_weights_with_codebooks_of_their_own_join_along_rows_only() -> None:
    a, b = (quantized(FORMATS["tensor codebook"], seed=seed) for seed in (0, 1))
    both = torch.cat([a, b])
    assert torch.equal(both.dequantize(), torch.cat([a.dequantize(), b.dequantize()]))
    assert both.codebook == "row"
    with pytest.raises(NotImplementedError, match="along rows only"):
        torch.cat([a, b], 1)


@every_format
def test_copies_pickles_and_casts_keep_every_bit(options) -> None:
    q = quantized(options)
    file = io.BytesIO()
    torch.save({"w": q}, file)
    file.seek(0)
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q)), torch.load(file, weights_only=True)["w"], q.clone()):
        assert torch.equal(q, other)
    half = q.to(torch.bfloat16)
    assert half.dequantize().dtype == torch.bfloat16 and torch.equal(half.to(torch.float32), q)
    other = quantized(options, seed=1)
    assert not torch.equal(q, other) and torch.equal(q.copy_(other), other)


@every_format
def test_nbytes_are_those_of_codes_scales_and_entries(options) -> None:
    q = quantized(options)
    groups = 96 * 4 if options.get("axis", 1) == 1 else 8 * 256
    # Quantized ones: a byte or half a byte each, a float32 scale and zero point for each of the 4 or 256 columns.
    columns = groups // (96 if options.get("axis", 1) == 1 else 8)
    quantized_meta = groups * options.get("meta_nbits", 8) // 8 + 2 * 4 * columns
    kept = [options.get("quant_scale"), *([options.get("quant_zero")] if q.format == "int" else [])]
    meta = sum(quantized_meta if part else 2 * groups for part in kept)
    entries = {"tensor": 2 * 2**q.nbits, "row": 96 * 4 * 2**q.nbits, None: 0}[q.codebook]
    meta *= 2 if options.get("scale_dtype") == torch.float32 else 1
    assert q.nbytes == 96 * 256 * q.nbits // 8 + meta + entries


@every_format
def test_compiled_models_compute_the_same(options) -> None:
    q, x = quantized(options), torch.randn(3, 256)
    torch._dynamo.reset()  # its limit of graphs for one function counts over all tests
    layer = nn.Linear(256, 96)
    layer.weight = nn.Parameter(q, requires_grad=False)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))
@every_format
def test_kernels_compute_what_the_plain_path_does(options) -> None:
    q, e, x = quantized(options), quantized(options, (3, 32, 256)), torch.randn(3, 7, 256)
    ids = torch.randint(0, 96, (2, 5))

    def results() -> list[torch.Tensor]:
        rows = [F.linear(x[0, :1], q), F.linear(x, q), F.linear(x, q[48:]), torch.bmm(x, e.transpose(1, 2))]
        return [*rows, F.embedding(ids, q), q.dequantize(), e[1].dequantize()]

    expected = results()
    with backend("cpu"):
        found = results()
    for a, b in zip(found[:4], expected[:4], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5 * b.abs().max().item(), rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(found[4:], expected[4:], strict=True))


def model(options: dict[str, Any] | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64))
    if options:
        quantize_(m, HqqConfig(**{"group_size": 64, **options}))
    return m


@every_format
@pytest.mark.parametrize("target", ["dense", "quantized", "meta"])
def test_saving_and_loading_gives_every_bit_back(tmp_path, options, target: str) -> None:
    m = model(options)
    save_model(m, tmp_path / "m.safetensors")
    other = model(options if target == "quantized" else None)
    other = other.to("meta") if target == "meta" else other
    assert load_model(other, tmp_path / "m.safetensors") == ([], [])
    for key, value in m.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
    info = {t.name: t for t in inspect_checkpoint(tmp_path / "m.safetensors").tensors}["0.weight"]
    assert (info.format, info.nbits, info.nbytes) == (options["format"], options["nbits"], m[0].weight.nbytes)
    plain = model()
    plain.load_state_dict(m.state_dict(), assign=True)
    assert torch.equal(plain[0].weight, m[0].weight)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("nf4", {"format": "fp4", "nbits": 8}), ("nf4", {"format": "int"}), ("nf4", {"format": "codebook"}),
        ("nf4", {"codebook": "row"}), ("row codebook", {"codebook": "tensor"}), ("row codebook", {"nbits": 3}),
        ("tensor codebook", {"codebook": "row"}), ("tensor codebook", {"codebook": 3}),
    ],
)  # fmt: skip
def test_files_that_claim_another_format_are_refused(tmp_path, name: str, changes: dict[str, Any]) -> None:
    path = tmp_path / "m.safetensors"
    save_model(model(FORMATS[name]), path)
    with safe_open(path, "pt") as f:
        header = f.metadata()
    entry = json.loads(header["0.weight"])
    entry["_data"].update(changes)
    save_file(load_file(path), path, metadata={**header, "0.weight": json.dumps(entry)})
    with pytest.raises(ValueError, match=r"0\.weight"):
        load_model(model(), path)


def test_debug_info_counts_the_outermost_codes_of_the_format() -> None:
    m = nn.Sequential(nn.Linear(64, 2, bias=False))
    with torch.no_grad():
        m[0].weight.copy_(torch.cat([torch.full((1, 64), 6.0), torch.full((1, 64), 0.5)]))
        m[0].weight[1, 0] = -6
    quantize_(m, HqqConfig(4, 64, format="fp4", solver="rtn"))
    (info,) = collect_quantization_debug_info(m).modules
    assert info.saturated == pytest.approx(65 / 128) and info.zero_range is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nbits": 3, "format": "nf4"}, r"\[4\] for format 'nf4'"),
        ({"nbits": 4, "format": "fp8"}, r"\[8\] for format 'fp8'"),
        ({"nbits": 5, "format": "codebook"}, r"\[1, 2, 3, 4\]"),
        ({"format": "fp5"}, "codebook.*fp4.*fp6.*fp8.*int.*nf4"),
        ({"format": "nf4", "solver": "hqq"}, "hqq_joint"),
        ({"format": "nf4", "quant_zero": True}, "quant_zero"),
        ({"format": "codebook", "codebook": "column"}, "tensor.*row"),
        ({"format": "codebook", "codebook": "row", "axis": 0}, "axis 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HqqConfig(**options)


def test_a_format_may_be_chosen_for_one_layer() -> None:
    m = model()
    quantize_(m, HqqConfig(4, 64, dynamic_config={"2": {"format": "fp8", "nbits": 8}}))
    assert [m[i].weight.format for i in (0, 2)] == ["int", "fp8"]
    assert "8-bit fp8, group_size=64, axis=1, scale=float16)" in repr(m[2])
