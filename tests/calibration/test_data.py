import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hqqtensor import HqqConfig, HQQTensor, generation, prepare_for_generation_, quantize_
from hqqtensor.calibration import calibrate
from hqqtensor.calibration.data import batches_of
from hqqtensor.generation.forward import DecoderForward, decoder_forward


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Words:
    """A tokenizer of bytes."""

    def __call__(self, lines, **_options):
        return {"input_ids": [[b % 97 for b in line.encode()] for line in lines]}


def test_self_is_text_that_the_model_writes():
    model = llama()
    batches = batches_of("self", model, tokens=512)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert ids.shape == (8, 64) and (ids[:, 0] == model.config.bos_token_id).all()
    assert all(
        torch.equal(a["input_ids"], b["input_ids"])
        for a, b in zip(batches, batches_of("self", model, tokens=512), strict=True)
    )
    other = batches_of("self", model, tokens=512, seed=1)
    assert not torch.equal(ids, torch.cat([batch["input_ids"] for batch in other]))
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        random = torch.cat([b["input_ids"] for b in batches_of("random", model, tokens=512)])
        random_loss = nn.functional.cross_entropy(model(random).logits[:, :-1].flatten(0, 1), random[:, 1:].flatten())
    assert loss < random_loss


def test_self_leaves_the_random_numbers_and_the_mode_alone():
    model = llama().train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    batches_of("self", model, tokens=64)
    assert torch.equal(torch.rand(3), expected) and model.training


@pytest.mark.parametrize("prepared", [False, True])
def test_self_is_written_by_the_decoder_which_is_taken_back(prepared, monkeypatch):
    model = prepare_for_generation_(llama()) if prepared else llama()
    served = []
    monkeypatch.setattr(DecoderForward, "_run", _noting(DecoderForward._run, served))
    batches_of("self", model, tokens=64)
    assert len(served) == 62 and (decoder_forward(model) is not None) == prepared

    def broken(*_args, **_options):
        raise RuntimeError("broken")

    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(RuntimeError, match="broken"):
        batches_of("self", model, tokens=64)
    assert (decoder_forward(model) is not None) == prepared


def _noting(run, served):
    def noted(self, *args, **options):
        served.append(1)
        return run(self, *args, **options)

    return noted


def test_self_is_the_same_text_where_no_decoder_serves(monkeypatch):
    def refused(*_args, **_options):
        raise ValueError("not served")

    written = batches_of("self", llama(), tokens=64)
    monkeypatch.setattr(generation, "prepare_for_generation_", refused)
    assert torch.equal(batches_of("self", llama(), tokens=64)[0]["input_ids"], written[0]["input_ids"])


def test_a_text_file_is_cut_into_windows_spread_over_it(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"line {i} of some text" for i in range(200)))
    batches = batches_of(file, llama(), Words(), tokens=320)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert ids.shape == (5, 64)
    assert torch.equal(ids[0, :6], torch.tensor([b % 97 for b in b"line 0"]))
    assert batches_of(str(file), llama(), Words(), tokens=320)[0]["input_ids"].shape == (4, 64)


def test_batches_are_taken_as_they_are():
    mine = [{"input_ids": torch.zeros(1, 4, dtype=torch.long)}]
    assert batches_of(iter(mine), llama()) == mine


@pytest.mark.parametrize(
    ("source", "model", "message"),
    [
        ("self", nn.Linear(4, 4), "cannot write text"),
        ("random", nn.Linear(4, 4), "no config.vocab_size"),
        ("missing.txt", None, "a tokenizer is needed"),
    ],
)
def test_what_cannot_be_had_is_a_clear_error(source, model, message):
    with pytest.raises(ValueError, match=message):
        batches_of(source, model or llama())


def test_a_missing_or_short_text_is_a_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt"):
        batches_of(tmp_path / "nothing.txt", llama(), Words())
    (tmp_path / "short.txt").write_text("few")
    with pytest.raises(ValueError, match="too few for one window"):
        batches_of(tmp_path / "short.txt", llama(), Words())
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        batches_of(tmp_path / "binary.txt", llama(), Words())


@pytest.mark.parametrize("quality", ["fast", "good"])
def test_quantize_takes_a_source_and_a_quality(quality):
    plain, calibrated, by_hand = llama(), llama(), llama()
    quantize_(plain, HqqConfig(3, 32))
    quantize_(calibrated, HqqConfig(3, 32), calibration="random", quality=quality)
    batches = batches_of("random", by_hand)
    mode = {"fast": "diagonal", "good": "full"}[quality]
    quantize_(by_hand, HqqConfig(3, 32), calibration=calibrate(by_hand, batches, mode))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(calibrated.get_parameter(name), by_hand.get_parameter(name))
    assert not torch.equal(calibrated.get_parameter(name).dequantize(), plain.get_parameter(name).dequantize())


def test_good_quality_needs_no_data():
    model, same = llama(), llama()
    quantize_(model, HqqConfig(3, 32), quality="good")
    quantize_(same, HqqConfig(3, 32), calibration="self")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert isinstance(model.get_parameter(name), HQQTensor)
    assert torch.equal(model.get_parameter(name), same.get_parameter(name))


def test_an_unknown_quality_changes_nothing():
    model = llama()
    with pytest.raises(ValueError, match="quality must be one of"):
        quantize_(model, HqqConfig(3, 32), quality="great")
    assert not any(isinstance(p, HQQTensor) for p in model.parameters())
