"""Which settings weights take that several modules share."""

import pytest
import torch
from torch import nn

from hqqtensor import HqqConfig, HQQTensor, quantize_
from hqqtensor.selection import choose


def tied() -> nn.ModuleDict:
    torch.manual_seed(0)
    modules = {"embed": nn.Embedding(96, 64), "body": nn.Linear(64, 64), "head": nn.Linear(64, 96, bias=False)}
    m = nn.ModuleDict(modules)
    m["head"].weight = m["embed"].weight
    return m


def tied_three() -> nn.ModuleDict:
    m = tied()
    m["again"] = nn.Linear(64, 96)
    m["again"].weight = m["head"].weight
    return m


def config(**tags) -> HqqConfig:
    return HqqConfig(4, 64, skip_modules=[], dynamic_config=tags)


@pytest.mark.parametrize(
    ("tags", "nbits"),
    [
        ({}, 4),
        ({"embed": {"nbits": 6}}, 6),
        ({"head": {"nbits": 6}}, 6),
        ({"embed": {"nbits": 6}, "head": {"nbits": 6, "group_size": 64}}, 6),
        ({"embed": {"nbits": 4}}, 4),
        ({"*": {"nbits": 3}}, 3),
    ],
    ids=str,
)
def test_a_tied_pair_takes_the_settings_that_either_name_asks_for(tags, nbits) -> None:
    m = tied()
    quantize_(m, config(**tags))
    assert m["embed"].weight is m["head"].weight and isinstance(m["head"].weight, HQQTensor)
    assert m["head"].weight.nbits == nbits and m["body"].weight.nbits == (3 if "*" in tags else 4)


@pytest.mark.parametrize("name", ["embed", "head"])
def test_an_entry_that_leaves_one_of_a_pair_alone_holds_for_both(name) -> None:
    m = tied()
    quantize_(m, config(**{name: None}))
    assert not isinstance(m["head"].weight, HQQTensor) and isinstance(m["body"].weight, HQQTensor)
    assert m["embed"].weight is m["head"].weight


@pytest.mark.parametrize(
    "tags",
    [
        {"embed": {"nbits": 6}, "head": {"nbits": 4}},
        {"embed": {"nbits": 6}, "head": None},
        {"embed": None, "head": {"nbits": 6}},
        {"embed": {"nbits": 6}, "head": {"nbits": 6, "group_size": 32}},
    ],
    ids=str,
)
def test_two_entries_that_differ_are_an_error_naming_both(tags) -> None:
    m = tied()
    with pytest.raises(
        ValueError,
        match=r"embed\.weight is tied to head\.weight, but dynamic_config has different settings for them, under "
        "'embed' and 'head': give both the same, or only one of them an entry",
    ):
        quantize_(m, config(**tags))
    assert not any(isinstance(p, HQQTensor) for p in m.parameters())


def test_a_pair_that_is_tied_later_is_treated_alike() -> None:
    m = tied()
    m["head"].weight = nn.Parameter(m["head"].weight.detach().clone())
    ties = {"head.weight": "embed.weight"}
    choices, _ = choose(m, config(embed={"nbits": 6}), ties=ties)
    assert [(c.names, c.settings.nbits) for c in choices] == [
        (("embed.weight", "head.weight"), 6),
        (("body.weight",), 4),
    ]
    with pytest.raises(ValueError, match=r"embed\.weight is tied to head\.weight, but dynamic_config"):
        choose(m, config(embed={"nbits": 6}, head={"nbits": 4}), ties=ties)
    choices, _ = choose(m, config(embed={"nbits": 6}))
    assert [(c.names, c.settings.nbits) for c in choices] == [
        (("embed.weight",), 6), (("body.weight",), 4), (("head.weight",), 4)
    ]  # fmt: skip


def test_three_that_share_a_weight_are_one_choice() -> None:
    m = tied_three()
    quantize_(m, config(again={"nbits": 5}))
    assert m["embed"].weight is m["head"].weight is m["again"].weight and m["again"].weight.nbits == 5
    with pytest.raises(ValueError, match=r"head\.weight is tied to again\.weight.*'head' and 'again'"):
        choose(tied_three(), config(again={"nbits": 5}, head={"nbits": 6}))


def test_sharing_with_a_skipped_module_is_an_error_only_where_the_weight_would_be_quantized() -> None:
    for tags in ({}, {"embed": None}):
        m = tied()
        quantize_(m, HqqConfig(4, 64, skip_modules=["head"], dynamic_config=tags))
        assert not isinstance(m["head"].weight, HQQTensor)
    with pytest.raises(ValueError, match=r"embed\.weight is tied to head\.weight, which skip_modules \('head'\)"):
        quantize_(tied(), HqqConfig(4, 64, skip_modules=["head"], dynamic_config={"embed": {"nbits": 6}}))


def test_modules_that_store_a_shared_weight_differently_are_an_error() -> None:
    from transformers.pytorch_utils import Conv1D

    m = nn.ModuleDict({"a": nn.Linear(64, 64), "b": Conv1D(64, 64)})
    m["b"].weight = m["a"].weight
    with pytest.raises(ValueError, match=r"b\.weight is tied to a\.weight, but their modules store it differently"):
        quantize_(m, HqqConfig(4, 64))
