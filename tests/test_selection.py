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


def untied() -> nn.ModuleDict:
    torch.manual_seed(0)
    linears = {"body": nn.Linear(64, 64), "lm_head": nn.Linear(64, 1100, bias=False)}
    return nn.ModuleDict({"embed": nn.Embedding(1100, 64), "positions": nn.Embedding(512, 64), **linears})


def tied_large() -> nn.ModuleDict:
    m = untied()
    m["lm_head"].weight = m["embed"].weight
    return m


def widths(m: nn.Module) -> dict[str, int | None]:
    """Bits of each weight of rank 2, None where it is dense."""
    return {name: getattr(p, "nbits", None) for name, p in m.named_parameters() if p.ndim == 2}


def test_embedding_nbits_takes_large_tables_and_the_output_layer_of_any_module() -> None:
    m = untied()
    quantize_(m, HqqConfig(4, embedding_nbits=8))
    assert widths(m) == {"embed.weight": 8, "positions.weight": None, "body.weight": 4, "lm_head.weight": 8}
    assert m["embed"].weight.group_size == m["lm_head"].weight.group_size == 64
    assert m["body"].weight.group_size == 20
    assert m["lm_head"](m["body"](m["embed"](torch.tensor([3])))).shape == (1, 1100)
    quantize_(m := untied(), HqqConfig(4))
    assert widths(m) == {"embed.weight": None, "positions.weight": None, "body.weight": 4, "lm_head.weight": None}


def test_embedding_nbits_keeps_a_tie() -> None:
    m = tied_large()
    quantize_(m, HqqConfig(4, embedding_nbits=6))
    assert m["embed"].weight is m["lm_head"].weight and m["embed"].weight.nbits == 6
    m = tied_large()
    m["again"] = nn.Linear(64, 1100)
    m["again"].weight = m["embed"].weight
    quantize_(m, HqqConfig(4, embedding_nbits=6))
    assert m["again"].weight is m["embed"].weight and m["again"].weight.nbits == 6  # not the 4 of other layers


@pytest.mark.parametrize(
    ("tags", "embed", "head"),
    [
        ({"lm_head": {"nbits": 3}}, 8, 3),
        ({"lm_head": None}, 8, None),
        ({"embed": {"nbits": 5}}, 5, 8),
        ({"embed": None}, None, 8),
        ({"*": {"nbits": 2}}, 2, 2),
    ],
    ids=str,
)
def test_tags_come_before_embedding_nbits(tags, embed, head) -> None:
    m = untied()
    quantize_(m, HqqConfig(4, embedding_nbits=8, dynamic_config=tags))
    assert (widths(m)["embed.weight"], widths(m)["lm_head.weight"]) == (embed, head)


@pytest.mark.parametrize("tag", ["lm_head", "embed"])
@pytest.mark.parametrize("entry", [None, {"nbits": 5}], ids=str)
def test_a_tag_for_either_of_a_tied_pair_comes_before_embedding_nbits(tag, entry) -> None:
    m = tied_large()
    quantize_(m, HqqConfig(4, embedding_nbits=8, dynamic_config={tag: entry}))
    assert m["embed"].weight is m["lm_head"].weight
    assert getattr(m["embed"].weight, "nbits", None) == (entry and entry["nbits"])


def test_other_skip_tags_hold_for_embeddings() -> None:
    m = untied()
    quantize_(m, HqqConfig(4, embedding_nbits=8, skip_modules=["embed", "lm_head"]))
    assert widths(m)["embed.weight"] is None and widths(m)["lm_head.weight"] == 8
    with pytest.raises(ValueError, match=r"tied to embed\.weight, which skip_modules \('embed'\) leaves alone"):
        quantize_(tied_large(), HqqConfig(4, embedding_nbits=8, skip_modules=["embed"]))


def test_a_filter_decides_which_embeddings_are_taken() -> None:
    m = untied()
    quantize_(m, HqqConfig(4, embedding_nbits=8), filter_fn=lambda module, name: name in ("body", "lm_head"))
    assert widths(m) == {"embed.weight": None, "positions.weight": None, "body.weight": 4, "lm_head.weight": 8}


def test_torchao_refuses_embedding_nbits() -> None:
    import torchao

    with pytest.raises(ValueError, match="embedding_nbits 8 needs the whole model"):
        torchao.quantize_(untied(), HqqConfig(4, embedding_nbits=8))


def _language_model(tied: bool) -> nn.Module:
    import transformers

    config = transformers.GPTNeoXConfig(  # its output layer is "embed_out"; 300 rows are few
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config)


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_nbits_finds_both_ends_of_a_transformers_model(tied: bool) -> None:
    m = _language_model(tied)
    quantize_(m, HqqConfig(3, embedding_nbits=8))
    ends = m.get_input_embeddings().weight, m.get_output_embeddings().weight
    assert (ends[0] is ends[1]) == tied and [end.nbits for end in ends] == [8, 8]
    assert {b for n, b in widths(m).items() if "layers" in n} == {3}
    assert m(torch.tensor([[1, 2]])).logits.isfinite().all()


def test_embedding_nbits_takes_the_words_of_an_encoder_and_no_positions() -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    for m in (transformers.BertModel(config), transformers.BertForMaskedLM(config)):
        quantize_(m, HqqConfig(4, embedding_nbits=8))
        found = {name: bits for name, bits in widths(m).items() if "embeddings" in name}
        assert {".".join(name.split(".")[-2:]): bits for name, bits in found.items()} == {
            "word_embeddings.weight": 8, "position_embeddings.weight": None, "token_type_embeddings.weight": None,
        }  # fmt: skip
    assert m.get_output_embeddings().weight is m.get_input_embeddings().weight


def test_a_model_whose_input_is_no_table_of_words_is_quantized_without_one() -> None:
    import transformers

    config = transformers.ViTConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    m = transformers.ViTModel(config)
    quantize_(m, HqqConfig(4, embedding_nbits=8))
    assert {bits for bits in widths(m).values() if bits} == {4}
