"""A language model whose embedding and output layer share a weight, quantized with settings for one of the two."""

from pathlib import Path

import pytest
from doclm_models import load, same

from hqqtensor import HqqConfig, HQQTensor, quantize_
from hqqtensor.cli import main, model_dir


@pytest.fixture(scope="module")
def tied_doclm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """doclm with its embedding as output layer."""
    path = tmp_path_factory.mktemp("tied")
    model = load()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    model.save_pretrained(path)
    return path


def check(model) -> None:
    weight = model.lm_head.weight
    assert weight is model.model.embed_tokens.weight and isinstance(weight, HQQTensor)
    assert (weight.nbits, weight.group_size) == (6, 64)
    assert model.model.layers[0].mlp.up_proj.weight.nbits == 4


@pytest.mark.parametrize("tag", ["embed_tokens", "lm_head"])
def test_settings_for_either_name_hold_for_both(tied_doclm: Path, tag: str) -> None:
    config = HqqConfig(4, 64, skip_modules=[], dynamic_config={tag: {"nbits": 6}})
    model = load(tied_doclm)
    quantize_(model, config)
    check(model)
    check(load(tied_doclm, quantization_config=config))


def test_the_command_line_takes_settings_for_the_embedding(tied_doclm: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["quantize", str(tied_doclm), str(out), "--json", "--skip", "--layers", "embed_tokens=6/64"]) == 0
    check(model_dir.open_quantized(out))


def test_settings_that_differ_are_refused_before_weights_are_read(tied_doclm: Path) -> None:
    tags = {"embed_tokens": {"nbits": 6}, "lm_head": {"nbits": 4}}
    config = HqqConfig(4, 64, skip_modules=[], dynamic_config=tags)
    match = r"model\.embed_tokens\.weight is tied to lm_head\.weight.*'embed_tokens' and 'lm_head'"
    with pytest.raises(ValueError, match=match):
        quantize_(load(tied_doclm), config)
    with pytest.raises(ValueError, match=match):
        load(tied_doclm, quantization_config=config)


@pytest.mark.parametrize("nbits", [8, 3])
def test_a_tied_pair_takes_embedding_nbits_while_it_is_loaded(tied_doclm: Path, tmp_path: Path, nbits: int) -> None:
    config = HqqConfig(4, embedding_nbits=nbits)
    model = load(tied_doclm, quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    quantize_(other := load(tied_doclm), config)
    for m in (model, other, load(tmp_path / "saved")):
        weight = m.lm_head.weight
        assert weight is m.model.embed_tokens.weight and isinstance(weight, HQQTensor)
        assert (weight.nbits, weight.group_size) == (nbits, 64 if nbits == 8 else 20)
        assert same(m, model)
