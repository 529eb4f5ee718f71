"""Every family generates what it generates without the decoder, and does it by the decoder."""

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, prompts, quantized

from hqqtensor import HqqConfig
from hqqtensor.generation import DecoderForward, prepare_for_generation_, undo_generation_

META = {"quant_scale": True, "quant_zero": True, "meta_nbits": 4}


def generate(model: Any, batch: int = 1, **settings: Any) -> Any:
    torch.manual_seed(0)
    options = {"max_new_tokens": 20, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**prompts(batch), **{**options, **settings})


class Counted:
    """Counts the calls that went through the decoder."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        run = DecoderForward._run

        def counted(forward: DecoderForward, *args: Any) -> Any:
            out = run(forward, *args)
            self.calls += out is not None
            return out

        monkeypatch.setattr(DecoderForward, "_run", counted)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_gives_the_same_tokens_and_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(name)
    own = {batch: generate(model, batch) for batch in (1, 3)}
    counted = Counted(model, monkeypatch)
    prepare_for_generation_(model)
    for batch, before in own.items():
        counted.calls = 0
        after = generate(model, batch)
        assert torch.equal(after.sequences, before.sequences)
        for a, b in zip(after.logits, before.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        prompts = 2 if name == "phi3 longrope" else 1  # transformers begins anew where the long factors begin
        assert counted.calls == len(after.logits) - prompts


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_in_bfloat16_gives_the_same_logits_up_to_rounding(name: str) -> None:
    ids = prompts()["input_ids"]

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
            steps = [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(6)]
        return torch.cat(steps).float()

    # The same codes, scales and norms in float32. In a float32 model quantized anew they would differ, and so might
    # the experts that are chosen.
    truth = logits(quantized(name, torch.bfloat16).float())
    model = quantized(name, torch.bfloat16)
    before = logits(model)
    prepare_for_generation_(model)
    assert (logits(model) - truth).norm() <= 1.05 * (before - truth).norm() + 1e-3 * truth.norm()


@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"do_sample": True, "top_k": 20}, {"num_return_sequences": 2, "do_sample": True}]
)
def test_beams_and_samples_are_the_same(settings: dict[str, Any]) -> None:
    model = quantized("llama")
    own = generate(model, 2, **settings).sequences
    prepare_for_generation_(model)
    assert torch.equal(generate(model, 2, **settings).sequences, own)


def test_assisted_generation_gives_the_same_tokens() -> None:
    model, assistant = quantized("llama"), quantized("llama")
    own = model.generate(**prompts(), max_new_tokens=20, do_sample=False)
    prepare_for_generation_(model)
    prepare_for_generation_(assistant)
    assert torch.equal(model.generate(**prompts(), max_new_tokens=20, do_sample=False, assistant_model=assistant), own)
    assert torch.equal(model.generate(**prompts(), max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=3), own)


@pytest.mark.parametrize(
    "config",
    [
        HqqConfig(3),
        HqqConfig(4, 20, **META),
        HqqConfig(2, 16, **META),
        HqqConfig(8, 64),
        HqqConfig(4, 32, format="nf4"),
        HqqConfig(4, 32, format="codebook"),
        HqqConfig(4, 24),
        HqqConfig(4, 7),
        HqqConfig(4, 32, activation="int8"),
        HqqConfig(4, 32, axis=0),
        HqqConfig(4, 16, rotation=True),
        HqqConfig(4, 32, solver="column_scaled"),
    ],
    ids=lambda c: f"{c.nbits}-{c.format}-{c.group_size}-{c.activation}-{c.axis}-{c.rotation}-{c.solver}",
)
def test_settings_give_the_same_tokens(config: HqqConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized("llama", config=config)
    own = generate(model, 2)
    counted = Counted(model, monkeypatch)
    prepare_for_generation_(model)
    after = generate(model, 2)
    assert counted.calls == 19
    tolerance = 0.1 if config.activation == "int8" else 1e-3
    torch.testing.assert_close(after.logits[1], own.logits[1], rtol=tolerance, atol=tolerance)
    if config.activation != "int8":
        assert torch.equal(after.sequences, own.sequences)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "skip"),
    [("llama", ["down_proj"]), ("phi3", ["qkv_proj", "layers.1.mlp"]), ("mixtral", ["o_proj", "experts.down_proj"])],
)
def test_layers_that_stayed_dense_are_served_too(
    name: str, skip: list[str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized(name, dtype, HqqConfig(4, 32, skip_modules=skip))
    assert any(type(p) is torch.nn.Parameter and p.ndim > 1 for p in model.model.layers.parameters())
    own = generate(model, 2)
    counted = Counted(model, monkeypatch)
    prepare_for_generation_(model)
    after = generate(model, 2)
    assert counted.calls == len(after.logits) - 1
    tolerance = 1e-3 if dtype == torch.float32 else 0.3
    torch.testing.assert_close(after.logits[1], own.logits[1], rtol=tolerance, atol=tolerance)
    if dtype == torch.float32:
        assert torch.equal(after.sequences, own.sequences)


def test_undone_nothing_is_left() -> None:
    model = quantized("llama")
    before = dict(model.model.__dict__)
    prepare_for_generation_(model)
    assert prepare_for_generation_(model) is model
    assert undo_generation_(model) is model
    assert model.model.__dict__.keys() == before.keys()
