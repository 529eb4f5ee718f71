"""Several processes that talk through torch.distributed (gloo), for tests.

A process costs seconds for importing torch alone, so one start runs many checks, and the processes are forks of one
that has imported everything.
"""

import json
import os
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from fresh_python import run_fresh

Check = Callable[[], None]


def run_checks(module: str, path: Path, names: Sequence[str], processes: int, folder: Path) -> dict[str, list[str]]:
    """Run the functions ``names`` of a module, which lies in the folder ``path``, on all processes at once.

    Gives by name what went wrong, a text for each process on which it did.
    """
    code = f"""
        import sys
        sys.path.insert(0, {str(path)!r})
        import {module} as checks
        from ranks import fork
        fork([getattr(checks, name) for name in {list(names)!r}], {processes}, {str(folder)!r})
    """
    result = run_fresh(code)
    files = [folder / f"rank{rank}.json" for rank in range(processes)]
    missing = [file.name for file in files if not file.exists()]
    assert not missing, f"no report of {missing}: {result.stderr}"
    reports = [json.loads(file.read_text()) for file in files]
    return {name: [report[name] for report in reports if report[name]] for name in names}


def fork(checks: Sequence[Check], processes: int, folder: str) -> None:
    """Run ``checks`` in a process for each rank; each writes what went wrong into ``folder``."""
    torch.set_num_threads(1)
    children = []
    for rank in range(processes):
        if pid := os.fork():
            children.append(pid)
            continue
        report = {check.__name__: "" for check in checks}
        dist.init_process_group("gloo", f"file://{folder}/store", timedelta(minutes=2), processes, rank)
        for check in checks:
            try:
                check()
            except BaseException:
                report[check.__name__] = f"rank {rank}: {traceback.format_exc()}"
        Path(folder, f"rank{rank}.json").write_text(json.dumps(report))
        os._exit(0)  # no shutdown of gloo, which waits for a process that has died
    for pid in children:
        os.waitpid(pid, 0)
