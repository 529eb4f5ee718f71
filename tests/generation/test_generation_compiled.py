"""Models without a description, compiled: the same tokens, one graph for all layers and lengths."""

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from torch._dynamo.utils import counters

from hqqtensor import HqqConfig, prepare_for_generation_, quantize_, undo_generation_

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def small() -> Any:
    torch.manual_seed(0)
    model = tf.StableLmForCausalLM(tf.StableLmConfig(**SIZES)).eval()
    quantize_(model, HqqConfig(4, 32))
    return model


def answer(model: Any, tokens: int = 12) -> torch.Tensor:
    ids = torch.randint(3, 96, (1, 11), generator=torch.manual_seed(1))
    return model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def test_one_graph_serves_all_layers_and_lengths_until_it_is_undone(capsys: pytest.CaptureFixture[str]) -> None:
    model = small()
    want, attention = answer(model, 60), model.config._attn_implementation
    graphs = counters["stats"]["unique_graphs"]
    assert prepare_for_generation_(model, compile=True) is model
    assert "compiling one layer of StableLmForCausalLM" in capsys.readouterr().err
    assert torch.equal(answer(model, 60), want)
    assert counters["stats"]["unique_graphs"] - graphs == 1
    layers = model.model.layers
    assert {layer.forward.calls for layer in layers} == {59 + 1}  # and one when it was compared
    prepare_for_generation_(model, compile=True)  # does nothing
    other = small()
    other.load_state_dict({name: t * 1.1 if t.ndim == 1 else t for name, t in other.state_dict().items()})
    model.load_state_dict(other.state_dict())
    assert torch.equal(answer(model), answer(other)) and torch.equal(answer(copy.deepcopy(model)), answer(other))
    seen: list[int] = []
    hook = layers[1].register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(answer(model), answer(other)) and len(seen) == 12
    hook.remove()
    undo_generation_(model)
    assert torch.equal(answer(model), answer(other)) and model.config._attn_implementation == attention
    assert not any("forward" in layer.__dict__ for layer in layers)


def test_models_that_cannot_be_compiled_say_why_and_stay_as_they_were() -> None:
    with pytest.raises(ValueError, match="holds no base models of"):
        prepare_for_generation_(small())
    with pytest.raises(ValueError, match="Linear has no list of decoder layers"):
        prepare_for_generation_(nn.Linear(2, 2), compile=True)
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        prepare_for_generation_(small().train(), compile=True)
