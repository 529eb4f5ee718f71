"""``generate``, ``chat`` and ``bench``: what they write is what the model writes in a process."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from hqqtensor.cli import chat, main, model_dir, running

PROMPT = "The list is"


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


@pytest.fixture(scope="module")
def expected(small: Path) -> str:
    model, tokenizer = model_dir.open_quantized(small / "packed"), model_dir.open_tokenizer(small / "packed")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_generate_prints_what_the_model_writes_and_its_speed_on_stderr(small: Path, expected: str, capsys) -> None:
    assert run("generate", small / "packed", "-p", PROMPT, "--max-tokens", 12, "--temperature", 0) == 0
    printed = capsys.readouterr()
    assert printed.out == expected + "\n"
    assert "new tokens, " in printed.err and "tokens a second" in printed.err and "slower" not in printed.err


def test_generate_reads_a_prompt_from_stdin_and_tells_all_as_json(small, expected, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert run("generate", small / "packed", "-p", "-", "--max-tokens", 12, "--temperature", 0, "--json") == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert (told["prompt"], told["text"], told["new_tokens"]) == (PROMPT, expected, 12) and printed.err == ""
    assert told["tokens_per_second"] > 0 and told["first_token_seconds"] > 0


def test_a_dense_directory_runs_dense_or_quantized_in_memory(small: Path, expected: str, capsys) -> None:
    command = ("generate", small / "dense", "-p", PROMPT, "--max-tokens", 12, "--temperature", 0)
    assert run(*command) == 0
    printed = capsys.readouterr()
    assert printed.out != expected + "\n"
    assert "slower" not in printed.err
    assert run(*command, "--bits", 4) == 0
    printed = capsys.readouterr()
    assert printed.out == expected + "\n" and "slower" not in printed.err


def test_a_seed_makes_sampling_repeat(small: Path, capsys) -> None:
    texts = []
    for seed in (1, 1, 2):
        command = ("generate", small / "packed", "-p", PROMPT, "--max-tokens", 12, "--temperature", 1.5)
        assert run(*command, "--seed", seed, "--json") == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] != texts[2]


def test_an_answer_ends_where_the_positions_do(small: Path, capsys) -> None:
    assert run("generate", small / "packed", "-p", "a " * 120, "--max-tokens", 200, "--temperature", 0, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["prompt_tokens"] + told["new_tokens"] <= 256
    assert run("generate", small / "packed", "-p", "a " * 400) == 2
    assert "leaves no place in the 256 positions" in capsys.readouterr().err


def test_chat_answers_each_line_of_a_pipe_within_one_conversation(small: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\nWhere?\n"))
    options = ("--system", "Be short.", "--max-tokens", 8, "--temperature", 0)
    assert run("chat", small / "packed", *options, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    messages = told["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    # As the same conversation comes out without a cache and without our decoder.
    model, tokenizer = model_dir.open_quantized(small / "packed"), model_dir.open_tokenizer(small / "packed")
    for end in (2, 4):
        inputs = tokenizer.apply_chat_template(
            messages[:end], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(ids, skip_special_tokens=True) == messages[end]["content"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\nWhere?"))
    assert run("chat", small / "packed", *options) == 0
    printed = capsys.readouterr()
    assert printed.out == "".join(m["content"] + "\n" for m in messages if m["role"] == "assistant")
    assert "2 answers, 16 tokens, " in printed.err


def test_an_empty_line_starts_anew(small: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\n\nWho?\n"))
    assert run("chat", small / "packed", "--max-tokens", 6, "--temperature", 0, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["messages"][1] == told["messages"][3]
    assert told["answers"][0]["prompt_tokens"] == told["answers"][1]["prompt_tokens"]


def test_the_cache_serves_a_prompt_that_begins_with_what_it_holds(small: Path) -> None:
    conversation = chat.Conversation(model_dir.open_quantized(small / "packed"), None, [], None)
    conversation.cache, conversation.cached_ids = "cache", [1, 2]
    assert conversation._cache_for([1, 2, 3]) == "cache"
    assert conversation._cache_for([1, 2]) != "cache" and conversation._cache_for([1, 3, 2]) != "cache"


def test_a_model_that_is_not_served_fast_says_why(capsys) -> None:
    running.make_fast(torch.nn.Linear(2, 2))
    assert capsys.readouterr().err.startswith(
        "transformers' own decoding, which is slower: Linear holds no base models"
    )


def test_bench_measures_prompt_and_decode(small: Path, capsys) -> None:
    options = ("--prompt-tokens", 16, "--new-tokens", 4, "--rounds", 1)
    assert run("bench", small / "packed", *options, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["prompt_tokens"] == 16 and told["new_tokens"] == 4
    for name in ("prompt_tokens_per_second", "decode_tokens_per_second", "memory_bytes_per_second"):
        assert told[name] > 0
    model = model_dir.open_quantized(small / "packed")
    table = model.get_input_embeddings().weight.nbytes  # not tied: one row of it is read
    assert told["model_bytes"] - told["bytes_per_token"] == table
    assert told["peak_resident_bytes"] > told["model_bytes"]
    assert run("bench", small / "packed", *options) == 0
    assert "of the memory's" in capsys.readouterr().out
