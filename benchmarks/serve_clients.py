"""``python -m benchmarks.serve_clients``: tokens a second of ``hqqtensor serve`` with several clients at once.

The server runs in a process of its own, and clients ask it by HTTP, each one request after the other. All answers have
the same number of tokens. Numbers of clients take turns. "all" counts the tokens that all clients get in a second, from
the first request to the last answer, prompts included. By default the model is SmolLM2-135M-Instruct in 4 bits.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.timing import machine, write_json
from hqqtensor import cli as command_line
from hqqtensor.demo.models import smollm_dir
from hqqtensor.diagnostics.table import text_table

SUBJECTS = ("rivers", "glaciers", "bridges", "clocks", "bees", "maps", "bread", "tides")


@contextlib.contextmanager
def server(directory: Path) -> Iterator[dict[str, Any]]:
    """A server of a model directory, as what it says of itself: "url" and "model"."""
    command = [sys.executable, "-m", "hqqtensor", "serve", str(directory), "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        text = ""
        while not text.endswith("}\n"):
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"{' '.join(command)} ended with {process.wait()}: run it to see why")
            text += line
        yield json.loads(text)
    finally:
        process.terminate()
        process.wait()


def ask(at: dict[str, Any], subject: str, tokens: int, stream: bool) -> int:
    """Tokens of one answer."""
    settings = {"max_new_tokens": tokens, "eos_token_id": -1, "do_sample": False}
    body = {
        "model": at["model"],
        "messages": [{"role": "user", "content": f"Write about {subject}."}],
        "generation_config": json.dumps(settings),
        "stream": stream,
    }
    request = urllib.request.Request(
        f"{at['url']}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        text = answer.read().decode()
    if stream:
        text = [line for line in text.splitlines() if line.startswith("data: {")][-1].removeprefix("data: ")
    return json.loads(text)["usage"]["completion_tokens"]


def tokens_a_second(at: dict[str, Any], clients: int, args: argparse.Namespace) -> float:
    """Of all clients together."""

    def client(i: int) -> int:
        subjects = (SUBJECTS[(i + j) % len(SUBJECTS)] for j in range(args.requests))
        return sum(ask(at, subject, args.tokens, args.stream) for subject in subjects)

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        tokens = sum(pool.map(client, range(clients)))
    return tokens / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a quantized directory")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8], metavar="N")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=2, help="of each client in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stream", action="store_true", help="answers come token by token")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rates: dict[int, list[float]] = {clients: [] for clients in args.clients}
    with tempfile.TemporaryDirectory() as folder:
        directory = args.model
        if directory is None:
            directory = Path(folder, "SmolLM2-4bit")
            if command_line.main(["quantize", str(smollm_dir()), str(directory), "--bits", "4"]):
                raise SystemExit("SmolLM2 could not be quantized")
        with server(directory) as at:
            ask(at, SUBJECTS[0], 8, args.stream)  # the first answer checks and copies the model
            for _ in range(args.rounds):
                for clients in args.clients:
                    rates[clients].append(tokens_a_second(at, clients, args))
    median = {clients: statistics.median(found) for clients, found in rates.items()}
    first = median[args.clients[0]]
    figures = [
        {"clients": clients, "all": rate, "each": rate / clients, "ratio": rate / first}
        for clients, rate in median.items()
    ]
    rows = [[str(f["clients"]), f"{f['all']:.1f}", f"{f['each']:.1f}", f"{f['ratio']:.2f}"] for f in figures]
    print(text_table(["clients", "all, tokens/s", "each, tokens/s", f"all / {args.clients[0]} client"], rows))
    settings = {name: getattr(args, name) for name in ("tokens", "requests", "rounds", "stream")}
    write_json(args.json, {"machine": machine(), **settings, "figures": figures})


if __name__ == "__main__":
    main()
