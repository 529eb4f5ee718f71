"""What vLLM's torchao loader does with our checkpoints and configs, step by step, without vLLM.

The steps are those of vllm/model_executor/layers/quantization/torchao.py (from_config, create_weights),
model_executor/model_loader/weight_utils.py (the "torchao" strategy) and layers/linear.py (the weight loaders).
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from doclm_models import DOCLM, PLAIN
from fresh_python import run_fresh
from safetensors import safe_open
from torch import Tensor, nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
from torchao.prototype.tensor_conversion.api import convert_to_packed_tensor_based_on_current_hardware
from torchao.quantization import FqnToConfig
from torchao.quantization import quantize_ as torchao_quantize_
from transformers import AutoModelForCausalLM

from hqqtensor import HqqConfig, HQQTensor, load_model, quantize_
from hqqtensor.cli import main
from hqqtensor.integrations.vllm.torchao_checkpoint import HqqStoredConfig, for_vllm


def settings_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def convert(tmp_path: Path, *arguments: str) -> Path:
    source, out = tmp_path / "ours", tmp_path / "vllm"
    assert main(["quantize", str(DOCLM), str(source), *PLAIN, *arguments, "--json"]) == 0
    assert main(["convert", str(source), str(out), "--to", "vllm", "--max-shard-size", "1MB"]) == 0
    return out


def config_for(entry: dict[str, Any], prefix: str) -> Any:
    """The config of the linear layer that vLLM calls ``prefix``; None where it leaves it dense."""
    assert entry["quant_method"] == "torchao" and list(entry["quant_type"]) == ["default"]
    if any(f".{skip}." in f".{prefix}." for skip in entry["modules_to_not_convert"]):
        return None
    config = config_from_dict(entry["quant_type"]["default"])
    return config.module_fqn_to_config.get(prefix) if isinstance(config, FqnToConfig) else config


def create_weight(config: Any, rows: int, columns: int, dtype: torch.dtype) -> nn.Parameter:
    weight = nn.Parameter(torch.full((rows, columns), float("nan"), dtype=dtype), requires_grad=False)
    with torch.device("meta"):
        holder = nn.Sequential(nn.Linear(columns, rows, bias=False))
    holder[0].weight = weight
    torchao_quantize_(holder, config)
    parameter = holder[0].weight
    parameter.input_dim, parameter.output_dim = 1, 0
    return parameter


def stored(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    left: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            state = {name: f.get_tensor(name) for name in f.keys()} | left  # noqa: SIM118
            whole, left = unflatten_tensor_state_dict(state, f.metadata())
        found |= whole
    assert not left
    return found


def load_columns(parameter: nn.Parameter, parts: list[Tensor], rank: int, ranks: int) -> None:
    """QKVParallelLinear and MergedColumnParallelLinear: each part's rows of this rank, one after another."""
    offset = 0
    for part in parts:
        size = part.shape[0] // ranks
        room = parameter.data.narrow(parameter.output_dim, offset, size)
        piece = part.narrow(parameter.output_dim, rank * size, size)
        assert room.shape == piece.shape
        room.copy_(piece)
        offset += size


def load_rows(parameter: nn.Parameter, part: Tensor, rank: int, ranks: int) -> None:
    """RowParallelLinear: the columns of this rank."""
    size = part.shape[1] // ranks
    piece = part.narrow(parameter.input_dim, rank * size, size)
    assert parameter.data.shape == piece.shape
    parameter.data.copy_(piece)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("vllm"), "--bits", "4", "--group-size", "64")


def test_the_config_is_one_that_torchao_reads_back(directory: Path) -> None:
    entry = settings_of(directory)["quantization_config"]
    config = config_from_dict(entry["quant_type"]["default"])
    assert config == HqqStoredConfig(4, 64, "int", torch.float16)
    assert config_to_dict(config) == entry["quant_type"]["default"]
    assert entry["modules_to_not_convert"] == []


def test_hqq_config_for_quantizing_in_vllm_round_trips() -> None:
    config = HqqConfig(3, 64, scale_dtype=torch.float16)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@pytest.mark.parametrize("ranks", [1, 2])
def test_layers_that_vllm_fuses_and_splits_hold_the_same_weights(directory: Path, ranks: int) -> None:
    tensors = stored(directory)
    entry = settings_of(directory)["quantization_config"]
    dense = {name: t.dequantize(torch.float32) for name, t in tensors.items() if isinstance(t, HQQTensor)}
    assert len(dense) == 35 and {t.dtype for t in tensors.values()} == {torch.bfloat16}
    for layer in range(5):
        for fused, names in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            prefix = f"model.layers.{layer}.{fused}"
            parts = [f"{prefix.rpartition('.')[0]}.{name}_proj.weight" for name in names]
            rows, columns = sum(dense[p].shape[0] for p in parts) // ranks, dense[parts[0]].shape[1]
            for rank in range(ranks):
                weight = create_weight(config_for(entry, prefix), rows, columns, torch.float16)  # vllm --dtype
                load_columns(weight, [tensors[p] for p in parts], rank, ranks)
                want = torch.cat([dense[p].chunk(ranks)[rank] for p in parts])
                assert weight.dtype == torch.float16 and torch.equal(weight.dequantize(torch.float32), want)
                x = torch.randn(3, columns).half()
                want = x.float() @ want.t()
                assert (nn.functional.linear(x, weight).float() - want).abs().max() < 2e-3 * want.abs().max()
        name = f"model.layers.{layer}.self_attn.o_proj"
        for rank in range(ranks):
            weight = create_weight(config_for(entry, name), 256, 256 // ranks, torch.float32)
            load_rows(weight, tensors[f"{name}.weight"], rank, ranks)
            assert torch.equal(weight.dequantize(), dense[f"{name}.weight"].chunk(ranks, 1)[rank])


def test_a_split_of_columns_within_a_block_is_refused(directory: Path) -> None:
    down = stored(directory)["model.layers.0.mlp.down_proj.weight"]  # 704 columns: halves end within a block of 128
    weight = create_weight(HqqStoredConfig(4, 64), 256, 352, torch.float32)
    with pytest.raises(NotImplementedError, match="in_features can be cut at multiples of 128"):
        load_rows(weight, down, 0, 2)


def test_the_steps_after_loading_leave_the_weight_what_it_is(directory: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    weight = create_weight(HqqStoredConfig(4, 64), 256, 256, torch.bfloat16)
    load_rows(weight, stored(directory)[name], 0, 1)
    again = nn.Parameter(convert_to_packed_tensor_based_on_current_hardware(weight), requires_grad=False)
    for key, value in weight.__dict__.items():  # vLLM puts its own attributes back where they are gone
        if not hasattr(again, key):
            setattr(again, key, value)
    assert isinstance(again, HQQTensor) and torch.equal(again.data, weight.data)
    assert (again.input_dim, again.output_dim) == (1, 0)


def test_our_own_loaders_and_transformers_read_the_same_directory(directory: Path) -> None:
    ours = directory.parent / "ours"
    want = AutoModelForCausalLM.from_pretrained(ours)
    model = AutoModelForCausalLM.from_pretrained(directory)
    blank = AutoModelForCausalLM.from_pretrained(DOCLM)
    load_model(blank, directory)
    for name, tensor in want.state_dict().items():
        for other in (model, blank):
            assert torch.equal(other.state_dict()[name], tensor), name


def test_settings_by_layer_go_by_vllms_names(tmp_path: Path) -> None:
    layers = ["self_attn.o_proj=3/64", "down_proj=none", "q_proj=8/32", "k_proj=8/32", "v_proj=8/32"]
    out = convert(tmp_path, "--layers", *layers)
    entry = settings_of(out)["quantization_config"]
    assert config_for(entry, "model.layers.0.self_attn.qkv_proj").nbits == 8
    assert config_for(entry, "model.layers.0.self_attn.o_proj").nbits == 3
    assert config_for(entry, "model.layers.0.mlp.gate_up_proj").nbits == 4
    assert config_for(entry, "model.layers.1.mlp.down_proj") is None
    assert set(entry["modules_to_not_convert"]) == {f"model.layers.{i}.mlp.down_proj" for i in range(5)}
    assert not isinstance(stored(out)["model.layers.0.mlp.down_proj.weight"], HQQTensor)
    assert main(["convert", str(out), str(tmp_path / "back"), "--json"]) == 0
    model, again = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("ours", "back"))
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())


def tiny(**options: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, **options
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def test_embeddings_and_output_layer_become_dense() -> None:
    model = tiny()
    quantize_(model, HqqConfig(4, 64, skip_modules=[], dynamic_config={"embed_tokens": {"nbits": 8}}))
    made = for_vllm(model, model.state_dict(), torch.float16)
    assert sorted(made.made_dense) == ["lm_head.weight", "model.embed_tokens.weight"]
    for name in made.made_dense:
        assert type(made.state[name]) is Tensor and made.state[name].dtype == torch.float16
        assert torch.equal(made.state[name], model.state_dict()[name].dequantize(torch.float16))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (HqqConfig(4, 64, axis=0), "axis 0"),
        (HqqConfig(4, 64, quant_scale=True), "quantized scales"),
        (HqqConfig(4), r"quantized scales or zero points \(quantize with group_size=64"),
        (HqqConfig(4, 64, format="codebook", codebook="row"), "a learned codebook"),
        (HqqConfig(4, 64, solver="column_scaled"), "act_pre_scale"),
        (HqqConfig(4, 64, dynamic_config={"q_proj": {"nbits": 8}}), "self_attn.q_proj and .*k_proj: vLLM joins them"),
        (HqqConfig(4, 64, dynamic_config={"up_proj": None}), "gate_proj and .*up_proj: vLLM joins them"),
    ],
)
def test_what_vllm_cannot_cut_or_join_is_named(config: HqqConfig, match: str) -> None:
    model = tiny()
    quantize_(model, config)
    with pytest.raises(ValueError, match=rf"model\.layers\.0\.\S+: .*{match}|model\.layers\.0\..*{match}"):
        for_vllm(model, model.state_dict(), torch.float16)


def test_experts_and_dense_models_are_refused() -> None:
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    quantize_(model, HqqConfig(4, 64))
    with pytest.raises(ValueError, match=r"experts\.\w+: is no weight of a linear layer"):
        for_vllm(model, model.state_dict(), torch.float16)
    with pytest.raises(ValueError, match="no linear layer is quantized"):
        for_vllm(tiny(), tiny().state_dict(), torch.float16)


@pytest.mark.parametrize("config", [HqqStoredConfig(3, 64), HqqStoredConfig(4, 32, "nf4", torch.bfloat16)])
def test_room_has_the_geometry_of_what_from_hp_makes(config: HqqStoredConfig) -> None:
    room = create_weight(config, 96, 200, torch.float16)
    options = {"format": config.format, "scale_dtype": config.scale_dtype, "compute_dtype": torch.float16}
    weight = HQQTensor.from_hp(torch.randn(96, 200), HqqConfig(config.nbits, config.group_size, **options))
    assert torch.equal(room.dequantize(), torch.zeros(96, 200, dtype=torch.float16))
    room.data.copy_(weight)
    assert torch.equal(room.data, weight)


def test_stored_configs_are_checked() -> None:
    for options in ((9, 64), (4, 0), (4, 64, "int5")):
        with pytest.raises(ValueError):
            HqqStoredConfig(*options)
    with pytest.raises(ValueError, match=r"Conv2d\.weight: a stored weight is a matrix"):
        torchao_quantize_(
            nn.Sequential(nn.Conv2d(2, 2, 3)), HqqStoredConfig(4, 64), lambda m, _: isinstance(m, nn.Conv2d)
        )


def test_a_process_that_imported_hqqtensor_alone_reads_config_and_files(directory: Path) -> None:
    code = f"""
import json
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
import hqqtensor.registration
hqqtensor.registration.register()
from safetensors import safe_open
from torchao.core.config import config_from_dict
entry = json.load(open({str(directory / "config.json")!r}))["quantization_config"]["quant_type"]["default"]
print(type(config_from_dict(entry)).__name__)
file = sorted(__import__("glob").glob({str(directory)!r} + "/*.safetensors"))[-1]
with safe_open(file, framework="pt") as f:
    whole, _ = unflatten_tensor_state_dict({{k: f.get_tensor(k) for k in f.keys()}}, f.metadata())
print(len(whole), {{type(t).__name__ for t in whole.values() if t.ndim == 2}})
"""
    done = run_fresh(code)
    name, count, kinds = done.stdout.split()
    assert name == "HqqStoredConfig" and int(count) > 0 and kinds == "{'HQQTensor'}", done.stderr


@pytest.mark.parametrize("size", ["auto", None, 0])
def test_a_stored_geometry_chooses_no_group_size(size: Any) -> None:
    with pytest.raises(ValueError, match="group_size must be a positive integer"):
        HqqStoredConfig(4, size)
