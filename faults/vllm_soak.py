"""``python -m faults.vllm_soak --minutes 30``: vLLM's server on a quantized SmolLM2 under mixed load.

vLLM runs in the environment of ``make vllm-env``. Eight clients ask at once, each its own kind of request over and
over: short and long prompts, streams, streams that are left in the middle, two answers of a prompt, sampled answers,
and requests that must be refused. Greedy answers must be those that the server gave before the load began. Rounding
depends on what is computed together, so an answer may part from them where the two best tokens were less than ``TIE``
apart. The exit code is 1 for another answer, a request that stands still, or memory or descriptors that grow.
"""

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from faults.course import Growth, Watch
from hqqtensor.cli import main as hqqtensor
from hqqtensor.demo.models import smollm_dir

PYTHON = Path(__file__).parents[1] / "build" / "vllm-env" / "bin" / "python"
TIE = 0.05
"""Nats by which the best token must lead the second for a departure from it to count as wrong (float32 model)."""
STUCK = 180.0
"""Seconds in which a client must finish a request."""
PROMPTS = [
    "The capital of France is", "Water boils at", "Once upon a time there was", "def fibonacci(n):",
    "The three primary colours are", "Dear Sir or Madam,",
]  # fmt: skip
LONG = "The quick brown fox jumps over the lazy dog. " * 30
TOKENS = 24


class Server:
    """vLLM's server of OpenAI's API, as a process group of its own."""

    def __init__(self, directory: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
        command += ["--port", str(self.port), "--max-model-len", "512", "--enforce-eager", "--served-model-name", "Q"]
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [*command, "--dtype", "float32"], stdout=out, stderr=out, env=environment, start_new_session=True
            )
        while not self._answers():
            if self.process.poll() is not None:
                raise SystemExit(log.read_text()[-4000:])
            time.sleep(1)

    def _answers(self) -> bool:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port)
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False

    def ask(self, **request: Any) -> http.client.HTTPResponse:
        """The answer to a completion request, not read yet."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        body = json.dumps({"model": "Q", "max_tokens": TOKENS, "temperature": 0, **request})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        return connection.getresponse()

    def memory(self) -> tuple[float, float]:
        """Bytes that are the processes' alone, and open descriptors, over all of its processes."""
        anonymous = files = 0.0
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and os.getsid(int(folder.name)) == self.process.pid:
                    status = (folder / "status").read_text()
                    anonymous += 1024.0 * int(status.partition("RssAnon:")[2].split()[0])
                    files += len(os.listdir(folder / "fd"))
            except (OSError, IndexError):  # it has ended meanwhile
                continue
        return anonymous, files

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(60)


class Load:
    """The clients, what the server answers when it has nothing else to do, and what went wrong."""

    def __init__(self, server: Server) -> None:
        self.server, self.stop, self.lock = server, threading.Event(), threading.Lock()
        self.rounds: Counter[str] = Counter()
        self.parted = 0  # answers that went another way at a tie
        self.errors: list[str] = []
        self.watch = Watch(STUCK)
        self.expected = {prompt: self.greedy(prompt) for prompt in [*PROMPTS, LONG]}

    def greedy(self, prompt: str) -> list[tuple[str, float]]:
        """Tokens of the greedy answer, each with its lead over the second best in nats."""
        response = self.server.ask(prompt=prompt, logprobs=2)
        answer = json.load(response)
        if response.status != 200:
            raise ValueError(f"status {response.status}: {answer}")
        logprobs = answer["choices"][0]["logprobs"]
        leads = [sorted(top.values(), reverse=True) for top in logprobs["top_logprobs"]]
        return [
            (token, best[0] - best[1] if len(best) > 1 else float("inf"))
            for token, best in zip(logprobs["tokens"], leads, strict=True)
        ]

    def check(self, prompt: str, tokens: list[str]) -> None:
        """ValueError where ``tokens`` part from the expected ones at no tie."""
        for i, (expected, lead) in enumerate(self.expected[prompt]):
            if i >= len(tokens) or tokens[i] != expected:
                if i < len(tokens) and lead < TIE:
                    with self.lock:
                        self.parted += 1
                    return
                raise ValueError(f"{prompt[:40]!r}: token {i} is not {expected!r} in {tokens}, which led by {lead:.3f}")

    def kinds(self) -> dict[str, Any]:
        """Each kind of request by its name."""
        return {
            "short": lambda n: self._checked(PROMPTS[n % len(PROMPTS)]),
            "short, again": lambda n: self._checked(PROMPTS[(n + 3) % len(PROMPTS)]),
            "long prompt": lambda n: self._checked(LONG),
            "stream": lambda n: self._streamed(PROMPTS[n % len(PROMPTS)], None),
            "stream left": lambda n: self._streamed(PROMPTS[n % len(PROMPTS)], 1 + n % 7),
            "two answers": self._two,
            "sampled": self._sampled,
            "refused": self._refused,
        }

    def _checked(self, prompt: str) -> None:
        self.check(prompt, [token for token, _ in self.greedy(prompt)])

    def _streamed(self, prompt: str, pieces: int | None) -> None:
        """Read a stream, or leave it after so many pieces."""
        response = self.server.ask(prompt=prompt, logprobs=0, stream=True)
        tokens: list[str] = []
        for count, line in enumerate(line for line in response if line.startswith(b"data: {")):
            if count == pieces:
                response.close()
                return
            for choice in json.loads(line[6:])["choices"]:
                tokens += (choice["logprobs"] or {"tokens": []})["tokens"]
        self.check(prompt, tokens)

    def _two(self, number: int) -> None:
        prompts = [PROMPTS[number % len(PROMPTS)], PROMPTS[(number + 1) % len(PROMPTS)]]
        choices = json.load(self.server.ask(prompt=prompts, logprobs=0))["choices"]
        for prompt, choice in zip(prompts, choices, strict=True):
            self.check(prompt, choice["logprobs"]["tokens"])

    def _sampled(self, number: int) -> None:
        answer = json.load(self.server.ask(prompt=PROMPTS[0], temperature=1.0, seed=number, ignore_eos=True))
        if answer["usage"]["completion_tokens"] != TOKENS:
            raise ValueError(f"a sampled answer of {answer['usage']['completion_tokens']} tokens, not {TOKENS}")

    def _refused(self, number: int) -> None:
        wrong = ({"prompt": LONG * 4}, {"prompt": "a", "temperature": -1}, {"prompt": "a", "max_tokens": "many"})
        response = self.server.ask(**wrong[number % len(wrong)])
        response.read()
        if not 400 <= response.status < 500:
            raise ValueError(f"a wrong request got status {response.status}")
        time.sleep(0.2)

    def repeat(self, name: str, kind: Any) -> None:
        """One client."""
        number = 0
        while not self.stop.is_set():
            self.watch.begins(name)
            try:
                kind(number)
            except Exception as error:
                self.errors.append(f"{name}: {type(error).__name__}: {error}")
                return
            number += 1
            self.rounds[name] += 1

    def run(self, seconds: float) -> dict[str, tuple[list[float], list[float]]]:
        """Load the server for so long; its memory and descriptors by time."""
        start = time.monotonic()
        clients = [
            threading.Thread(target=self.repeat, args=(name, kind), daemon=True) for name, kind in self.kinds().items()
        ]
        for client in clients:
            client.start()
        course: dict[str, tuple[list[float], list[float]]] = {"memory": ([], []), "descriptors": ([], [])}
        while time.monotonic() - start < seconds and not self.errors:
            self.errors += self.watch.sleep(max(1.0, seconds / 600))
            for (x, y), value in zip(course.values(), self.server.memory(), strict=True):
                x.append(time.monotonic() - start)
                y.append(value)
        self.stop.set()
        for client in clients:
            client.join(STUCK)
        return course


def main() -> int:
    parser = argparse.ArgumentParser(prog="vllm_soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="(default: %(default)s)")
    args = parser.parse_args()
    if not PYTHON.exists():
        raise SystemExit("vLLM is not here: make vllm-env")
    with tempfile.TemporaryDirectory(prefix="hqqtensor-vllm-") as name:
        folder = Path(name)
        assert hqqtensor(["quantize", str(smollm_dir()), str(folder / "Q"), "--bits", "4"]) == 0
        server = Server(folder / "Q", folder / "log")
        try:
            load = Load(server)
            course = load.run(60 * args.minutes)
        finally:
            server.end()
        if load.errors:
            print((folder / "log").read_text()[-6000:])
    print(", ".join(f"{name} {count:,}" for name, count in load.rounds.items()))
    print(f"{load.parted} greedy answers parted at a tie of less than {TIE} nats")
    grows = False
    for (what, (x, y)), (unit, scale, least) in zip(
        course.items(), [("MB", 1e6, 8e6), ("descriptors", 1.0, 2.0)], strict=True
    ):
        growth = Growth.of(x, y)
        print(growth.line(what, unit, scale))
        grows |= growth.is_real(least)
    for error_line in load.errors:
        print(error_line)
    return int(grows or bool(load.errors))


if __name__ == "__main__":
    sys.exit(main())
