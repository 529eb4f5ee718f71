"""Puts a package, and all that it requires, into another environment by hard links: a second, where pip takes a minute.

``python .ci/link_installed.py torch OTHER/bin/python``, with the Python of the environment that has it.
"""

import importlib.util
import os
import subprocess
import sys
import sysconfig
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement


def required(name: str, seen: set[str]) -> set[str]:
    """``name`` and what it requires without extras, in turn, added to ``seen``."""
    if name not in seen:
        seen.add(name)
        for line in distribution(name).requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                required(requirement.name, seen)
    return seen


def link(name: str, source: Path, target: Path) -> None:
    """The files of one distribution; its scripts, which name an interpreter, are left out."""
    for file in distribution(name).files or ():
        # Bytecode that an import has written is no part of the distribution, and as good in the other place.
        paths = [str(file), importlib.util.cache_from_source(str(file))] if file.suffix == ".py" else [str(file)]
        for path in paths:
            if not path.startswith("..") and (source / path).is_file() and not (target / path).exists():
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                os.link(source / path, target / path)


def main() -> None:
    name, python = sys.argv[1:]
    where = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    names = sorted(required(name, set()))
    for each in names:
        link(each, Path(sysconfig.get_path("purelib")), Path(where.strip()))
    print("linked", *names)


main()
