"""Programs that need a Python of their own, in which hqqtensor has not been imported yet.

Most of the time of such a process goes into importing torch. So one process imports torch, and parts of it that
transformers needs, and runs each program in a fork of itself: as far from the tests, and as free to crash.
"""

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from functools import cache
from pathlib import Path

_SERVER = """
import gc, json, os, sys
import torch, torchao, torch._inductor.compile_fx
gc.freeze()
job = None
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    job = None
if job is not None:
    for number, file in enumerate(job["files"]):
        os.dup2(os.open(file, os.O_RDWR), number)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv[1:] = job["arguments"]
    sys.path.insert(0, job["path"])
    exec(job["code"])
"""


@cache
def _server() -> subprocess.Popen[str]:
    """The process that forks; it ends with this one, which closes its standard input."""
    return subprocess.Popen([sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_fresh(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code, indented or not, with ``arguments`` in ``sys.argv[1:]``; it can import the modules of this folder.

    Of other libraries, torch, torchao and torch's inductor are imported already.
    """
    server = _server()
    assert server.stdin and server.stdout
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        job = {
            "code": textwrap.dedent(code), "arguments": list(map(str, arguments)), "folder": os.getcwd(),
            "path": str(Path(__file__).parent), "environment": {**os.environ, **environment},
            "files": [os.devnull, *map(str, files)],
        }  # fmt: skip
        print(json.dumps(job), file=server.stdin, flush=True)
        status = server.stdout.readline()
        assert status, "the process that runs programs has ended"
        return subprocess.CompletedProcess([], int(status), *(file.read_text() for file in files))
