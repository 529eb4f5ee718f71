"""``python -m fuzz.reader``: the C reader of tests/readers on damaged checkpoints, under ASan and UBSan.

The program reads thousands of variants a second of each checkpoint that it is sent, in memory. What it takes, the numpy
reader of docs/examples must read as the same numbers, or hqqtensor, where it is taken there. The exit code is 1 where
something was found: the files are then in build/fuzz/reader/NUMBER.
"""

import argparse
import io
import json
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from fuzz import tally
from fuzz.child import write_files
from fuzz.run import IN_MEMORY
from fuzz.safetensors_bytes import damage
from fuzz.target import ROOT, Wrong
from fuzz.targets.checkpoints import INDEX, numpy_reader, vectors
from hqqtensor import HQQTensor, backend
from hqqtensor.serialization.layout import CheckpointError
from hqqtensor.serialization.load import read_checkpoint

SOURCE = ROOT / "tests" / "readers" / "read_c" / "fuzz.c"
FOLDER = Path("build") / "fuzz" / "reader"
FLAGS = ["-std=gnu11", "-O1", "-g", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=2:malloc_context_size=2"}
MOST_BYTES = 1 << 20
"""Of a file that the program takes (mutate.h says the same); the size of a damaged one may be beyond it."""
VARIANTS = 256
READ_BY_US = 64
"""One taken variant of so many is read by hqqtensor too, and all that the numpy reader does not take."""


@dataclass
class Result:
    """taken: variants that the program took, all of which were held against another reader."""

    inputs: int = 0
    taken: int = 0
    findings: dict[int, str] = field(default_factory=dict)


class Died(Exception):
    """The program ended within a variant."""


class Program:
    """A running reader. ``folder``: for what it was built to, and the variant that it reads."""

    def __init__(self, folder: Path) -> None:
        program = folder / "fuzz"
        if not program.exists():
            subprocess.run(["gcc", *FLAGS, *SANITIZERS, str(SOURCE), "-o", str(program)], check=True)
        self.current, self.errors = folder / "current", folder / "errors"
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(
                [program, self.current], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=ENVIRONMENT
            )

    def variants(self, files: list[bytes], count: int, first: int) -> Iterator[tuple[int, list[bytes], bytes] | int]:
        """(number, files, dense file) of each variant that is taken; at last how many were refused."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        parts = [part for file in files for part in (struct.pack("<Q", len(file)), file)]
        try:
            stdin.write(b"".join([struct.pack("<3Q", len(files), count, first), *parts]))
            stdin.flush()
        except BrokenPipeError:
            raise self._death() from None
        while number := self._number(stdout):
            content = [self._bytes(stdout) for _ in range(len(files) + 1)]
            yield number - 1, content[:-1], content[-1]
        yield self._number(stdout)

    def _read(self, stdout: IO[bytes], count: int) -> bytes:
        data = stdout.read(count)
        if len(data) < count:
            raise self._death()
        return data

    def _number(self, stdout: IO[bytes]) -> int:
        (number,) = struct.unpack("<Q", self._read(stdout, 8))
        return int(number)

    def _bytes(self, stdout: IO[bytes]) -> bytes:
        return self._read(stdout, self._number(stdout))

    def _death(self) -> Died:
        code = self.process.wait()
        return Died(f"{self.errors.read_text(errors='replace')[-4000:]}\nthe program ended with {code}")

    def died_of(self) -> list[bytes]:
        """The files of the variant that is read now."""
        data = io.BytesIO(self.current.read_bytes())
        (count, _, _) = struct.unpack("<3Q", data.read(24))
        return [data.read(struct.unpack("<Q", data.read(8))[0]) for _ in range(count)]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def case(number: int) -> tuple[list[str], list[bytes]]:
    """Names and contents of the files of a checkpoint, the same for the same number; most are damaged a little."""
    rng = random.Random(f"reader {number}")
    files = {name: data for name, data in rng.choice(vectors()).items() if name != INDEX}
    if rng.random() < 0.8:
        name = rng.choice(list(files))
        damaged = damage(rng, files[name])
        files[name] = damaged if len(damaged) <= MOST_BYTES else damaged[: rng.randrange(MOST_BYTES)]
    return list(files), list(files.values())


class InMemory(io.BytesIO):
    """A file, as far as the numpy reader looks at its path."""

    read_bytes = io.BytesIO.getvalue


def dense_arrays(dense: bytes) -> dict[str, Any]:
    arrays, _ = numpy_reader().read_safetensors(InMemory(dense))
    return arrays


def check_with_numpy(files: list[bytes], dense: dict[str, Any]) -> bool:
    """Wrong where the numpy reader has other numbers for a weight; False where it does not take the files.

    It looks at dense tensors too, and at all of a header's text.
    """
    reader = numpy_reader()
    arrays: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for number, data in enumerate(files):
        try:
            some, of_file = reader.read_safetensors(InMemory(data))
        except Exception:  # it trusts its files, and a dense tensor may be anything
            return False
        arrays = some | arrays
        metadata = of_file if number == 0 else metadata
    for name, ours in dense.items():
        if not ours.size:
            continue
        module, _, leaf = name.rpartition(".")
        with np.errstate(all="ignore"):
            theirs = reader.dequantize(f"{module}{'.' if module else ''}_{leaf}_", json.loads(metadata[name]), arrays)
        theirs = theirs.astype(ours.dtype)
        if ours.shape != theirs.shape or not np.array_equal(ours, theirs, equal_nan=True):
            raise Wrong(f"{name}: the numpy reader reads other numbers: {metadata[name][:500]}")
    return True


def check_with_ours(names: list[str], files: list[bytes], dense: dict[str, Any], folder: Path) -> None:
    """Wrong where hqqtensor takes the checkpoint and has other weights, or other numbers. It refuses more."""
    for old in folder.iterdir():
        old.unlink()
    write_files(dict(zip(names, files, strict=True)), folder)
    try:
        state = read_checkpoint(folder)[0]
    except CheckpointError:  # the C reader does not look at dense tensors, nor at aliases
        return
    weights = {name: t for name, t in state.items() if isinstance(t, HQQTensor)}
    if weights.keys() != dense.keys():
        raise Wrong(f"hqqtensor finds the weights {sorted(weights)}, the C reader {sorted(dense)}")
    for name, tensor in weights.items():
        with backend("dequantize"):
            values = tensor.detach().dequantize()
        ours = torch.from_numpy(np.array(dense[name])).to(values.dtype)
        if values.shape != ours.shape or not torch.equal(values.nan_to_num(), ours.nan_to_num()):
            raise Wrong(f"{name}: hqqtensor reads other numbers")


def run(first: int, seconds: float, count: int = 2**62) -> Result:
    """Variants of the checkpoints ``first``, ``first + 1``, ... until one of the two is used up."""
    result = Result()
    with tempfile.TemporaryDirectory(prefix="hqqtensor-reader-", dir=IN_MEMORY) as folder:
        place = Path(folder, "case")
        place.mkdir()
        program = Program(Path(folder))
        end = time.monotonic() + seconds
        for number in range(first, first + count):
            if time.monotonic() > end:
                break
            names, files = case(number)
            last = files
            try:
                for answer in program.variants(files, VARIANTS, number * VARIANTS):
                    if isinstance(answer, int):
                        result.inputs += answer
                        continue
                    variant, last, dense = answer
                    result.inputs, result.taken = result.inputs + 1, result.taken + 1
                    arrays = dense_arrays(dense)
                    if not check_with_numpy(last, arrays) or variant % READ_BY_US == 0:
                        check_with_ours(names, last, arrays, place)
            except Exception as error:
                text = str(error) if isinstance(error, (Died, Wrong)) else repr(error)
                result.findings[number] = text
                save(number, names, program.died_of() if isinstance(error, Died) else last, text)
                program.close()
                program = Program(Path(folder))
        program.close()
    return result


def save(number: int, names: list[str], files: list[bytes], text: str) -> None:
    place = FOLDER / str(number)
    place.mkdir(parents=True, exist_ok=True)
    write_files(dict(zip(names, files, strict=True)), place)
    (place / "what-happened.txt").write_text(text, encoding="utf-8")
    lines = text.strip().splitlines()
    short = next((line for line in lines if line.startswith("SUMMARY")), lines[-1])
    print(f"{place}: {short[:300]}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz.reader", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--first", type=int, help="number of the first checkpoint; default: others in every run")
    parser.add_argument("--tally", type=Path, metavar="FILE", help="add the counts to those in this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    first = time.time_ns() % 2**40 if args.first is None else args.first
    result = run(first, args.seconds)
    print(f"reader: {result.inputs} inputs from {first}, {result.taken} taken, {len(result.findings)} findings")
    if args.tally:
        tally.add(args.tally, "reader", result.inputs, result.taken, len(result.findings))
    return int(bool(result.findings))


if __name__ == "__main__":
    sys.exit(main())
