"""``python -m benchmarks.cli_examples``: run the commands in docs/cli.md and paste what they print.

Each block between ``<!-- commands -->`` and ``<!-- end of commands -->`` holds lines that begin with "$ " and what came
of them. The commands run one after the other, as they stand on the page, in one folder that has a small dense model
(``doclm``, with a chat template) and a text (``sample.txt``). ``--check`` writes nothing and ends with status 1 where a
command fails or prints something else, figures and the words of a model aside.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from hqqtensor.cli import main as hqqtensor
from hqqtensor.cli import serve

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "cli.md"
DOCLM = ROOT / "tests" / "assets" / "doclm"
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"  # doclm answers by going on
BLOCK = re.compile(r"(<!-- commands -->\n```text\n)(.*?)(```\n<!-- end of commands -->)", re.S)
PORT = "8000"
"""The port on the page; a free one takes its place when the commands run."""

_PROGRESS = re.compile(r"^[\w .*-]+: \d+%.*\n|^measuring kernels.*\n|^.*about .* left\n", re.M)


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """The folder that the commands run in, as working directory."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        shutil.copytree(DOCLM, Path(name) / "doclm")
        (Path(name) / "doclm" / "chat_template.jinja").write_text(TEMPLATE)
        shutil.move(Path(name) / "doclm" / "valid.txt", Path(name) / "sample.txt")
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(before)


class Shell:
    """Runs command lines in this process; ``hqqtensor serve ... &`` in a thread."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = str(free.getsockname()[1])
        self.servers: list[Any] = []
        self.threads: list[threading.Thread] = []

    def output(self, line: str) -> str:
        """What a command line prints, on both streams; RuntimeError where it fails."""
        is_behind = line.endswith("&")
        line, _, first_lines = line.rstrip(" &").replace(PORT, self.port).partition(" | head -")
        words = shlex.split(line)
        if is_behind:
            text = self._serve(words[1:])
        elif words[0] == "hqqtensor":
            text = self._run(words[1:])
        elif words[:2] == ["printf", "%s\\n"] and "|" in words:
            pipe = words.index("|")
            text = self._run(words[pipe + 2 :], "".join(f"{word}\n" for word in words[2:pipe]))
        elif words[0] == "curl":
            text = subprocess.run(words, capture_output=True, text=True, check=True).stdout.rstrip() + "\n"
        else:
            raise RuntimeError(f"the page has a command that this script does not know: {line}")
        text = _PROGRESS.sub("", text.replace(self.port, PORT).replace(str(Path.cwd()), "/home/me"))
        return "".join(text.splitlines(keepends=True)[: int(first_lines) if first_lines else None])

    def _run(self, words: list[str], typed: str = "") -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), _typing(typed):
            code = hqqtensor(words)
        if code != 0:
            raise RuntimeError(f"hqqtensor {shlex.join(words)} ended with {code}:\n{printed.getvalue()}")
        return printed.getvalue()

    def _serve(self, words: list[str]) -> str:
        started = threading.Event()

        def make(app: Any) -> Any:
            server = real(app)
            self.servers.append(server)
            started.set()
            return server

        real, printed = serve.make_server, io.StringIO()
        with contextlib.redirect_stderr(printed), mock.patch.object(serve, "make_server", make):
            self.threads.append(threading.Thread(target=hqqtensor, args=(words,), daemon=True))
            self.threads[-1].start()
            if not started.wait(120):
                raise RuntimeError(f"hqqtensor {shlex.join(words)} does not begin: {printed.getvalue()}")
        while not self.servers[-1].started:
            time.sleep(0.02)
        return printed.getvalue()

    def close(self) -> None:
        """End the servers."""
        for server in self.servers:
            server.should_exit = True
        for thread in self.threads:
            thread.join()


def _typing(text: str) -> Any:
    return mock.patch.object(sys, "stdin", io.StringIO(text))


def with_outputs(page: str) -> str:
    """The page with every block's outputs made anew."""
    shell = Shell()

    def block(match: re.Match[str]) -> str:
        lines = [line for line in match[2].splitlines() if line.startswith("$ ")]
        return match[1] + "".join(f"{line}\n{shell.output(line[2:])}" for line in lines) + match[3]

    try:
        with folder():
            return BLOCK.sub(block, page)
    finally:
        shell.close()


def normal(page: str) -> str:
    """The blocks without what differs from run to run: figures, widths of columns, and what a model writes."""
    kept = []
    for match in BLOCK.finditer(page):
        command = ""
        for line in match[2].splitlines():
            command = line if line.startswith("$ ") else command
            if line == command or not _is_a_models_words(command, line):
                text = re.sub(r"\d[\d.,e+-]*", "0", line) if line != command else line
                kept.append(re.sub(r"\s+", " ", re.sub(r" x=\S*", "", text)).strip())
    return "\n".join(kept)


def _is_a_models_words(command: str, line: str) -> bool:
    if "curl" in command:
        return True
    writes = any(f"hqqtensor {name}" in command for name in ("generate", "chat"))
    return writes and not re.search(r"tokens? a second|tokens of prompt", line) and "transformers' own" not in line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    before = PAGE.read_text(encoding="utf-8")
    after = with_outputs(before)
    if not args.check:
        PAGE.write_text(after, encoding="utf-8")
        return 0
    if normal(before) != normal(after):
        print(json.dumps({"page": normal(before).splitlines(), "now": normal(after).splitlines()}, indent=1))
        print("docs/cli.md is out of date: python -m benchmarks.cli_examples")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
