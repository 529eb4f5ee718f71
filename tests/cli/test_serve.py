"""``serve``: a client of the API of OpenAI gets what the model writes, whole and as a stream."""

import asyncio
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hqqtensor.cli import main, model_dir, running, serve
from hqqtensor.cli.serve_limits import Limits
from hqqtensor.generation import together

pytest.importorskip("fastapi", reason="the server needs fastapi, uvicorn and openai")
pytest.importorskip("uvicorn", reason="the server needs fastapi, uvicorn and openai")
pytest.importorskip("openai", reason="the server needs fastapi, uvicorn and openai")


@pytest.fixture(scope="module")
def url(small: Path) -> Iterator[str]:
    """A server of the small model, in a thread."""
    model, tokenizer = running.open_to_write(small / "packed", None, True), model_dir.open_tokenizer(small / "packed")
    listening = serve.listen("localhost", 0)
    server = serve.make_server(serve.make_app(model, tokenizer, "packed"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    for _ in range(200):
        if server.started:
            break
        time.sleep(0.02)
    yield f"http://localhost:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=10)
    listening.close()


def ask(url: str, body: dict | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode()


BODY = {"model": "packed", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 8, "temperature": 0}


def test_an_answer_comes_whole_and_as_a_stream(url: str, small: Path) -> None:
    whole = json.loads(ask(f"{url}/v1/chat/completions", BODY))
    text = whole["choices"][0]["message"]["content"]
    lines = [line for line in ask(f"{url}/v1/chat/completions", {**BODY, "stream": True}).splitlines() if line]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == text
    model, tokenizer = model_dir.open_quantized(small / "packed"), model_dir.open_tokenizer(small / "packed")
    inputs = tokenizer.apply_chat_template(
        BODY["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_plain_prompts_are_completed(url: str) -> None:
    body = {"model": "packed", "prompt": "The list", "max_tokens": 4, "temperature": 0}
    assert json.loads(ask(f"{url}/v1/completions", body))["choices"][0]["text"]


def test_one_model_is_listed_and_no_other_is_loaded(url: str) -> None:
    assert [model["id"] for model in json.loads(ask(f"{url}/v1/models"))["data"]] == ["packed"]
    assert json.loads(ask(f"{url}/health")) == {"status": "ok"}
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(f"{url}/v1/chat/completions", {**BODY, "model": "other"})
    assert error.value.code == 400


def test_a_port_in_use_and_a_bad_name_are_told_before_the_model_is_read(small: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(running, "open_to_write", None)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        assert main(["serve", str(small / "packed"), "--host", "127.0.0.1", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
    assert main(["serve", str(small / "packed"), "--name", "a@b"]) == 2
    assert "must have no '@' and no ':', got 'a@b'" in capsys.readouterr().err


def test_a_missing_package_is_named_with_what_installs_it(small: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert main(["serve", str(small / "packed")]) == 1
    assert "pip install 'hqqtensor[serve]'" in capsys.readouterr().err


def chunks_of(stream: str) -> list[dict]:
    return [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: {")]


def test_requests_at_once_get_what_each_gets_alone(url: str) -> None:
    bodies = [
        {"model": "packed", "prompt": prompt, "max_tokens": tokens, **settings}
        for prompt, tokens, settings in [
            ("The list", 12, {"temperature": 0}),
            ("A class is", 5, {"temperature": 0}),
            ("def f(x):", 20, {"temperature": 1.5, "seed": 7}),
            ("Return", 9, {"temperature": 0, "stop": [" a", "the"]}),
        ]
    ]

    def text(body: dict) -> str:
        chunks = chunks_of(ask(f"{url}/v1/completions", {**body, "stream": True}))
        return "".join(chunk["choices"][0]["text"] for chunk in chunks)

    alone = [text(body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        assert list(pool.map(text, bodies)) == alone
    whole = [json.loads(ask(f"{url}/v1/completions", body))["choices"][0]["text"] for body in bodies]
    assert whole == alone


def test_a_stop_word_ends_the_answer(url: str) -> None:
    body = {"model": "packed", "prompt": "The list", "max_tokens": 12, "temperature": 0}
    text = json.loads(ask(f"{url}/v1/completions", body))["choices"][0]["text"]
    word = text[len(text) // 2 :][:2]
    stopped = json.loads(ask(f"{url}/v1/completions", {**body, "stop": [word]}))
    assert word in stopped["choices"][0]["text"] and text.startswith(stopped["choices"][0]["text"])
    assert stopped["usage"]["completion_tokens"] < 12 and stopped["choices"][0]["finish_reason"] == "stop"


def test_a_client_that_goes_away_stops_its_answer_alone(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    endings: list[Exception] = []
    fail = together._Sequence.fail
    monkeypatch.setattr(together._Sequence, "fail", lambda self, error: (endings.append(error), fail(self, error))[1])
    body = {"model": "packed", "prompt": "The list", "max_tokens": 200, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        answer.readline()
    other = json.loads(ask(f"{url}/v1/chat/completions", BODY))
    assert other["usage"]["completion_tokens"] > 0
    for _ in range(200):
        if endings:
            break
        time.sleep(0.02)
    assert [type(error).__name__ for error in endings] == ["_GenerationCancelled"]


def test_a_client_that_goes_away_before_a_whole_answer_stops_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    endings: list[Exception] = []
    fail = together._Sequence.fail
    monkeypatch.setattr(together._Sequence, "fail", lambda self, error: (endings.append(error), fail(self, error))[1])
    add = together._Sequence.add
    monkeypatch.setattr(together._Sequence, "add", lambda self, logits: (time.sleep(0.02), add(self, logits))[1])
    body = {"model": "packed", "prompt": "The list", "max_tokens": 400, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(TimeoutError):
        urllib.request.urlopen(request, timeout=0.3)
    for _ in range(200):
        if endings:
            break
        time.sleep(0.02)
    assert [type(error).__name__ for error in endings] == ["Cancelled"]


def test_more_requests_than_the_limit_get_503_at_once() -> None:
    release = asyncio.Event()

    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        await release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def statuses() -> list[int]:
        limits, got = Limits(app, 2), []

        async def request(method: str) -> None:
            sent = []

            async def receive() -> dict:
                await release.wait()
                await asyncio.sleep(1)
                return {"type": "http.disconnect"}

            async def send(message: dict) -> None:
                sent.append(message)

            await limits({"type": "http", "method": method}, receive, send)
            got.append(sent[0]["status"])

        tasks = [asyncio.ensure_future(request(method)) for method in ("POST", "POST", "GET", "POST")]
        await asyncio.sleep(0.01)
        assert got == [503]
        release.set()
        await asyncio.gather(*tasks)
        await request("POST")
        return got

    assert asyncio.run(statuses()) == [503, 200, 200, 200, 200]


def test_an_error_of_one_request_is_told_to_it_alone(url: str) -> None:
    settings = json.dumps({"max_new_tokens": 4, "do_sample": True, "temperature": -1.0})
    wrong = {"model": "packed", "prompt": "x", "generation_config": settings, "stream": True}
    chunks = ask(f"{url}/v1/completions", wrong)
    assert "temperature" in chunks and '"error"' in chunks
    assert json.loads(ask(f"{url}/v1/chat/completions", BODY))["usage"]["completion_tokens"] > 0


def test_models_without_a_decoder_take_turns_and_say_so(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = model_dir.open_dense(small / "dense"), model_dir.open_tokenizer(small / "dense")
    serve.make_app(model, tokenizer, "dense")
    assert "requests take turns: LlamaForCausalLM is not prepared" in capsys.readouterr().err
