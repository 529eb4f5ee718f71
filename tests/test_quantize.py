import copy
import pickle

import pytest
import torch
import torchao
from torch import nn

import hqqtensor.parameters
from hqqtensor import PRESETS, HqqConfig, HQQTensor, dequantize_, get_optimal_quant_config, hqq_weight_only, quantize_


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32), nn.Embedding(16, 64))


def test_linears_are_replaced_in_place_and_keep_their_class() -> None:
    m = model()
    quantize_(m, hqq_weight_only(8, 64))
    assert type(m[0]) is nn.Linear and isinstance(m[0].weight, HQQTensor)
    assert type(m[3].weight) is nn.Parameter
    assert "HQQTensor(8-bit int" in repr(m)
    copy.deepcopy(m)


def test_dequantize_gives_dense_weights_back() -> None:
    m = model()
    quantize_(m, hqq_weight_only(8, 64))
    want = m[0].weight.dequantize()
    dequantize_(m)
    assert type(m[0].weight) is nn.Parameter and torch.equal(m[0].weight, want) and "HQQTensor" not in repr(m)


WIDTHS = r"nbits must be an integer out of \[1, 2, 3, 4, 5, 6, 7, 8\] for format 'int', got "
LAYER_SETTINGS = r"must be None or a dict of \['nbits', 'group_size', .*'rotation_seed'\], got "


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"nbits": 0}, WIDTHS + "0"),
        ({"nbits": 9}, WIDTHS + "9"),
        ({"nbits": "4"}, WIDTHS + "'4'"),
        ({"nbits": 1.58}, WIDTHS + r"1\.58"),
        ({"nbits": True}, WIDTHS + "True"),
        ({"nbits": 5, "format": "nf4"}, r"nbits must be an integer out of \[4\] for format 'nf4', got 5"),
        ({"group_size": 0}, 'group_size must be a positive integer, None or "auto", got 0'),
        ({"group_size": -64}, 'group_size must be a positive integer, None or "auto", got -64'),
        ({"group_size": "best"}, "group_size must be a positive integer, None or \"auto\", got 'best'"),
        ({"nbits": [4]}, WIDTHS + r"\[4\]"),
        ({"quant_scale": "yes"}, "quant_scale must be True or False, got 'yes'"),
        ({"embedding_nbits": 9}, "embedding_nbits must be None or an integer from 1 to 8, got 9"),
        ({"embedding_nbits": 0}, "embedding_nbits must be None or an integer from 1 to 8, got 0"),
        ({"embedding_nbits": True}, "embedding_nbits must be None or an integer from 1 to 8, got True"),
        ({"axis": 2}, r"axis must be 0 \(along out_features\) or 1 \(along in_features\), got 2"),
        ({"format": []}, r"format must be one of .*, got \[\]"),
        ({"solver": []}, r"solver must be one of .*, got \[\]"),
        ({"solver": "magic"}, r"solver must be one of \[.*'hqq', 'hqq_joint', .*'rtn'.*\], got 'magic'"),
        ({"format": "float5"}, r"format must be one of \[.*'fp4', 'fp6', 'fp8', 'int', 'nf4'\], got 'float5'"),
        ({"bits": 4}, r"unknown HqqConfig options \['bits'\]; options are \['nbits', 'group_size', "),
        ({"scale_dtype": "int8"}, r"scale_dtype must be None or one of \[torch.float16, .*\], got torch.int8"),
        ({"scale_dtype": "float17"}, "scale_dtype must be a torch.dtype or its name, got 'float17'"),
        ({"lp_norm": 0}, "lp_norm must be over 0 and at most 2, got 0"),
        ({"group_size": 64, "meta_nbits": 4}, "meta_nbits 4 needs quant_scale=True or quant_zero=True"),
        ({"meta_nbits": 6, "quant_scale": True}, r"meta_nbits must be one of \[4, 8\], got 6"),
        ({"meta_nbits": 0}, r"meta_nbits must be one of \[4, 8\], got 0"),
        ({"meta_nbits": "4"}, r"meta_nbits must be one of \[4, 8\], got '4'"),
        ({"dynamic_config": {"0": {"nbits": 11}}}, r"dynamic_config\['0'\]: " + WIDTHS + "11"),
        ({"dynamic_config": {"0": {"bits": 3}}}, r"dynamic_config\['0'\] " + LAYER_SETTINGS + r"{'bits': 3}"),
        ({"dynamic_config": {"0": 4}}, r"dynamic_config\['0'\] " + LAYER_SETTINGS + "4"),
    ],
)
def test_bad_settings_say_what_is_allowed(bad: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        hqq_weight_only(**bad)


def _refused(m: nn.Module, config: HqqConfig, match: str, error: type = ValueError) -> None:
    parameters = dict(m.named_parameters())
    values = {name: None if p.is_meta else p.detach().clone() for name, p in parameters.items()}
    with pytest.raises(error, match=match):
        quantize_(m, config)
    after = dict(m.named_parameters())
    assert list(after) == list(parameters)
    for name, value in values.items():
        assert after[name] is parameters[name] and type(after[name]) is nn.Parameter
        if value is not None:
            torch.testing.assert_close(after[name].detach(), value, rtol=0, atol=0, equal_nan=True)


def test_bad_weights_are_named_and_nothing_changes() -> None:
    m = model()
    m[2].weight.data[3, 4] = float("nan")
    _refused(m, hqq_weight_only(4, 64), r"2\.weight: holds NaN")
    _refused(model(), hqq_weight_only(4, 128), r"2\.weight: group_size 128 is larger than in_features 64")
    _refused(model().to("meta"), hqq_weight_only(4, 64), "meta device")
    _refused(model(), hqq_weight_only(4, 64, dynamic_config={"nothing": {"nbits": 8}}), "match no module")
    whole = model()
    whole[0].weight = nn.Parameter(torch.ones(64, 128, dtype=torch.int8), requires_grad=False)
    _refused(whole, hqq_weight_only(4, 64), r"0\.weight: weights must be float32", TypeError)
    _refused(nn.Sequential(nn.ReLU()), hqq_weight_only(), "nothing to quantize")


def test_longest_tag_wins_and_none_leaves_alone() -> None:
    m = nn.ModuleDict(
        {"attn": nn.ModuleDict({"q": nn.Linear(64, 64), "k": nn.Linear(64, 64)}), "lm_head": nn.Linear(64, 8)}
    )
    quantize_(m, hqq_weight_only(4, 64, dynamic_config={"attn": {"nbits": 3}, "attn.q": {"nbits": 8}, "k": None}))
    assert m["attn"]["q"].weight.nbits == 8
    assert not isinstance(m["lm_head"].weight, HQQTensor)
    assert m["attn"]["k"].weight.nbits == 3  # "attn" is longer than "k"


def test_quantizing_twice_warns_and_changes_nothing() -> None:
    m = model()
    quantize_(m, hqq_weight_only(4, 64))
    first = m[0].weight
    with pytest.warns(UserWarning, match="quantized already"):
        quantize_(m, hqq_weight_only(2, 64))
    assert m[0].weight is first


def test_tied_weights_stay_tied() -> None:
    m = nn.ModuleDict({"embed": nn.Embedding(100, 64), "head": nn.Linear(64, 100, bias=False)})
    m["head"].weight = m["embed"].weight
    quantize_(m, hqq_weight_only(4, 64))
    assert m["embed"].weight is m["head"].weight and isinstance(m["head"].weight, HQQTensor)
    assert m["head"](m["embed"](torch.tensor([1, 2]))).shape == (2, 100)


def test_torchao_quantize_takes_the_config() -> None:
    m = model()
    torchao.quantize_(m, HqqConfig(4, 64))
    assert isinstance(m[0].weight, HQQTensor)
    with pytest.raises(ValueError, match="dynamic_config needs module names"):
        torchao.quantize_(model(), HqqConfig(4, 64, dynamic_config={"0": {"nbits": 8}}))


def test_config_round_trips_through_json_and_torchao() -> None:
    import json

    from torchao.core.config import config_from_dict, config_to_dict

    config = hqq_weight_only(3, 32, scale_dtype=torch.bfloat16, dynamic_config={"0": {"nbits": 8}, "2": None})
    assert HqqConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config_from_dict(config_to_dict(config)) == config


def test_hqq_library_parameters_are_translated() -> None:
    weight = {"nbits": 3, "group_size": 32, "axis": 0, "optimize": True, "round_zero": False, "channel_wise": True}
    config = HqqConfig(
        weight_quant_params={
            "weight_quant_params": weight,
            "scale_quant_params": {"nbits": 8},
            "zero_quant_params": None,
        }
    )
    assert (config.nbits, config.group_size, config.axis, config.quant_scale, config.quant_zero) == (
        3,
        32,
        0,
        True,
        False,
    )


@pytest.mark.parametrize("parts", [("scale",), ("zero",), ("scale", "zero")])
def test_hqq_library_parameters_say_in_how_many_bits_scales_are_kept(parts: tuple[str, ...]) -> None:
    params: dict[str, dict[str, int]] = {"weight_quant_params": {"nbits": 2, "group_size": 16}}
    params |= {f"{part}_quant_params": {"nbits": 4} for part in parts}
    config = HqqConfig(weight_quant_params=params)
    assert (config.scale_nbits, config.zero_nbits) == tuple(4 if part in parts else None for part in ("scale", "zero"))
    params[f"{parts[0]}_quant_params"] = {"nbits": 3}
    with pytest.raises(ValueError, match="must have the same nbits, 8 or 4"):
        HqqConfig(weight_quant_params=params)


def test_compiled_model_equals_eager_for_any_batch() -> None:
    m = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    quantize_(m, hqq_weight_only(4, 64))
    compiled = torch.compile(m, fullgraph=True, dynamic=True)
    for batch in (2, 5, 9):
        x = torch.randn(batch, 128)
        torch.testing.assert_close(compiled(x), m(x))


def test_layers_of_one_shape_share_one_compiled_graph() -> None:
    counter = torch._dynamo.testing.CompileCounter()
    layers = [nn.Linear(128, 128, bias=False) for _ in range(4)]
    for layer in layers:
        quantize_(layer, hqq_weight_only(4, 64))

    @torch.compile(backend=counter, fullgraph=True)
    def apply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, weight).relu()

    x = torch.randn(2, 128)
    for layer in layers:
        torch.testing.assert_close(apply(x, layer.weight), layer(x).relu())
    assert counter.frame_count == 1


def test_compiled_prefill_and_decode_with_a_static_cache_equal_eager() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(config).eval()
    quantize_(llama, hqq_weight_only(4, 64))
    ids = torch.randint(0, 64, (1, 9))
    compiled = torch.compile(llama, fullgraph=True)

    def run(model: nn.Module) -> list[torch.Tensor]:
        cache = transformers.StaticCache(config=config, max_cache_len=16)
        out = [model(ids[:, :6], past_key_values=cache, cache_position=torch.arange(6)).logits]
        for i in range(6, 9):
            out.append(model(ids[:, i : i + 1], past_key_values=cache, cache_position=torch.tensor([i])).logits)
        return out

    with torch.no_grad():
        for eager, fast in zip(run(llama), run(compiled), strict=True):
            torch.testing.assert_close(fast, eager, atol=1e-4, rtol=1e-4)


def test_parameters_can_be_swapped_on_conversion() -> None:
    old = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        m = model()
        quantize_(m, hqq_weight_only(4, 64))
        m.to(torch.bfloat16)
        assert m[0].weight.dtype == torch.bfloat16 and isinstance(m[0].weight, HQQTensor)
        state = {k: v.clone() for k, v in m.state_dict().items()}
        fresh = model().to(torch.bfloat16)
        fresh.load_state_dict(state, assign=True)
        assert torch.equal(fresh[0].weight, m[0].weight)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(old)


def test_a_quantized_module_survives_pickle_and_deepcopy() -> None:
    m = model()
    quantize_(m, hqq_weight_only(3, 32))
    x = torch.randn(2, 128)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(other[:3](x), m[:3](x)) and "3-bit int" in repr(other)
        assert other[0].weight.qdata.data_ptr() != m[0].weight.qdata.data_ptr()


def test_a_module_pickled_by_earlier_versions_finds_its_repr() -> None:
    assert pickle.loads(b"chqqtensor.quantize\nQuantizedExtraRepr\n.") is hqqtensor.parameters.QuantizedExtraRepr


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(ValueError, match="backend must be one of"):
        hqqtensor.set_backend("cuda")
    with hqqtensor.backend("reference"):
        m = model()
        quantize_(m, hqq_weight_only(4, 64))
        assert m[0](torch.randn(2, 128)).shape == (2, 64)


def test_an_unknown_preset_names_those_on_offer() -> None:
    with pytest.raises(KeyError) as caught:
        PRESETS["5/64"]
    assert str(caught.value) == (
        "there is no preset '5/64', only 8, 6, 4, 3, 2, 8/64, 4/64, 4/128, 3/64, 2/64, 2/16, 1/32; "
        "for other settings use hqq_weight_only(nbits, group_size)"
    )
    assert "5/64" not in PRESETS and PRESETS.get("5/64") is None and PRESETS["4/64"] == HqqConfig(4, 64)
    assert isinstance(PRESETS, dict) and next(iter(PRESETS)) == "8" and len(PRESETS) == 12
    for same in (copy.deepcopy(PRESETS), pickle.loads(pickle.dumps(PRESETS))):
        assert same == PRESETS
    with pytest.raises(KeyError, match="no preset 4"):
        PRESETS[4]  # type: ignore[index]
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), KeyError)


def test_optimal_config_fits_the_budget() -> None:
    assert get_optimal_quant_config("7B").name == "4" and get_optimal_quant_config("500M").name == "8"
    assert [get_optimal_quant_config("7B", f"{gb}GB").name for gb in (8, 6, 4, 3.2, 2.2, 1.8)] == [*"86432", "1/32"]
    assert get_optimal_quant_config("7B", "3.2GB").estimated_bytes <= 3.2e9
    with pytest.raises(ValueError, match="no preset fits"):
        get_optimal_quant_config("70B", "1GB")


def test_compiled_gradients_equal_eager_ones() -> None:
    m = nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 32))
    quantize_(m, hqq_weight_only(4, 64))
    found = []
    for run in (m, torch.compile(m, fullgraph=True)):
        x = torch.randn(3, 128, generator=torch.manual_seed(0)).requires_grad_()
        m.zero_grad()
        run(x).square().sum().backward()
        found.append((x.grad, m[0].bias.grad, m[2].bias.grad))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled.clone(), eager)


def test_scales_that_their_dtype_cannot_hold_are_refused() -> None:
    w = torch.randn(4, 64, generator=torch.manual_seed(0)) * 1e20
    for name in ("int", "nf4"):
        with pytest.raises(ValueError, match="float16 cannot hold this weight's scales"):
            HQQTensor.from_hp(w, HqqConfig(4, 64, format=name, scale_dtype=torch.float16))
