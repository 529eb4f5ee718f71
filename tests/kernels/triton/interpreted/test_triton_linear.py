"""Products and dense weights by Triton's interpreter against the plain reference, within bounds that follow from
dtypes."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hqqtensor.formats import format_names
from hqqtensor.kernels.triton import config, launch
from hqqtensor.ops import PackedWeight, reference
from hqqtensor.ops.packed import structured
from hqqtensor.packing import PLANES, pack, pack_meta

# Of sum |x| span, a weight's span being its size before the zero point is taken off: the rounding of results, that of
# weights to 16 bits (once for each of code, zero point and scale), and float32 sums.
BOUNDS = {torch.float32: 2**-20, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def called(function, *args):
    """``function`` of the arguments in the order of the operator's schema."""
    return function(*structured(function.__name__, args))


def weight(N: int, K: int, nbits: int, size: int, axis: int, lead: tuple[int, ...] = (), dtype=torch.float16):
    """Random codes, scales and zero points: [*lead, N, K]."""
    generator = torch.manual_seed(N * 7 + K + nbits)
    groups = -(-(K if axis == 1 else N) // size)
    shape = (*lead, N, groups) if axis == 1 else (*lead, groups, K)
    codes = torch.randint(0, 2**nbits, (*lead, N, K), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(shape, generator=generator) + 0.1).to(dtype)
    zero = (torch.rand(shape, generator=generator) * (2**nbits - 1)).to(dtype)
    return pack(codes, nbits), scale, zero


def assert_product(got, x, dense, span, bias=None) -> None:
    want = x.double() @ dense.double().transpose(-1, -2) + (0 if bias is None else bias.double())
    size = x.double().abs() @ span.double().transpose(-1, -2) + (0 if bias is None else bias.double().abs())
    assert got.dtype == x.dtype and got.shape == want.shape
    worst = ((got.double() - want).abs() / size.clamp(min=1e-30)).max().item()
    assert worst <= BOUNDS[x.dtype], worst


def span_of(q, scale, zero, nbits, size, axis, K):
    """Size of what is summed: the weight, and the zero point that is taken off it."""
    dense = called(reference.dequantize, q, scale, zero, [], nbits, "int", size, axis, K, torch.float32)
    N = dense.shape[-2]
    return dense, dense.abs() + reference.expand_groups((scale * zero).float().abs(), N, K, size, axis)


@settings(deadline=None, max_examples=50, derandomize=True, phases=[Phase.generate])
@given(
    nbits=st.integers(1, 8),
    size=st.sampled_from([4, 8, 16, 32, 48, 64, 100, 128, 256]),
    axis=st.sampled_from([0, 1]),
    N=st.integers(1, 70),
    K=st.one_of(st.integers(1, 300), st.sampled_from([128, 256, 384])),
    M=st.sampled_from([1, 2, 5, 9, 17, 66]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    with_bias=st.booleans(),
    with_pre=st.booleans(),
)
def test_linear_equals_the_dense_product(nbits, size, axis, N, K, M, dtype, scale_dtype, with_bias, with_pre) -> None:
    size = min(size, K if axis == 1 else N)
    q, scale, zero = weight(N, K, nbits, size, axis, dtype=scale_dtype)
    generator = torch.manual_seed(1)
    x = torch.randn(M, K, generator=generator).to(dtype)
    bias = torch.randn(N, generator=generator).to(dtype) if with_bias else None
    pre = (torch.rand(K, generator=generator) + 0.5).to(dtype) if with_pre else None
    got = called(launch.linear, x, q, scale, zero, bias, pre, [], nbits, "int", size, axis, K, "float")
    assert_product(got, x if pre is None else x * pre, *span_of(q, scale, zero, nbits, size, axis, K), bias)


# Each width with each size of groups, and each of both with each M: every pair of values, a third of all cases.
TILINGS = [(nbits, (1, 12, 70)[(nbits + i) % 3], 32 << i) for nbits in range(1, 9) for i in range(4)]


@pytest.mark.parametrize(("nbits", "M", "size"), TILINGS)
def test_every_width_in_every_tiling(nbits: int, M: int, size: int) -> None:
    K = 512
    q, scale, zero = weight(66, K, nbits, size, 1)
    x = torch.randn(M, K, generator=torch.manual_seed(2)).half()
    got = called(launch.linear, x, q, scale, zero, None, None, [], nbits, "int", size, 1, K, "float")
    assert_product(got, x, *span_of(q, scale, zero, nbits, size, 1, K))


# Every pair of values, a sixth of all cases.
PAIRS = [
    (nbits, (32, 64, 256)[(nbits + i) % 3], (nbits + i) % 2 == 0, K)
    for nbits in range(1, 8)
    for i, K in enumerate((512, 264, 260))
]


@pytest.mark.parametrize(("nbits", "size", "with_pre", "K"), PAIRS)
def test_columns_taken_in_pairs(monkeypatch: pytest.MonkeyPatch, nbits: int, size: int, with_pre: bool, K: int) -> None:
    asked: list[int] = []
    monkeypatch.setattr(launch, "pair_of", lambda *args: asked.append(2) or 2)
    q, scale, zero = weight(18, K, nbits, size, 1)
    x = torch.randn(3, K, generator=torch.manual_seed(3)).half()
    pre = (torch.rand(K, generator=torch.manual_seed(4)) + 0.5).half() if with_pre else None
    got = called(launch.linear, x, q, scale, zero, None, pre, [], nbits, "int", size, 1, K, "float")
    assert asked == [2]
    assert_product(got, x if pre is None else x * pre, *span_of(q, scale, zero, nbits, size, 1, K))


# Every pair of values, a quarter of all cases.
DENSE = [
    (nbits, (nbits + i) % 2, K, (torch.float32, torch.float16)[(nbits + i // 2) % 2])
    for nbits in range(1, 9)
    for i, K in enumerate((8, 128, 200, 260))
]


@pytest.mark.parametrize(("nbits", "axis", "K", "dtype"), DENSE)
def test_dequantize_is_the_reference_bit_for_bit(nbits: int, axis: int, K: int, dtype: torch.dtype) -> None:
    q, scale, zero = weight(37, K, nbits, 8, axis, (2,))
    args = (q, scale, zero, [], nbits, "int", 8, axis, K, dtype)
    assert torch.equal(called(launch.dequantize, *args), called(reference.dequantize, *args))


def formats() -> list[tuple[str, int]]:
    return [(n, {"fp4": 4, "nf4": 4, "fp6": 6, "fp8": 8}[n]) for n in format_names() if n not in ("int", "codebook")]


@pytest.mark.parametrize(("name", "nbits"), formats())
@pytest.mark.parametrize("axis", [0, 1])
def test_formats_without_a_zero_point(name: str, nbits: int, axis: int) -> None:
    N, K, size = 33, 328, 11
    q, scale, _ = weight(N, K, nbits, size, axis)
    args = (q, scale, None, [], nbits, name, size, axis, K)
    dense = called(reference.dequantize, *args, torch.float32)
    if dense.isnan().any():  # FP8 has codes for NaN, which nothing is ever encoded to
        codes = torch.randint(0, 127, (N, K), dtype=torch.uint8) + torch.randint(0, 2, (N, K), dtype=torch.uint8) * 128
        q = pack(codes, 8)
        args = (q, *args[1:])
        dense = called(reference.dequantize, *args, torch.float32)
    assert torch.equal(called(launch.dequantize, *args, torch.float32), dense)
    for M in (1, 70):
        x = torch.randn(M, K, generator=torch.manual_seed(3)).bfloat16()
        got = called(launch.linear, x, q, scale, None, None, None, [], nbits, name, size, axis, K, "float")
        assert_product(got, x, dense, dense.abs())


@pytest.mark.parametrize("nbits", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", ["all", "one", "each"])
def test_learned_codebooks(nbits: int, rows: str) -> None:
    N, K, size, experts = 20, 264, 64, 2
    q, scale, _ = weight(N, K, nbits, size, 1, (experts,))
    shape = {"all": (2**nbits,), "one": (experts, 1, 2**nbits), "each": (experts, N, 2**nbits)}[rows]
    entries = torch.randn(shape, generator=torch.manual_seed(4)).sort(-1).values
    codes = reference.unpack(q, nbits, K).long()
    full = entries if rows == "all" else entries.expand(experts, N, -1)
    values = full[codes] if rows == "all" else torch.gather(full, -1, codes)
    dense = values * reference.expand_groups(scale.float(), N, K, size, 1)
    got = called(launch.dequantize, q, scale, entries, [], nbits, "codebook", size, 1, K, torch.float32)
    assert torch.equal(got, dense)
    x = torch.randn(experts, 3, K, generator=torch.manual_seed(5)).half()
    got = called(launch.batched_linear, x, q, scale, entries, None, [], nbits, "codebook", size, 1, K, "float")
    assert_product(got, x, dense, dense.abs())


def quantized(like: torch.Tensor, bits: int, rows: int = 5) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Random codes of ``bits`` in the place of scales or zero points, packed, and their own; as they are at 0 bits."""
    if bits == 0:
        return like, []
    generator = torch.manual_seed(6 + bits)
    own = [torch.rand(*like.shape[:-2], rows, like.shape[-1], generator=generator) + 0.5 for _ in range(2)]
    codes = torch.randint(0, 2**bits, like.shape, generator=generator, dtype=torch.uint8)
    return pack_meta(codes, bits), [own[0] * (2.0 / 2**bits), own[1] * 3.0]


# Columns of scales: one to three blocks, the last one whole, or short and even, odd or of one column.
COLUMNS = [
    (0, 256, 8), (0, 393, 8), (1, 264, 8), (1, 512, 4), (1, 1100, 4), (1, 40, 40), (1, 1032, 8), (1, 192, 64),
    (1, 136, 12),
]  # fmt: skip
BITS = [(8, 0), (8, 8), (4, 0), (4, 8), (8, 4), (0, 4)]


@pytest.mark.parametrize(
    ("axis", "K", "size", "bits"),
    [*((*about, (4, 4)) for about in COLUMNS), *((*about, bits) for about in COLUMNS[1:3] for bits in BITS)],
)
def test_quantized_scales_are_read_through_their_own(axis: int, K: int, size: int, bits: tuple[int, int]) -> None:
    N, nbits = 24, 4
    q, scale, zero = weight(N, K, nbits, size, axis, (2,), torch.float32)
    (scale, meta), (zero, own) = (quantized(t, b) for t, b in zip((scale, zero), bits, strict=True))
    args = (q, scale, zero, [*meta, *own], nbits, "int", size, axis, K)
    dense = called(reference.dequantize, *args, torch.float32)
    assert torch.equal(called(launch.dequantize, *args, torch.float32), dense)
    for M in (2, 70) if K < 300 else (2,):
        x = torch.randn(2, M, K, generator=torch.manual_seed(6))
        got = called(launch.batched_linear, x, q, scale, zero, None, *args[3:], "float")
        assert_product(got, x, dense, dense.abs() + 16)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (4, 8), (0, 4)])
def test_quantized_scales_of_runs_of_rows_and_of_embeddings(axis: int, bits: tuple[int, int]) -> None:
    N, K, size = 30, 328, 8
    q, scale, zero = weight(N, K, 3, size, axis, (3,), torch.float32)
    (scale, meta), (zero, own) = (quantized(t, b, 7) for t, b in zip((scale, zero), bits, strict=True))
    meta, settings = [*meta, *own], (3, "int", size, axis, K)
    x = torch.randn(9, K, generator=torch.manual_seed(7))
    args = (x, torch.tensor([2, 2, 7], dtype=torch.int32), q, scale, zero, None, meta, *settings, "float")
    torch.testing.assert_close(
        called(launch.grouped_linear, *args), called(reference.grouped_linear, *args), atol=2e-3, rtol=1e-4
    )
    rows = (torch.tensor([3, 29, 0, 7, 7]), q[1], scale[1], zero[1], [t[1] for t in meta], *settings, torch.float32)
    assert torch.equal(called(launch.embedding, *rows), called(reference.embedding, *rows))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["nf4", "fp4", "codebook"])
def test_quantized_scales_of_formats_without_a_zero_point(name: str, bits: int) -> None:
    N, K, size = 20, 264, 8
    q, scale, _ = weight(N, K, 4, size, 1)
    scale, meta = quantized(scale, bits)
    entries = torch.randn(16, generator=torch.manual_seed(4)) if name == "codebook" else None
    args = (q, scale, entries, meta, 4, name, size, 1, K)
    dense = called(reference.dequantize, *args, torch.float32)
    assert torch.equal(called(launch.dequantize, *args, torch.float32), dense)
    x = torch.randn(3, K, generator=torch.manual_seed(5)).half()
    got = called(launch.linear, x, q, scale, entries, None, None, *args[3:], "float")
    assert_product(got, x, dense, dense.abs())


@pytest.mark.parametrize("ends", [[2, 2, 7], [0, 5, 5], [9, 9, 9], [1, 2, 3], [0, 0, 0], [0, 0, 70]])
def test_grouped_rows_go_to_their_experts(ends: list[int]) -> None:
    N, K = 70, 384
    weights = weight(N, K, 4, 64, 1, (3,))
    offsets = torch.tensor(ends, dtype=torch.int32)
    for S in (9, 70) if ends[-1] <= 9 else (70,):
        x = torch.randn(S, K, generator=torch.manual_seed(7))
        args = (x, offsets, *weights, None, [], 4, "int", 64, 1, K, "float")
        got, want = called(launch.grouped_linear, *args), called(reference.grouped_linear, *args)
        assert torch.allclose(got, want, atol=2e-3)
        assert not got[ends[-1] :].any()


@pytest.mark.parametrize("nbits", range(1, 9))
@pytest.mark.parametrize("axis", [0, 1])
def test_embedding_rows(nbits: int, axis: int) -> None:
    q, scale, zero = weight(30, 200, nbits, 10, axis)
    indices = torch.tensor([[3, 29, 0], [7, 7, 12]])
    args = (q, scale, zero, [], nbits, "int", 10, axis, 200, torch.float16)
    assert torch.equal(called(launch.embedding, indices, *args), called(reference.embedding, indices, *args))


def test_an_index_outside_gives_nan_and_reads_nothing() -> None:
    q, scale, zero = weight(4, 128, 4, 64, 1)
    got = called(
        launch.embedding, torch.tensor([-1, 2, 4, 1 << 40]), q, scale, zero, [], 4, "int", 64, 1, 128, torch.float32
    )
    assert got[[0, 2, 3]].isnan().all() and not got[1].isnan().any()


def test_every_shipped_tile_and_split() -> None:
    q, scale, zero = weight(130, 1024, 4, 64, 1)
    x = torch.randn(20, 1024, generator=torch.manual_seed(8)).half()
    w = launch._weight(PackedWeight(q.unsqueeze(0), scale, zero, [], 4, "int", 64, 1, 1024))
    dense, span = span_of(q, scale, zero, 4, 64, 1, 1024)
    device = launch.describe(x.device)
    tiles = {tile for arch in config.TARGETS for tile in config.shipped(arch).values()}
    for tile in tiles:
        for split in (1, 4):
            chosen = config.plan(
                config.Problem(20, 130, 1024, 1, 4, 64, 1, 2), device, config.replace(tile, split_k=split)
            )
            out = torch.full((1, 20, 130), torch.nan, dtype=torch.float16)
            launch._launch(x.unsqueeze(0), w, None, None, None, out, device, chosen)
            assert_product(out[0], x, dense, span)


def test_empty_inputs() -> None:
    q, scale, zero = weight(6, 64, 3, 32, 1)
    for shape in ((0, 64), (2, 0, 64)):
        got = called(launch.linear, torch.empty(shape), q, scale, zero, None, None, [], 3, "int", 32, 1, 64, "float")
        assert got.shape == (*shape[:-1], 6)
    none = torch.empty(0, dtype=torch.int64)
    assert called(launch.embedding, none, q, scale, zero, [], 3, "int", 32, 1, 64, torch.float32).shape == (0, 64)


def test_int8_activations_are_those_of_the_reference() -> None:
    weights = weight(6, 128, 4, 64, 1)
    x = torch.randn(3, 128, generator=torch.manual_seed(9))
    args = (x, *weights, None, None, [], 4, "int", 64, 1, 128, "int8")
    assert torch.equal(called(launch.linear, *args), called(reference.linear, *args))


def test_wrong_arguments_are_named() -> None:
    q, scale, zero = weight(6, 128, 4, 64, 1)
    with pytest.raises(ValueError, match="take 128 bytes"):
        called(launch.dequantize, q, scale, zero, [], 4, "int", 64, 1, 256, torch.float32)
    with pytest.raises(TypeError, match="float64"):
        called(
            launch.linear, torch.zeros(1, 128).double(), q, scale, zero, None, None, [], 4, "int", 64, 1, 128, "float"
        )
    with pytest.raises(TypeError, match="int32"):
        called(launch.dequantize, q, scale, zero, [], 4, "int", 64, 1, 128, torch.int32)
    codes = torch.zeros(6, 20, dtype=torch.uint8)
    own = [torch.ones(1, 16)] * 2
    args = (None, own, 4, "int", 8, 1, 128, torch.float32)
    with pytest.raises(ValueError, match="16 bytes in 8 bits or 8 in 4, got 20"):
        called(launch.dequantize, q, codes, *args)
    with pytest.raises(ValueError, match=r"rows of 16 .* got \[6, 8\]"):
        called(launch.dequantize, q, scale.repeat(1, 4), *args)
    with pytest.raises(ValueError, match=r"rows of 16 .* got \[1, 8\]"):  # as if packed like the codes they scale
        called(launch.dequantize, q, codes[:, :8], None, [t[:, :8] for t in own], *args[2:])
    with pytest.raises(TypeError, match="that are not"):
        called(launch.dequantize, q, codes[:, :8], None, [codes[:, :16]] * 2, *args[2:])
    with pytest.raises(ValueError, match="entries"):
        called(launch.dequantize, q, scale, None, [], 4, "codebook", 64, 1, 128, torch.float32)


def test_planes_are_those_of_the_layout() -> None:
    from hqqtensor.kernels.triton.decode import narrower, widest

    for nbits, planes in PLANES.items():
        found = (widest(nbits), narrower(nbits, 1), narrower(nbits, 2))
        assert tuple(p for p in found if p) == planes
