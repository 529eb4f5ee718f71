"""load: a quantized directory, mapped and not copied."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers

from hqqtensor import HqqConfig, HQQTensor, load, quantize_, save_model
from hqqtensor.serialization.layout import CheckpointError, InputError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied bfloat16 Llama of two layers, as transformers saves it."""
    path = tmp_path_factory.mktemp("quantized")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, eos_token_id=7,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).bfloat16()
    settings = HqqConfig(4, embedding_nbits=8)
    quantize_(model, settings)
    save_model(model, path, non_persistent_buffers=False)
    entry = {"quant_method": "hqqtensor", **settings.to_dict()}
    model.config.quantization_config, model.config.dtype = entry, torch.bfloat16
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(path)
    transformers.GenerationConfig(eos_token_id=11).save_pretrained(path)
    return path


def test_a_layer_that_another_thread_builds_meanwhile_has_its_numbers(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[torch.nn.Module] = []
    real = transformers.LlamaModel.__init__

    def in_the_middle(self: torch.nn.Module, config: transformers.LlamaConfig) -> None:
        real(self, config)
        assert self.embed_tokens.weight.is_meta  # type: ignore[union-attr]
        thread = threading.Thread(target=lambda: built.extend([torch.nn.Linear(8, 8), transformers.LlamaModel(config)]))
        thread.start()
        thread.join()

    with monkeypatch.context() as patch:
        patch.setattr(transformers.LlamaModel, "__init__", lambda self, config: in_the_middle(self, config)
                      if threading.current_thread() is threading.main_thread() else real(self, config))  # fmt: skip
        load(saved)
    linear, model = built
    assert all(p.device.type == "cpu" for module in built for p in module.parameters())
    assert 0.1 < linear.weight.abs().max() <= 8**-0.5 and 0.01 < model.embed_tokens.weight.std() < 0.03


def test_threads_load_at_once(saved: Path) -> None:
    want = load(saved).state_dict()
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: load(saved), range(8)))
    for model in models:
        assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())
        assert not model.model.rotary_emb.inv_freq.is_meta
        assert model.lm_head.weight is model.model.embed_tokens.weight


def mapped(path: Path, tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in a mapping of the file."""
    place = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= place < end:
            return line.endswith(str(path / "model.safetensors"))
    return False


def test_it_is_what_transformers_loads_with_nothing_copied(saved: Path) -> None:
    want = transformers.LlamaForCausalLM.from_pretrained(saved)
    model = load(saved)
    assert type(model) is transformers.LlamaForCausalLM and not model.training
    for (name, a), (_, b) in zip(want.state_dict().items(), model.state_dict().items(), strict=True):
        assert type(a) is type(b) and torch.equal(a, b), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == 11
    weight = model.model.layers[1].mlp.up_proj.weight
    assert mapped(saved, weight.qdata) and mapped(saved, weight.scale.qdata)
    assert mapped(saved, model.model.norm.weight)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want.eval()(ids).logits)


def test_another_dtype_leaves_codes_where_they_are(saved: Path) -> None:
    model = load(saved, dtype=torch.float32)
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert isinstance(weight, HQQTensor) and weight.dtype == torch.float32 and mapped(saved, weight.qdata)
    assert model.dtype == model.model.norm.weight.dtype == model.config.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    with torch.no_grad():
        assert model(torch.arange(6)[None]).logits.dtype == torch.float32


def test_for_generation_weights_are_copied_or_with_a_word_left_mapped(saved: Path) -> None:
    from hqqtensor import prepare_for_generation_

    plain, copied = load(saved), load(saved, generation=True)
    shared = prepare_for_generation_(load(saved), copy_weights=False)
    weights = [m.model.layers[0].mlp.up_proj.weight for m in (copied, shared)]
    assert not mapped(saved, weights[0].qdata) and mapped(saved, weights[1].qdata)
    ids = torch.arange(6)[None]
    out = [m.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None) for m in (plain, copied, shared)]
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])
    assert copied.model.forward.decoded_calls == shared.model.forward.decoded_calls == 7


def test_what_is_no_quantized_directory_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no config\.json"):
        load(tmp_path)
    with pytest.raises(ValueError, match="dtype must be a floating"):
        load(saved, dtype=torch.int8)
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    config = json.loads((copy / "config.json").read_text())
    for entry, match in ((None, "is not quantized"), ({"quant_method": "gptq"}, "quantized with 'gptq'")):
        (copy / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))
        with pytest.raises(InputError, match=match):
            load(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load(copy)


def test_a_file_that_lacks_a_weight_is_refused(saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3, "layer_types": None}))
    with pytest.raises((CheckpointError, RuntimeError), match=r"layers\.2"):
        load(copy)
