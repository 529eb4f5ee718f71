"""The search chooses for the input embedding and the output layer as well, if it is given settings for them."""

import dataclasses

import pytest
import torch
from torch import nn

from hqqtensor import HqqConfig, HQQTensor, quantize_
from hqqtensor.diagnostics import model_size
from hqqtensor.search import CANDIDATES, EMBEDDINGS, check_target, choose_config, measure_sensitivity

BOTH = (*CANDIDATES, *EMBEDDINGS)


class Language(nn.Module):
    """``embed_share``: how much the embedding matters to the outputs, which are no probabilities."""

    def __init__(self, tied: bool = False, embed_share: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(1024, 64)
        self.body = nn.Linear(64, 64)
        self.lm_head = nn.Linear(64, 1024, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.embed_share = embed_share

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        position = torch.linspace(-1, 1, ids.shape[-1]).unsqueeze(-1)
        return self.lm_head(torch.tanh(self.body(self.embed_share * self.embed(ids) + position)))


BATCHES = [torch.randint(0, 1024, (4, 32), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("batches", [None, BATCHES], ids=["weights", "outputs"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_budget_counts_embedding_and_output_layer(tied: bool, batches) -> None:
    model = Language(tied)
    choice = choose_config(model, measure_sensitivity(model, batches=batches, candidates=BOTH), target_bpw=4.0)
    quantize_(model, choice.config)
    size = model_size(model)
    assert size.quantized_weights == 64 * (64 + 1024 * (1 if tied else 2))
    assert size.quantized_nbytes == choice.nbytes and 3.4 < size.bits_per_weight <= 4.0
    assert (model.embed.weight is model.lm_head.weight) == tied


def test_a_tied_pair_is_one_choice_with_the_settings_of_embedding_nbits() -> None:
    model, same = Language(tied=True), Language(tied=True)
    found = measure_sensitivity(model, batches=BATCHES, candidates=BOTH)
    assert list(found.layers) == ["embed", "body"]
    config = choose_config(model, found, target_bpw=5.0).config
    assert config.embedding_nbits in (3, 4, 5) and list(config.dynamic_config) == ["body"]
    quantize_(model, config)
    quantize_(same, HqqConfig(embedding_nbits=config.embedding_nbits))
    assert torch.equal(model.embed.weight.dequantize(), same.embed.weight.dequantize())
    assert model.embed.weight.nbytes == same.embed.weight.nbytes


@pytest.mark.parametrize(
    "base", [HqqConfig(), HqqConfig(4, 32, axis=0), HqqConfig(rotation=True)], ids=["default", "axis 0", "rotated"]
)
def test_embedding_and_output_layer_get_different_bits_where_they_matter_differently(base: HqqConfig) -> None:
    model = Language(embed_share=0.01)
    config = choose_config(model, measure_sensitivity(model, base, BATCHES, BOTH), base, target_bpw=4.0).config
    quantize_(model, HqqConfig.from_dict(config.to_dict()))
    embed, head = model.embed.weight, model.lm_head.weight
    assert isinstance(embed, HQQTensor) and isinstance(head, HQQTensor)
    assert embed.nbits < head.nbits == config.embedding_nbits
    assert embed.axis == head.axis == 1 and not embed.rotation and not head.rotation
    expected = dataclasses.replace(base, embedding_nbits=embed.nbits).for_embedding(64)
    assert embed.group_size == expected.group_size


def test_each_candidate_is_for_embeddings_or_for_layers() -> None:
    found = measure_sensitivity(Language(), candidates=[{"nbits": 3, "group_size": 32}, {"embedding_nbits": 6}])
    assert [value is None for value in found.layers["body"]["loss"]] == [False, True]
    for name in ("embed", "lm_head"):
        assert [value is None for value in found.layers[name]["bytes"]] == [True, False]


def test_an_embedding_that_is_skipped_stays_dense() -> None:
    model, config = Language(), HqqConfig(skip_modules=["embed"], dynamic_config={"lm_head": None})
    found = measure_sensitivity(model, config, candidates=BOTH)
    assert list(found.layers) == ["body"]
    quantize_(model, choose_config(model, found, config, target_bpw=4.0).config)
    assert not isinstance(model.embed.weight, HQQTensor) and not isinstance(model.lm_head.weight, HQQTensor)


def test_the_smallest_size_that_is_told_can_be_had() -> None:
    model = Language()
    with pytest.raises(ValueError, match=r"the smallest settings take 2\.\d+ bits a weight \((\d+) bytes") as error:
        check_target(model, target_bpw=1.0, candidates=BOTH)
    smallest = int(str(error.value).partition("(")[2].partition(" ")[0])
    check_target(model, target_bytes=smallest, candidates=BOTH)
    quantize_(model, choose_config(model, measure_sensitivity(model, candidates=BOTH), target_bytes=smallest).config)
    assert model_size(model).nbytes == smallest


def test_weights_that_the_search_does_not_choose_for_count_as_the_config_has_them() -> None:
    model, config = Language(), HqqConfig(embedding_nbits=8)
    choice = choose_config(model, measure_sensitivity(model, config), config, target_bytes=143_000)
    quantize_(model, choice.config)
    assert model.embed.weight.nbits == 8 and 142_000 < model_size(model).nbytes <= 143_000
