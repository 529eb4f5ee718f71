"""``python -m faults.soak --minutes 60``: everything at once, for long, in several processes of several threads.

Each thread does one kind of work over and over: generating, embedding, asking a server, quantizing, saving and loading.
Every answer must be that of the first time. Memory and file descriptors of each process are sampled, and the slope of
their course is printed with its standard error. The exit code is 1 where an answer drifted, a thread stood still, or
memory or descriptors grow.
"""

import argparse
import ctypes
import faulthandler
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import hqqtensor
from faults.course import Growth, Watch
from hqqtensor import HqqConfig, load_model, prepare_for_generation_, quantize_, save_model
from hqqtensor.cli import model_dir
from hqqtensor.generation.together import GenerateTogether

DOCLM = Path(__file__).parents[1] / "tests" / "assets" / "doclm"
STUCK = 120.0
"""Seconds in which a thread must finish something."""


_MALLOC = ctypes.CDLL(None)


class _Malloc(ctypes.Structure):
    """glibc's ``struct mallinfo2``, over all arenas."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "mapped", "usmblks", "fsmblks", "in_use", "fordblks", "keepcost",
    ))  # fmt: skip


_MALLOC.mallinfo2.restype = _Malloc


@dataclass
class Course:
    """Samples of one process: seconds, bytes that are its alone, of these what malloc has given out, and open files.

    malloc returns what is free to the system before each sample: without that, pages which threads have freed in one of
    its arenas stay, and more of them from hour to hour, since each arena keeps the most that it ever needed.
    """

    seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    in_use: list[float] = field(default_factory=list)
    files: list[float] = field(default_factory=list)

    def sample(self, start: float) -> None:
        """Add what the system says now."""
        _MALLOC.malloc_trim(0)
        malloc = _MALLOC.mallinfo2()
        self.in_use.append(float(malloc.in_use + malloc.mapped))
        status = Path("/proc/self/status").read_text()
        self.seconds.append(time.monotonic() - start)
        self.memory.append(1024.0 * int(status.partition("RssAnon:")[2].split()[0]))
        self.files.append(float(len(os.listdir("/proc/self/fd"))))


class Soak:
    """The threads of one process."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.count = folder, threads
        self.stop = threading.Event()
        self.rounds: Counter[str] = Counter()
        self.errors: list[str] = []
        self.watch = Watch(STUCK)
        self.first: dict[str, str] = {}

    def works(self) -> dict[str, Callable[[int], Any]]:
        """Each kind of work by its name; they share models as far as the package allows."""
        quantized = self.folder / "quantized"
        model = hqqtensor.load(quantized)
        prepared = prepare_for_generation_(hqqtensor.load(quantized))
        ids = torch.arange(2, 14).reshape(1, 12)
        together = GenerateTogether(hqqtensor.load(quantized, generation=True))
        greedy: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        client = _server(quantized)
        lock = threading.Lock()

        def generate(number: int) -> Any:
            with lock:  # a prepared model serves one call at a time
                return prepared.generate(ids + number % 5, **greedy)

        def embed(number: int) -> Any:
            with torch.no_grad():
                return model(ids + number % 5, output_hidden_states=True).hidden_states[-1].mean(1)

        def ask(number: int) -> Any:
            answer = client(
                "/v1/completions", {"model": "soak", "prompt": "hqqtensor is", "max_tokens": 8, "temperature": 0}
            )
            return answer["choices"][0]["text"]

        def quantize(number: int) -> Any:
            dense = _small(number % 3)
            quantize_(dense, HqqConfig(2 + number % 3, 32))
            return dense.state_dict()

        def save_and_load(number: int) -> Any:
            dense = _small(7)
            quantize_(dense, HqqConfig(4, 32))
            place = self.folder / f"saved-{os.getpid()}-{threading.get_ident()}"
            save_model(dense, place, max_shard_size="10KB" if number % 2 else "5GB")
            again = _small(8)
            load_model(again, place, mmap=number % 3 > 0)
            return again.state_dict()

        def open_again(number: int) -> Any:
            opened = hqqtensor.load(quantized, mmap=number % 2 > 0)
            with torch.no_grad():
                return opened(ids).logits

        return {
            "generate": generate, "together": lambda n: together.generate(input_ids=ids + n % 5, **greedy),
            "embed": embed, "serve": ask, "quantize": quantize, "save and load": save_and_load, "open": open_again,
        }  # fmt: skip

    def run(self, seconds: float) -> dict[str, Any]:
        """Work for so long; the counts, the errors and the slopes."""
        works = self.works()
        names = [list(works)[place % len(works)] for place in range(self.count)]
        threads = [
            threading.Thread(target=self._repeat, args=(f"{name} {place}", name, works[name]), daemon=True)
            for place, name in enumerate(names)
        ]
        start, course = time.monotonic(), Course()
        for thread in threads:
            thread.start()
        course.sample(start)
        while time.monotonic() - start < seconds and not self.errors:
            stuck = self.watch.sleep(max(0.05, seconds / 600))
            course.sample(start)
            if stuck:
                faulthandler.dump_traceback(all_threads=True)
                self.errors += stuck
        self.stop.set()
        for thread in threads:
            thread.join(timeout=STUCK)
        courses = {"memory": course.memory, "allocated": course.in_use, "files": course.files}
        return {
            "seconds": round(time.monotonic() - start), "rounds": dict(self.rounds), "errors": self.errors,
            **{what: Growth.of(course.seconds, y) for what, y in courses.items()},
        }  # fmt: skip

    def _repeat(self, thread: str, name: str, work: Callable[[int], Any]) -> None:
        number = 0
        while not self.stop.is_set():
            self.watch.begins(thread)
            try:
                digest = _digest(work(number))
            except BaseException as error:
                self.errors.append(f"{name}: {type(error).__name__}: {error}")
                return
            key = f"{name} {number % 30}"  # what `number` chooses is the same again after 30
            if self.first.setdefault(key, digest) != digest:
                self.errors.append(f"{name}: round {number} gave another answer than the first of its kind")
                return
            number += 1
            self.rounds[name] += 1


def _digest(value: Any) -> str:
    result = hashlib.sha256()
    for part in value.values() if isinstance(value, dict) else [value]:
        if isinstance(part, torch.Tensor):
            plain = part.dequantize() if isinstance(part, hqqtensor.HQQTensor) else part
            result.update(plain.detach().contiguous().view(torch.uint8).numpy().tobytes())
        else:
            result.update(repr(part).encode())
    return result.hexdigest()


def _small(seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(3)])
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=generator)
    return model


def _server(directory: Path) -> Callable[[str, dict[str, Any]], Any]:
    """``hqqtensor serve``'s application behind a port of this machine; a function that posts to it."""
    import urllib.request

    from hqqtensor.cli import running, serve

    app = serve.make_app(running.open_to_write(directory, None, True), model_dir.open_tokenizer(directory), "soak")
    listening = serve.listen("127.0.0.1", 0)
    server = serve.make_server(app)
    threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True).start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"

    def post(path: str, request: dict[str, Any]) -> Any:
        data, head = json.dumps(request).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{url}{path}", data, head)) as answer:
            return json.load(answer)

    return post


def prepare(folder: Path) -> None:
    """The quantized directory that all processes open."""
    dense = transformers.AutoModelForCausalLM.from_pretrained(DOCLM, dtype="auto").eval()
    config = HqqConfig(4, 64)
    quantize_(dense, config)
    save_model(dense, folder / "quantized", non_persistent_buffers=False)
    settings = model_dir.read_dense_config(DOCLM)
    model_dir.complete(folder / "quantized", DOCLM, settings, config, next(dense.parameters()).dtype)


def _one_process(folder: Path, seconds: float, threads: int) -> int:
    torch.set_num_threads(1)
    result = Soak(folder, threads).run(seconds)
    print(json.dumps(result), flush=True)
    os._exit(0)  # the server and daemon threads end with the process


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="(default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=8, help="in each process (default: %(default)s)")
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder is not None:
        return _one_process(args.folder, 60 * args.minutes, args.threads)
    with tempfile.TemporaryDirectory(prefix="hqqtensor-soak-") as folder:
        prepare(Path(folder))
        command = [sys.executable, "-m", "faults.soak", "--minutes", str(args.minutes), "--in", folder]
        command += ["--threads", str(args.threads)]
        children = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(args.processes)
        ]  # fmt: skip
        outputs = [child.communicate()[0] for child in children]
    failed = False
    for number, (child, output) in enumerate(zip(children, outputs, strict=True)):
        lines = [line for line in output.splitlines() if line.startswith("{")]
        if child.returncode or not lines:
            print(f"process {number}: ended with {child.returncode}")
            failed = True
            continue
        failed |= not _report(number, json.loads(lines[-1]))
    return int(failed)


def _report(number: int, result: dict[str, Any]) -> bool:
    """Print one process's result; whether all is well."""
    rounds = ", ".join(f"{name} {count:,}" for name, count in result["rounds"].items())
    print(f"process {number}, {result['seconds']} s: {rounds}")
    grows = False
    kinds = (("memory", "MB", 1e6, 2e6), ("allocated", "MB", 1e6, 2e6), ("files", "descriptors", 1.0, 1.0))
    for what, unit, scale, least in kinds:
        growth = Growth(*result[what])
        print(f"  {growth.line(what, unit, scale)}")
        grows |= growth.is_real(least)
    for error in result["errors"]:
        print(f"  {error}")
    return not grows and not result["errors"]


if __name__ == "__main__":
    sys.exit(main())
