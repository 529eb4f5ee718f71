import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.answers import QUESTIONS, SHOWN, agreement, choices, greedy

END = 9


def test_agreement_counts_what_stands_before_the_end_of_the_dense_answer():
    dense = torch.tensor([[1, 2, 3, 4], [5, END, END, END]])
    same = agreement(dense, dense, dense, END)
    assert same == dict.fromkeys(("forced", "same", "until", "place by place", "first"), 1.0)
    # The first answer differs at its second token alone, the second only behind its end.
    other = torch.tensor([[1, 7, 3, 4], [5, END, 6, 6]])
    got = agreement(dense, other, torch.tensor([[1, 2, 0, 0], [5, END, 6, 6]]), END)
    assert got["same"] == 0.5 and got["first"] == 1.0 and got["forced"] == pytest.approx(4 / 6)
    assert got["until"] == pytest.approx(3 / 6) and got["place by place"] == pytest.approx(5 / 6)


def test_an_answer_that_goes_on_is_not_the_same():
    dense, other = torch.tensor([[1, END, END]]), torch.tensor([[1, 2, 3]])
    got = agreement(dense, other, other, END)
    assert got == {"forced": 0.5, "same": 0.0, "until": 0.5, "place by place": 0.5, "first": 1.0}


def test_padding_on_the_left_changes_no_answer():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, initializer_range=0.5, **sizes)).eval()
    long, short = torch.randint(10, 100, (1, 7)), torch.randint(10, 100, (1, 4))
    ids = torch.cat([long, torch.nn.functional.pad(short, (3, 0), value=END)])
    inputs = {"input_ids": ids, "attention_mask": (ids != END).long()}
    both = greedy(model, inputs, END, 8)
    alone = [greedy(model, {"input_ids": x, "attention_mask": torch.ones_like(x)}, END, 8) for x in (long, short)]
    assert torch.equal(both, torch.cat(alone))
    assert len(both[0].unique()) > 2
    assert torch.equal(choices(model, inputs, both), both)
    other = both.clone()
    other[:, 2] = 50
    assert torch.equal(choices(model, inputs, other)[:, :3], both[:, :3])
    assert not torch.equal(choices(model, inputs, other), both)


def test_fifty_questions_none_twice():
    assert len(set(QUESTIONS)) == 50 and SHOWN == 10
