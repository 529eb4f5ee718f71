"""``GenerateTogether``: calls that run at the same time get the answers that each gets alone."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny_models import SIZES, quantized
from torch import Tensor

from hqqtensor import prepare_for_generation_
from hqqtensor.generation.together import Cancelled, GenerateTogether

GREEDY = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
PROMPTS = [
    torch.randint(3, SIZES["vocab_size"], (1, n), generator=torch.manual_seed(n)) for n in (3, 11, 30, 5)
]  # one is longer than a window, one shorter


@pytest.fixture(scope="module")
def model() -> Any:
    return prepare_for_generation_(quantized("llama"))


@pytest.fixture
def together(model: Any) -> Iterator[GenerateTogether]:
    generate_together = GenerateTogether(model)
    yield generate_together
    generate_together.close()


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """What the calls give, each in a thread of its own; an exception in the place of what one raises."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        start.wait()
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mixtral"])
def test_answers_at_once_are_those_of_each_call_alone(family: str) -> None:
    model = prepare_for_generation_(quantized(family))
    alone = [model.generate(input_ids=ids, **GREEDY) for ids in PROMPTS]
    before = model.model.forward.decoded_calls
    together = GenerateTogether(model)
    answers = at_once([lambda ids=ids: together.generate(input_ids=ids, **GREEDY) for ids in PROMPTS])
    together.close()
    for answer, expected in zip(answers, alone, strict=True):
        assert torch.equal(answer, expected)
    assert (
        model.model.forward.decoded_calls - before < 2 * GREEDY["max_new_tokens"]
    )  # of 36 tokens after the first ones


def test_each_call_has_its_own_settings_and_samples(model: Any, together: GenerateTogether) -> None:
    settings = [
        {"do_sample": True, "temperature": 2.0, "max_new_tokens": 12},
        {"do_sample": True, "top_k": 3, "max_new_tokens": 7},
        {"do_sample": False, "repetition_penalty": 1.5, "max_new_tokens": 9},
    ]

    def call(i: int) -> Tensor:
        return together.generate(
            input_ids=PROMPTS[i], generator=torch.Generator().manual_seed(i), eos_token_id=None, **settings[i]
        )

    alone = [call(i) for i in range(3)]
    assert all(map(torch.equal, at_once([lambda i=i: call(i) for i in range(3)]), alone))
    assert [a.shape[1] - p.shape[1] for a, p in zip(alone, PROMPTS, strict=False)] == [12, 7, 9]
    assert torch.equal(alone[2], model.generate(input_ids=PROMPTS[2], eos_token_id=None, **settings[2]))


class Streamer:
    """Keeps what it gets, and raises at the third token if asked."""

    def __init__(self, breaks: bool) -> None:
        self.breaks, self.values, self.ended = breaks, [], False

    def put(self, value: Tensor) -> None:
        self.values.append(value.flatten().tolist())
        if self.breaks and len(self.values) == 4:  # the prompt is the first
            raise ConnectionError("the client went away")

    def end(self) -> None:
        self.ended = True


def test_a_streamer_that_raises_ends_its_own_call(model: Any, together: GenerateTogether) -> None:
    alone = model.generate(input_ids=PROMPTS[1], **GREEDY)
    streamers = [Streamer(True), Streamer(False)]
    broken, answer = at_once(
        [lambda i=i: together.generate(input_ids=PROMPTS[i], streamer=streamers[i], **GREEDY) for i in (0, 1)]
    )
    assert isinstance(broken, ConnectionError)
    assert torch.equal(answer, alone)
    assert [t for value in streamers[1].values for t in value] == alone[0].tolist() and streamers[1].ended


def test_a_wrong_call_ends_alone(model: Any, together: GenerateTogether) -> None:
    alone = model.generate(input_ids=PROMPTS[0], **GREEDY)
    wrong_token = torch.tensor([[SIZES["vocab_size"] + 5]])
    wrong, late, answer = at_once(
        [
            lambda: together.generate(input_ids=wrong_token, **GREEDY),
            lambda: together.generate(input_ids=PROMPTS[0], temperature=-1.0, do_sample=True),
            lambda: together.generate(input_ids=PROMPTS[0], **GREEDY),
        ]
    )
    assert isinstance(wrong, IndexError) and isinstance(late, ValueError)
    assert torch.equal(answer, alone)


def test_beams_and_padded_batches_are_generated_by_themselves(model: Any, together: GenerateTogether) -> None:
    ids = torch.cat([PROMPTS[0], PROMPTS[0]])
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    calls: list[dict[str, Any]] = [
        {"input_ids": PROMPTS[1], "num_beams": 3, **GREEDY},
        {"input_ids": ids, "attention_mask": mask, **GREEDY},
        {"input_ids": PROMPTS[2], **GREEDY},
    ]
    alone = [model.generate(**call) for call in calls]
    assert all(map(torch.equal, at_once([lambda c=c: together.generate(**c) for c in calls]), alone))


def test_a_model_that_is_changed_goes_on_with_its_own_code(together: GenerateTogether, model: Any) -> None:
    seen: list[int] = []
    hook = model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    alone = [model.generate(input_ids=ids, **GREEDY) for ids in PROMPTS]
    count, seen[:] = len(seen), []
    answers = at_once([lambda ids=ids: together.generate(input_ids=ids, **GREEDY) for ids in PROMPTS])
    hook.remove()
    assert all(map(torch.equal, answers, alone))
    assert len(seen) == count


def test_more_calls_than_are_written_at_once_wait(model: Any, together: GenerateTogether) -> None:
    short = {**GREEDY, "max_new_tokens": 3, "min_new_tokens": 3}
    alone = model.generate(input_ids=PROMPTS[0], **short)
    answers = at_once([lambda: together.generate(input_ids=PROMPTS[0], **short)] * 20)
    assert all(torch.equal(answer, alone) for answer in answers)


def test_long_prompts_are_read_in_pieces_between_the_others_tokens(
    model: Any, together: GenerateTogether, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hqqtensor.generation.together.MOST_PROMPT", 8)
    alone = [model.generate(input_ids=ids, **GREEDY) for ids in PROMPTS]
    read: list[int] = []
    run = type(together)._read

    def counted(self: GenerateTogether, sequence: Any) -> None:
        before = sequence.cache.get_seq_length()
        run(self, sequence)
        read.append(sequence.cache.get_seq_length() - before)

    monkeypatch.setattr(type(together), "_read", counted)
    answers = at_once([lambda ids=ids: together.generate(input_ids=ids, **GREEDY) for ids in PROMPTS])
    assert all(map(torch.equal, answers, alone))
    assert max(read) == 8 and sum(read) == sum(ids.shape[1] for ids in PROMPTS)


def test_a_call_that_is_cancelled_ends_alone(model: Any, together: GenerateTogether) -> None:
    cancel = threading.Event()
    streamer = Streamer(False)
    streamer.put = lambda value: cancel.set() if streamer.values else streamer.values.append(value)  # type: ignore[method-assign]
    long = {**GREEDY, "max_new_tokens": 200, "min_new_tokens": 200}
    alone = model.generate(input_ids=PROMPTS[1], **GREEDY)
    cancelled, answer = at_once(
        [
            lambda: together.generate(input_ids=PROMPTS[0], cancel=cancel, streamer=streamer, **long),
            lambda: together.generate(input_ids=PROMPTS[1], **GREEDY),
        ]
    )
    assert isinstance(cancelled, Cancelled) and torch.equal(answer, alone)
    with pytest.raises(Cancelled, match="before it began"):
        together.generate(input_ids=PROMPTS[0], cancel=cancel, **GREEDY)


def test_models_that_cannot_be_answered_together_are_told_why(model: Any) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM is not prepared: call prepare_for_generation_"):
        GenerateTogether(quantized("llama"))
    with pytest.raises(ValueError, match="depends on the sequence's length"):
        GenerateTogether(prepare_for_generation_(quantized("dynamic rope")))
    closed = GenerateTogether(model)
    closed.close()
    with pytest.raises(RuntimeError, match="closed"):
        closed.generate(input_ids=PROMPTS[0], **GREEDY)
