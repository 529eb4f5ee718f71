"""What is chosen where a config leaves the group size and its scales open, and what stays as it was given."""

import dataclasses
import json
import pickle
from typing import Any

import pytest
import torch

from hqqtensor import PRESETS, HqqConfig, HQQTensor, get_optimal_quant_config, hqq_weight_only
from hqqtensor.config import RECOMMENDED_GROUP_SIZE
from hqqtensor.presets import bits_per_weight
from hqqtensor.search import measure_sensitivity

NAMES = ("group_size", "quant_scale", "quant_zero", "meta_nbits")
PLAIN_64 = (64, False, False, 8)


def recommended(nbits: int) -> tuple[Any, ...]:
    return (RECOMMENDED_GROUP_SIZE[nbits], True, True, 4)


def groups(config: HqqConfig | None) -> tuple[Any, ...]:
    return tuple(getattr(config, name) for name in NAMES)


@pytest.mark.parametrize("nbits", range(1, 9))
def test_without_a_group_size_the_width_decides(nbits: int) -> None:
    want = recommended(nbits) if nbits <= 4 else PLAIN_64
    for config in (hqq_weight_only(nbits), HqqConfig(nbits=nbits), HqqConfig(nbits, "auto")):  # type: ignore[arg-type]
        assert config.nbits == nbits and groups(config) == want
    assert bits_per_weight(HqqConfig(nbits)) <= bits_per_weight(HqqConfig(nbits, 64))


def test_the_recommended_settings_have_less_error_in_no_more_bytes_than_plain_groups_of_64() -> None:
    w = torch.randn(1024, 640, generator=torch.manual_seed(0))
    for nbits in (1, 2, 3, 4):
        ours, plain = (HQQTensor.from_hp(w, c) for c in (HqqConfig(nbits), HqqConfig(nbits, 64)))
        assert ours.nbytes <= plain.nbytes
        assert (ours.dequantize() - w).square().sum() < 0.9 * (plain.dequantize() - w).square().sum()


@pytest.mark.parametrize("solver", ["hqq_joint", "hqq", "rtn", "column_scaled"])
def test_the_solver_does_not_matter_for_the_choice(solver: str) -> None:
    assert groups(HqqConfig(3, solver=solver)) == recommended(3)


@pytest.mark.parametrize(
    "options",
    [
        {"axis": 0}, {"format": "nf4"}, {"format": "codebook"}, {"integer_zero": True}, {"meta_nbits": 8},
        {"quant_scale": False}, {"quant_zero": False}, {"quant_scale": False, "quant_zero": False},
        {"weight_quant_params": {"nbits": 4}},
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_go_with_coarse_scales_takes_plain_groups_of_64(options: dict[str, Any]) -> None:
    assert groups(HqqConfig(**options)) == PLAIN_64


def test_quantized_scales_that_were_asked_for_are_kept() -> None:
    eight = {"quant_scale": True, "quant_zero": True, "meta_nbits": 8}
    assert groups(HqqConfig(4, **eight)) == (64, True, True, 8)
    assert groups(HqqConfig(8, quant_scale=True)) == (64, True, False, 8)
    assert groups(HqqConfig(4, quant_scale=True, meta_nbits=4)) == recommended(4)
    assert groups(HqqConfig(format="nf4", quant_scale=True)) == (64, True, False, 8)


def test_a_group_size_that_is_given_keeps_its_plain_scales() -> None:
    for size in (64, 20, None):
        assert groups(HqqConfig(4, size)) == groups(hqq_weight_only(4, size)) == (size, False, False, 8)
    assert groups(HqqConfig(4, 32, quant_scale=True)) == (32, True, False, 8)


def test_a_dict_of_an_earlier_version_means_what_it_did() -> None:
    old = {
        "nbits": 4, "group_size": 64, "axis": 1, "format": "int", "solver": "hqq_joint", "scale_dtype": None,
        "quant_scale": False, "quant_zero": False, "compute_dtype": None, "dynamic_config": {"q": {"nbits": 3}},
        "skip_modules": ["lm_head"], "view_as_float": False, "lp_norm": 2.0, "activation": "float",
        "codebook": "tensor", "integer_zero": False, "rotation": False, "rotation_seed": 0, "meta_nbits": 8,
    }  # fmt: skip
    config = HqqConfig.from_dict(old)
    assert config.to_dict() == {**old, "embedding_nbits": None}
    assert groups(config.for_tag("q")) == PLAIN_64 and config == HqqConfig(4, 64, dynamic_config={"q": {"nbits": 3}})


ENTRIES: dict[str, Any] = {
    "eight": {"nbits": 8}, "same": {}, "two": {"nbits": 2}, "levels": {"format": "nf4"}, "down": {"axis": 0},
    "given": {"group_size": 32}, "row": {"group_size": None}, "bytes": {"meta_nbits": 8}, "none": None,
    "hqq": {"weight_quant_params": {"nbits": 2}},
}  # fmt: skip


def test_entries_of_an_open_base_are_chosen_for_their_own_settings() -> None:
    entries = {tag: entry if entry is None else dict(entry) for tag, entry in ENTRIES.items()}
    config = HqqConfig(4, dynamic_config=entries)
    assert entries == ENTRIES  # the caller's dict is not written to
    want = {
        "eight": PLAIN_64, "same": recommended(4), "two": recommended(2), "levels": PLAIN_64, "down": PLAIN_64,
        "given": (32, False, False, 8), "row": (None, False, False, 8), "bytes": PLAIN_64, "hqq": PLAIN_64,
    }  # fmt: skip
    assert {tag: groups(config.for_tag(tag)) for tag in want} == want
    assert config.for_tag("none") is None and groups(config.for_tag(None)) == recommended(4)
    held = config.to_dict()["dynamic_config"]
    assert {tag: tuple(held[tag][name] for name in NAMES) for tag in want} == want
    assert HqqConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_entries_of_a_base_with_a_group_size_inherit_it() -> None:
    entries = {"eight": {"nbits": 8}, "levels": {"format": "nf4"}}
    config = HqqConfig(4, 32, dynamic_config=entries)
    assert config.dynamic_config == entries
    assert groups(config.for_tag("eight")) == groups(config.for_tag("levels")) == (32, False, False, 8)
    asked = HqqConfig(4, 64, dynamic_config={"three": {"nbits": 3, "group_size": "auto"}})
    assert groups(asked.for_tag("three")) == recommended(3)


def test_metadata_given_with_an_open_group_size_holds_in_the_entries() -> None:
    config = HqqConfig(4, quant_scale=True, quant_zero=True, meta_nbits=8, dynamic_config={"x": {"group_size": 32}})
    assert groups(config.for_tag("x")) == (32, True, True, 8)


def test_a_copy_with_another_width_can_choose_anew() -> None:
    four = HqqConfig(4)
    assert groups(dataclasses.replace(four, nbits=8)) == recommended(4)  # a config holds numbers
    assert groups(dataclasses.replace(four, nbits=8, **four.given_groups())) == PLAIN_64
    assert four.given_groups()["group_size"] == "auto" and HqqConfig(4, 64).given_groups()["group_size"] == 64


def test_the_search_reads_a_candidate_with_a_group_size_as_an_entry() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(128, 64))
    candidates = [{"nbits": 4, "group_size": 64}, {"nbits": 4, "group_size": 32, "format": "nf4"}]
    found = measure_sensitivity(model, HqqConfig(), candidates=candidates)
    plain = measure_sensitivity(model, HqqConfig(4, 64), candidates=candidates)
    assert found.layers["0"]["bytes"] == plain.layers["0"]["bytes"] == [64 * 72 + 2 * 128] * 2  # with column scales


@pytest.mark.parametrize(
    ("nbits", "want"), [(8, PLAIN_64), (6, PLAIN_64), (4, recommended(4)), (2, recommended(2)), (1, recommended(1))]
)
def test_an_embedding_takes_what_is_recommended_for_its_width(nbits: int, want: tuple[Any, ...]) -> None:
    for base in (HqqConfig(4, 32, axis=0), HqqConfig(4, format="nf4"), HqqConfig(3, rotation=True)):
        config = dataclasses.replace(base, embedding_nbits=nbits).for_embedding(576)
        assert config is not None and groups(config) == want
        assert (config.nbits, config.axis, config.format, config.rotation) == (nbits, 1, "int", False)


def test_a_short_row_of_an_embedding_is_one_group() -> None:
    config = HqqConfig(4, embedding_nbits=8).for_embedding(48)
    assert config is not None and config.group_size is None and config.nbits == 8
    assert HqqConfig(4).for_embedding(48) is None


def test_presets_named_by_bits_are_the_recommended_settings() -> None:
    assert {name: PRESETS[name].embedding_nbits for name in "86432"} == {"8": 8, "6": 8, "4": 8, "3": 6, "2": 6}
    for name in "86432":
        assert groups(PRESETS[name]) == groups(HqqConfig(int(name)))
    assert groups(PRESETS["4/64"]) == PLAIN_64 and PRESETS["4/64"].embedding_nbits is None
    assert [round(bits_per_weight(PRESETS[name]), 2) for name in "86432"] == [8.5, 6.5, 4.45, 3.45, 2.45]


def test_the_bytes_of_a_model_count_its_embedding_at_the_preset_s_bits() -> None:
    from hqqtensor import quantize_
    from hqqtensor.diagnostics import model_size

    torch.manual_seed(0)
    modules = {"embed": torch.nn.Embedding(2048, 320), "body": torch.nn.Linear(320, 320)}
    model = torch.nn.ModuleDict(modules)
    found = get_optimal_quant_config(model, "700KB")
    quantize_(model, found.config)
    assert found.name == "3" and model_size(model).nbytes == found.estimated_bytes
