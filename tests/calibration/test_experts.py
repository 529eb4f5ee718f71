"""Calibration of 3-D expert weights: each expert on the tokens that are sent to it."""

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.integrations import moe

from hqqtensor import HqqConfig, HQQTensor, load_model, quantize_, save_model
from hqqtensor.calibration import calibrate, chain, experts, train
from hqqtensor.calibration.build import experts_from_calibrated
from hqqtensor.selection import is_experts

TEXT = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 16,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
    ),
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)),
}
CONFIG = HqqConfig(3, 16)


@functools.cache
def _made(name: str) -> nn.Module:
    """A random model whose hidden states have eight directions and features of different size, as those of real ones.

    The first of them is always positive; a router can tell by it that no token is to go to an expert.
    """
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.copy_(torch.randn(96, 8) @ torch.randn(8, 64) + 0.2 * torch.randn(96, 64))
        embedding[:, 0] = 6
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.copy_(torch.randn(64).mul(0.7).exp())
            for leaf in ("gate_up_proj", "down_proj"):
                getattr(layer.mlp.experts, leaf).mul_(5)
    return model


def model_of(name: str) -> Any:
    return copy.deepcopy(_made(name))


def experts_of(model: Any, layer: int = 0) -> Any:
    return model.model.layers[layer].mlp.experts


def only_experts(module: nn.Module, _name: str) -> bool:
    return is_experts(module)


def batches(count: int = 4, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 96, (4, 64), generator=generator)} for _ in range(count)]


@torch.no_grad()
def error(model: Any, other: Any) -> float:
    """Relative squared error of the hidden states on tokens that were not calibrated on."""
    ids = batches(2, seed=99)
    pairs = [(model.model(**b).last_hidden_state, other.model(**b).last_hidden_state) for b in ids]
    return sum(((a - b).square().sum() / a.square().sum()).item() for a, b in pairs) / len(pairs)


def quantized(name: str, mode: str | None, config: HqqConfig = CONFIG, **options: Any) -> Any:
    model = model_of(name)
    calibration = calibrate(model, batches(), mode) if mode else None
    quantize_(model, config, calibration=calibration, **options)
    return model


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", ["diagonal", "full"])
def test_calibrated_experts_are_nearer_to_the_dense_ones(name: str, mode: str) -> None:
    dense = model_of(name)
    plain, calibrated = (quantized(name, m, filter_fn=only_experts) for m in (None, mode))
    assert type(calibrated.lm_head.weight) is nn.Parameter
    assert error(dense, calibrated) < {"diagonal": 0.9, "full": 0.6}[mode] * error(dense, plain)


def layout(tensor: Any) -> Any:
    """All of a tensor but its numbers."""
    if not isinstance(tensor, HQQTensor):
        return None if tensor is None else (tensor.shape, tensor.dtype)
    attributes = [getattr(tensor, name) for name in tensor.tensor_attribute_names]
    return attributes, [layout(getattr(tensor, name)) for name in ("qdata", "scale", "zero_point", "act_pre_scale")]


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        HqqConfig(3),
        HqqConfig(4, None),
        HqqConfig(4, 32, solver="column_scaled"),
        HqqConfig(2, 20, rotation=True),
    ],
    ids=["g16", "auto", "rows", "column_scaled", "rotation"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_settings_and_layout_are_those_without_calibration(name: str, config: HqqConfig) -> None:
    plain = quantized(name, None, config, filter_fn=only_experts)
    for mode in ("diagonal", "full"):
        if mode == "full" or not config.rotation:
            calibrated = quantized(name, mode, config, filter_fn=only_experts)
            for leaf in ("gate_up_proj", "down_proj"):
                got, want = (getattr(experts_of(m), leaf) for m in (calibrated, plain))
                assert layout(got) == layout(want)
                assert not torch.equal(got.qdata, want.qdata)


def without_expert(name: str) -> Any:
    """A model whose router sends nothing to expert 0 of the first layer."""
    model = model_of(name)
    gate = model.model.layers[0].mlp.gate.weight
    with torch.no_grad():
        gate[0] = 0
        gate[0, 0] = -100
    return model


@pytest.mark.parametrize("mode", ["diagonal", "full"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_an_expert_that_no_token_reached_is_calibrated_on_all_tokens(name: str, mode: str) -> None:
    model = without_expert(name)
    calibration = calibrate(model, batches(), mode)
    first = calibration.experts["model.layers.0.mlp.experts"]
    assert first.tokens[0] == 0 and int(first.tokens.sum()) == 4 * 4 * 64 * 2
    assert "8 experts in 2 modules, each on 0 tokens or more" in calibration.report()
    plain, seen = copy.deepcopy(model), []
    experts_of(model).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    model(**batches(1, seed=99)[0])
    quantize_(plain, CONFIG, filter_fn=only_experts)
    dense = experts_of(model).gate_up_proj[0].detach()
    quantize_(model, CONFIG, filter_fn=only_experts, calibration=calibration)
    x = seen[0]
    errors = [(x @ (experts_of(m).gate_up_proj[0].dequantize() - dense).T).square().sum() for m in (model, plain)]
    assert errors[0] < 0.9 * errors[1]


def test_experts_below_the_floor_are_counted() -> None:
    tokens = calibrate(model_of("mixtral"), batches(1)).experts["model.layers.0.mlp.experts"].tokens
    report = calibrate(model_of("mixtral"), batches(1)).report()
    assert int(tokens.sum()) == 512 and (tokens < experts.FLOOR).any()
    assert f"of them on fewer than {experts.FLOOR}" in report and " 0 of them" not in report


def test_an_expert_with_as_many_tokens_as_the_floor_has_half_of_its_own_moments() -> None:
    own, average = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 1.0])
    assert torch.equal(experts.mixed(own * experts.FLOOR, experts.FLOOR, average), (own + average) / 2)
    assert torch.equal(experts.mixed(torch.zeros(2), 0, average), average)


def test_down_is_calibrated_on_what_the_quantized_gate_gives() -> None:
    model = model_of("qwen3_moe")
    quantize_(model, CONFIG, filter_fn=only_experts, calibration=calibrate(model, batches()))
    dense, module, calls = experts_of(model_of("qwen3_moe")).down_proj, experts_of(model), []
    module.register_forward_pre_hook(lambda m, args: calls.append(experts.routed(m, args, {}, None)))
    for batch in batches():
        model(**batch)
    want = experts_from_calibrated(
        dense.detach(), CONFIG, experts.whole_moments(module, experts.joined(calls), "down_proj"), lambda _expert: None
    )
    assert torch.equal(module.down_proj, want)


def test_padding_does_not_count() -> None:
    batch = batches(1)[0]
    mask = torch.ones_like(batch["input_ids"])
    mask[:, 40:] = 0
    calibration = calibrate(model_of("mixtral"), [{**batch, "attention_mask": mask}])
    assert {int(e.tokens.sum()) for e in calibration.experts.values()} == {4 * 40 * 2}


@pytest.mark.parametrize("mode", ["diagonal", "full"])
def test_an_interrupt_among_experts_leaves_the_model_as_it_was(mode: str) -> None:
    model = model_of("mixtral")
    before = copy.deepcopy(model.state_dict())
    names: list[str] = []

    def stop(done: int, total: int, name: str) -> None:
        names.append(name)
        if name == "model.layers.1.mlp.experts.down_proj[2]":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_(model, CONFIG, calibration=calibrate(model, batches(1), mode), progress=stop)
    assert "model.layers.0.mlp.experts.gate_up_proj[3]" in names
    after = model.state_dict()
    assert all(type(after[k]) is type(v) and torch.equal(after[k], v) for k, v in before.items())


def test_progress_counts_every_element_once() -> None:
    model, seen = model_of("mixtral"), []
    quantize_(model, CONFIG, calibration=calibrate(model, batches(1)), progress=lambda *call: seen.append(call))
    done, totals, _ = zip(*seen, strict=True)
    weights = [p for p in model.parameters() if isinstance(p, HQQTensor)]
    assert done == tuple(sorted(done)) and set(totals) == {done[-1]} == {sum(p.numel() for p in weights)}


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", FAMILIES)
def test_calibrated_experts_run_and_are_saved_and_loaded(name: str, implementation: str, tmp_path: Path) -> None:
    model = model_of(name)
    model.set_experts_implementation(implementation)
    quantize_(model, HqqConfig(3), calibration=calibrate(model, batches(1)))
    save_model(model, tmp_path / "model.safetensors")
    again = FAMILIES[name]().eval()
    again.set_experts_implementation(implementation)
    load_model(again, tmp_path / "model.safetensors")
    ids = batches(1, seed=5)[0]
    with torch.no_grad():
        torch.testing.assert_close(again(**ids).logits, model(**ids).logits, rtol=1e-5, atol=1e-5)


def test_the_other_layers_of_a_block_are_trained_beside_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def spy(roundings: Any, *args: Any) -> Any:
        seen.append(([r.module for r in roundings], train.train_rounding(roundings, *args)))
        return seen[-1][1]

    monkeypatch.setattr(chain, "train_rounding", spy)
    monkeypatch.setattr(train, "REACH", 0.05)
    model = quantized("qwen3_moe", "trained")
    for layer, (modules, _) in zip(model.model.layers, seen, strict=True):
        attention = layer.self_attn
        assert modules == [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        assert isinstance(layer.mlp.experts.down_proj, HQQTensor)
    assert any(after < before for _, (before, after) in seen)


def test_a_module_that_is_not_understood_is_named_and_quantized_without_calibration(monkeypatch: Any) -> None:
    model, plain = model_of("qwen3_moe"), model_of("qwen3_moe")
    cls = type(experts_of(model))
    forward = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x, index, shares: forward(self, x, index, shares) + x)
    with pytest.warns(UserWarning, match=r"model\.layers\.0\.mlp\.experts: quantized without calibration, its output"):
        calibration = calibrate(model, batches())
    assert not calibration.experts and "model.layers.1.mlp.experts" in calibration.unseen
    quantize_(model, CONFIG, calibration=calibration)
    quantize_(plain, CONFIG)
    assert torch.equal(experts_of(model).gate_up_proj, experts_of(plain).gate_up_proj)


def test_experts_without_a_gate_and_with_another_one_are_understood() -> None:
    class Experts(nn.Module):
        def __init__(self, config: Any, rows: int) -> None:
            super().__init__()
            self.num_experts, self.act_fn = 3, nn.functional.silu
            name = "gate_up_proj" if rows == 32 else "up_proj"
            setattr(self, name, nn.Parameter(torch.randn(3, rows, 8)))
            self.down_proj = nn.Parameter(torch.randn(3, 8, 16))

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            raise AssertionError

    for has_gate in (True, False):
        torch.manual_seed(0)
        cls: Any = moe.use_experts_implementation(type("Own", (Experts,), {}), has_gate=has_gate)
        module = cls(tf.MixtralConfig(), 32 if has_gate else 16)
        module.config._experts_implementation = "batched_mm"
        index = torch.tensor([[0, 1], [1, 2]])
        args = (torch.randn(2, 8), index, torch.rand(2, 2))
        assert experts.why_not(module, args, {}) is None
        assert "TypeError" in (experts.why_not(module, (), {}) or "")


def test_experts_of_another_model_are_refused() -> None:
    calibration = calibrate(model_of("mixtral"), batches(1))
    fewer = tf.MixtralForCausalLM(tf.MixtralConfig(**TEXT, num_local_experts=3, num_experts_per_tok=2))
    with pytest.raises(ValueError, match="calibrated on 4 experts of 64 inputs, the weight has 3 experts of 64 inputs"):
        quantize_(fewer, CONFIG, filter_fn=only_experts, calibration=calibration)


def test_settings_that_calibration_does_not_serve_are_refused_for_experts() -> None:
    model = model_of("mixtral")
    config = HqqConfig(4, 32, dynamic_config={"experts": {"format": "nf4"}})
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj: calibration serves format 'int'"):
        quantize_(model, config, calibration=calibrate(model, batches(1)))
    assert not any(isinstance(p, HQQTensor) for p in model.parameters())


def test_known_families_give_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in FAMILIES:
            assert len(calibrate(model_of(name), batches(1)).experts) == 2
