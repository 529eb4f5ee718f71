import contextlib
import copy

import pytest
import torch
from torch import nn

from hqqtensor import HqqConfig, HQQTensor, dequantize_, quantize_
from hqqtensor.calibration import calibrate, finetune
from hqqtensor.calibration.build import from_calibrated
from hqqtensor.calibration.feedback import feed_back
from hqqtensor.calibration.moments import InputMoments, damped_factor, inverse_factor


class Net(nn.Module):
    """Two layers with a common input, one after them, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(64, 96), nn.Linear(64, 96, bias=False)
        self.out, self.unused = nn.Linear(96, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.a(x)) * self.b(x))


def correlated(count: int, seed: int) -> torch.Tensor:
    """Inputs of low rank plus a little noise, the last of them always zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(8, 64, generator=torch.Generator().manual_seed(99))
    x = torch.randn(count, 8, generator=generator) @ mix + 0.1 * torch.randn(count, 64, generator=generator)
    x[:, -1] = 0
    return x


BATCHES = [correlated(64, seed) for seed in range(4)]
CONFIG = HqqConfig(3, 32)


def output_error(model: nn.Module, other: nn.Module) -> float:
    x = correlated(256, 1000)
    with torch.no_grad():
        return ((other(x) - model(x)).square().sum() / model(x).square().sum()).item()


def quantized(mode: str | None, config: HqqConfig = CONFIG) -> tuple[Net, Net]:
    model = Net()
    other = copy.deepcopy(model)
    calibration = calibrate(other, BATCHES, mode) if mode else None
    quantize_(other, config, calibration=calibration)
    return model, other


@pytest.mark.parametrize("solver", ["hqq_joint", "column_scaled"])
def test_each_step_of_calibration_brings_the_output_nearer(solver):
    config = HqqConfig(3, 32, solver=solver, quant_scale=True, quant_zero=True)
    none, full = (output_error(*quantized(mode, config)) for mode in (None, "full"))
    assert full < 0.5 * none


def test_diagonal_calibration_spares_the_inputs_that_are_large():
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    moments = torch.where(torch.arange(64) % 4 == 0, 100.0, 0.01)
    weighted = from_calibrated(w, HqqConfig(2, 32), InputMoments(moments))[0].dequantize() - w
    plain = HQQTensor.from_hp(w, HqqConfig(2, 32)).dequantize() - w
    assert (weighted.square() @ moments).sum() < 0.5 * (plain.square() @ moments).sum()


def test_even_diagonal_calibration_is_as_good_as_none():
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    weighted = (from_calibrated(w, CONFIG, InputMoments(torch.ones(64)))[0].dequantize() - w).square().sum()
    plain = (HQQTensor.from_hp(w, CONFIG).dequantize() - w).square().sum()
    assert weighted == pytest.approx(plain.item(), rel=0.02)


@pytest.mark.parametrize("options", [{}, {"meta_nbits": 8}, {"meta_nbits": 4}], ids=str)
@pytest.mark.parametrize("group_size", [8, 32, 48, None])
def test_what_feedback_counted_on_is_what_is_stored(options, group_size):
    x = correlated(512, 5)
    moments = x.T @ x / 512
    w = torch.randn(130, 64, generator=torch.Generator().manual_seed(2))
    config = HqqConfig(4, group_size, quant_scale=bool(options), quant_zero=bool(options), **options)
    got, _ = from_calibrated(w, config, InputMoments(moments))
    plain = HQQTensor.from_hp(w, config).dequantize() - w
    e = got.dequantize() - w
    # Were scales stored other than they were used, the fine balance of errors would be lost.
    assert ((e @ moments) * e).sum() < 0.2 * ((plain @ moments) * plain).sum()


def test_feedback_without_correlations_is_rounding():
    w = torch.randn(16, 32, generator=torch.Generator().manual_seed(3))
    codes, scale, zero, above = feed_back(w, torch.eye(32), 4, 32, lambda s, z: (s, z))
    torch.testing.assert_close(above + codes, w / scale + zero, rtol=0, atol=1e-4)
    assert torch.equal(codes.float(), (w / scale + zero).round().clamp(0, 15))


def test_inverse_factor_is_that_of_the_damped_moments():
    x = correlated(512, 5)
    h = x.T @ x / 512
    upper = inverse_factor(h, damped_factor(h))
    assert torch.equal(upper, upper.triu())
    damped = h.double()
    mean = damped.diagonal().mean().item()
    damped.diagonal()[-1] = mean
    damped.diagonal().add_(0.01 * mean)
    torch.testing.assert_close((upper.double().T @ upper.double()) @ damped, torch.eye(64).double(), atol=1e-3, rtol=0)
    assert torch.equal(inverse_factor(torch.zeros(4, 4), damped_factor(torch.zeros(4, 4))), torch.eye(4))


def test_report_names_unseen_layers_and_dead_inputs():
    calibration = calibrate(Net(), BATCHES)
    assert calibration.unseen == ["unused"]
    assert calibration.dead["a"] == calibration.dead["b"] == 1
    assert calibration.tokens["a"] == 256
    text = calibration.report()
    assert "unused" in text and "1 of 64" in text


def test_layers_with_a_common_input_are_one_stage():
    assert calibrate(Net(), BATCHES).stages == [["a", "b"], ["out"]]


class Attention(nn.Module):
    """The layers of a decoder layer on hidden states ``[B, S, 64]``: q, k, v; o; gate, up; down."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64, bias=False) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x, attention_mask=None):
        x = x.clone()  # as after a norm: hidden states have other memory in every pass
        x = x + self.o(nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))
        return x + self.down(torch.relu(self.gate(x)) * self.up(x))


ATTENTION_STAGES = [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]


def attention_batches(padded: int | None) -> list[dict[str, torch.Tensor]]:
    """Three batches; with a mask that hides the last ``padded`` of 16 tokens, or without one (None)."""
    hidden_states = [correlated(64, seed).reshape(4, 16, 64) for seed in range(3)]
    if padded is None:
        return [{"x": x} for x in hidden_states]
    mask = (torch.arange(16) < 16 - padded).long().expand(4, 16)
    return [{"x": x, "attention_mask": mask} for x in hidden_states]


@pytest.mark.parametrize("padded", [None, 0, 5])
def test_query_key_and_value_share_a_pass_with_and_without_a_mask(padded):
    model, batches, passes = Attention(), attention_batches(padded), []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    calibration = calibrate(model, batches)
    assert calibration.stages == ATTENTION_STAGES and calibration.called_once
    assert len(passes) == len(batches)
    quantize_(model, CONFIG, calibration=calibration)
    assert len(passes) == len(batches) + len(batches) * len(ATTENTION_STAGES)
    assert all(isinstance(layer.weight, HQQTensor) for layer in model.children())


def test_a_mask_that_hides_nothing_changes_nothing():
    models = [Attention(), Attention()]
    for model, padded in zip(models, (None, 0), strict=True):
        quantize_(model, CONFIG, calibration=calibrate(model, attention_batches(padded)))
    for one, other in zip(*(model.children() for model in models), strict=True):
        assert torch.equal(one.weight, other.weight)


def test_a_llama_needs_four_passes_a_decoder_layer_with_a_mask():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 64, (2, 16))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    stages = calibrate(model, [{"input_ids": ids, "attention_mask": mask}]).stages
    of_a_layer = [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"],
    ]  # fmt: skip
    layers = [[f"model.layers.{i}.{name}" for name in stage] for i in range(2) for stage in of_a_layer]
    assert stages == [*layers, ["lm_head"]]


def test_inputs_that_only_lie_in_the_same_memory_are_not_shared():
    class InPlace(Net):
        def forward(self, x):
            x = x.clone()
            a = self.a(x)
            return self.out(a * self.b(x.mul_(2)))

    with torch.inference_mode():
        assert calibrate(InPlace(), BATCHES).stages == [["a"], ["b"], ["out"]]
    assert calibrate(InPlace(), BATCHES).stages == [["a"], ["b"], ["out"]]


def test_layers_with_a_common_input_on_some_calls_only_are_not_one_stage():
    class Often(Net):
        def forward(self, x):
            first = self.a(x) * self.b(x)
            return self.out(first + (self.a if self.again == "a" else self.b)(x.neg()))

    for again in ("a", "b"):
        model = Often()
        model.again = again
        assert calibrate(model, BATCHES).stages == [["a"], ["b"], ["out"]]


def test_unseen_layers_are_quantized_all_the_same():
    _, other = quantized("full")
    assert isinstance(other.unused.weight, HQQTensor)
    assert torch.equal(other.unused.weight.dequantize(), HQQTensor.from_hp(Net().unused.weight, CONFIG).dequantize())


def test_padding_does_not_count():
    class Padded(Net):
        def forward(self, x, attention_mask):
            return super().forward(x)

    x = correlated(40, 0).reshape(4, 10, 64)
    mask = torch.ones(4, 10, dtype=torch.int64)
    mask[:, 6:] = 0
    noisy = x.clone()
    noisy[:, 6:] = 1000
    moments = [calibrate(Padded(), [{"x": t, "attention_mask": mask}], "diagonal").moments["a"] for t in (x, noisy)]
    assert torch.equal(*moments)


def test_calibrate_leaves_the_model_and_its_mode_alone():
    model = Net().train()
    calibrate(model, BATCHES)
    assert model.training and not model.a._forward_pre_hooks
    expected = Net().state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("stop", [False, True])
def test_every_module_gets_its_own_mode_back(stop):
    model = Net().train()
    model.a.eval()
    modes = [module.training for module in model.modules()]
    during = []
    model.out.register_forward_hook(lambda *_: during.extend(module.training for module in model.modules()))

    def interrupt(*_args):
        if stop:
            raise KeyboardInterrupt

    def attempt(work):
        with pytest.raises(KeyboardInterrupt) if stop else contextlib.nullcontext():
            work()
        assert [module.training for module in model.modules()] == modes

    calibration = calibrate(model, BATCHES)
    attempt(lambda: calibrate(model, BATCHES, progress=interrupt))
    attempt(lambda: quantize_(model, CONFIG, calibration=calibration, progress=interrupt))
    dense = copy.deepcopy(model)
    if not stop:
        dequantize_(dense)
    else:
        quantize_(model, CONFIG)
    attempt(lambda: finetune(model, dense, BATCHES, steps=1, progress=interrupt))
    assert [module.training for module in dense.modules()] == modes
    assert during and not any(during)


def test_an_error_on_the_way_leaves_the_model_dense():
    model = Net()
    calibration = calibrate(model, BATCHES)
    calls = []

    def fail(done: int, total: int, name: str) -> None:
        calls.append(name)
        if name == "out.weight":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_(model, CONFIG, calibration=calibration, progress=fail)
    assert len(calls) == 3
    assert not any(isinstance(p, HQQTensor) for p in model.parameters())


def test_what_calibration_does_not_serve_is_refused_by_name():
    model = Net()
    calibration = calibrate(model, BATCHES)
    for config in (
        HqqConfig(4, 32, axis=0),
        HqqConfig(4, 32, solver="hqq"),
        HqqConfig(4, 32, integer_zero=True),
        HqqConfig(4, 32, format="nf4"),
    ):
        with pytest.raises(ValueError, match=r"a\.weight: calibration (serves|does not serve)"):
            quantize_(model, config, calibration=calibration)
    with pytest.raises(ValueError, match="mode must be one of"):
        calibrate(model, BATCHES, "best")
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(model, [])
    with pytest.raises(ValueError, match=r"a: its inputs are not finite"):
        calibrate(model, [torch.full((1, 64), torch.inf)])
    with pytest.raises(ValueError, match="none of the layers"):
        quantize_(nn.Sequential(nn.Linear(64, 64)), CONFIG, calibration=calibration)
    assert not any(isinstance(p, HQQTensor) for p in model.parameters())


def test_a_layer_called_twice_a_pass_is_seen_both_times():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            return self.layer(torch.relu(self.layer(x)))

    model = Twice()
    calibration = calibrate(model, BATCHES)
    assert calibration.tokens["layer"] == 2 * 64 and not calibration.called_once
    quantize_(model, CONFIG, calibration=calibration)
    dequantize_(model)
    assert output_error(Twice(), model) < 0.2


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too and comes first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(80, 64), nn.Linear(64, 80, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.embedding(torch.arange(len(x))))


@pytest.mark.parametrize("mode", ["diagonal", "full"])
def test_an_output_layer_is_calibrated_though_a_tied_embedding_comes_first(mode: str) -> None:
    config = HqqConfig(3, 32, skip_modules=[], dynamic_config={"embedding": {}, "head": {}})
    model = Tied()
    calibrated, plain = copy.deepcopy(model), copy.deepcopy(model)
    moments = calibrate(calibrated, BATCHES, mode)
    quantize_(calibrated, config, calibration=moments)
    quantize_(plain, config)
    assert isinstance(calibrated.head.weight, HQQTensor) and calibrated.head.weight is calibrated.embedding.weight
    x = correlated(80, 1000)
    errors = [(m.head(x) - model.head(x)).square().sum().item() for m in (calibrated, plain)]
    assert errors[0] < 0.95 * errors[1]


def test_only_as_many_batches_are_run_first_as_show_every_layer_and_input() -> None:
    live = [torch.randn(16, 8, generator=torch.manual_seed(i)) for i in range(4)]
    half = torch.cat([live[0][:, :4], torch.zeros(16, 4)], 1)
    model = nn.Linear(8, 8)
    assert calibrate(model, live).passes == 1
    assert calibrate(model, [half, *live]).passes == 2
    assert calibrate(model, live, "diagonal").passes == 4
    calls: list[tuple[int, int, str]] = []
    calibrate(model, live, progress=lambda *call: calls.append(call))
    assert calls == [(4, 4, "calibrating")]


def test_inputs_of_a_later_batch_that_are_not_finite_are_an_error_that_names_the_layer() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    batches = [torch.randn(8, 64), torch.full((8, 64), float("inf"))]
    dense = model[0].weight
    with pytest.raises(ValueError, match=r"0\.weight: its inputs are not finite"):
        quantize_(model, HqqConfig(4, 64), calibration=batches)
    assert model[0].weight is dense
