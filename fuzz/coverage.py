"""Damages chosen by the code that they reach: atheris keeps inputs that reach new lines and damages those again.

``python -m fuzz --coverage --target gguf`` (pip install atheris); for targets whose inputs are files. Inputs that reach
new code are kept in build/fuzz/corpus, one that ends in a finding in build/fuzz/TARGET-crash-*.
"""

import contextlib
import json
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path("build") / "fuzz"
_LENGTHS = struct.Struct("<HI")


def run_guided(name: str, seconds: float) -> int:
    """Run atheris in a process of its own; 1 where it found something. SystemExit where it is not installed."""
    if subprocess.run([sys.executable, "-c", "import atheris"], stderr=subprocess.DEVNULL).returncode:
        raise SystemExit("--coverage needs atheris: pip install atheris")
    (FOLDER / "corpus" / name).mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={int(seconds)}", f"-artifact_prefix={FOLDER}/{name}-", "-rss_limit_mb=4096"]
    options += ["-timeout=60", "-max_len=1048576", "-print_final_stats=1", str(FOLDER / "corpus" / name)]
    return int(subprocess.run([sys.executable, "-m", "fuzz.coverage", name, *options]).returncode != 0)


def encode(files: dict[str, bytes]) -> bytes:
    """Files as one run of bytes: for each the lengths of its name and content, and both."""
    named = [(name.encode(), content) for name, content in files.items()]
    return b"".join(_LENGTHS.pack(len(name), len(content)) + name + content for name, content in named)


def decode(data: bytes) -> dict[str, bytes]:
    """The reverse; empty where ``data`` is nothing that ``encode`` gives."""
    files, at = {}, 0
    with contextlib.suppress(struct.error, UnicodeDecodeError):
        while at < len(data):
            name, content = _LENGTHS.unpack_from(data, at)
            at += _LENGTHS.size
            key = data[at : at + name].decode()
            if not key or Path(key).name != key or "\0" in key:
                break
            files[key] = data[at + name : at + name + content]
            at += name + content
    return files


def damage_again(rng: random.Random, target: Any, data: bytes) -> bytes:
    """A new input, or one more damage to an input that reached something new."""
    from fuzz.mutate import damage_bytes, json_text
    from fuzz.safetensors_bytes import damage

    files = decode(data)
    if not files or rng.random() < 0.3:
        return encode(target.case(rng))
    name = rng.choice(list(files))
    content = files[name]
    try:
        if name.endswith(".safetensors"):
            content = damage(rng, content)
        elif name.endswith(".json"):
            content = json_text(rng, json.loads(content)).encode("utf-8", "replace")
        else:
            content = damage_bytes(rng, content)
    except Exception:  # it is too damaged already to be taken apart
        content = damage_bytes(rng, content)
    return encode({**files, name: content})


def main(name: str, options: list[str]) -> None:
    import tempfile

    import atheris

    with atheris.instrument_imports(include=["hqqtensor"]):
        from fuzz.targets import TARGETS
    from fuzz.child import write_files

    target = TARGETS[name]
    if not isinstance(target.case(random.Random(0)), dict):
        raise SystemExit(f"{name}: its inputs are no files, which --coverage needs")

    def read(data: bytes) -> None:
        files = decode(data)
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(*target.refusals):
            write_files(files, Path(folder))
            if required <= files.keys() <= known:
                target.run(files, Path(folder))

    def mutate(data: bytes, size: int, seed: int) -> bytes:
        return damage_again(random.Random(seed), target, data)[:size]

    names = [set(target.case(random.Random(number))) for number in range(100)]
    required, known = set.intersection(*names), set.union(*names)
    atheris.Setup([sys.argv[0], *options], read, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
