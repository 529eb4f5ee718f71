"""``python -m benchmarks.two_builds --before DIR``: the rows of benchmarks.cpu_linear, two builds in one run.

Each build runs in a process of its own, started in its own checkout with the extension built in place. Both quantize
the same weights and then take turns, a few milliseconds each, the order changed from round to round. A pair of
processes gives for each row the median of the ratios of neighbouring turns.

A process keeps its weights where its memory happens to lie, which alone changes a row by up to 7 %. So there are
several pairs, each of new processes; the table shows the median of their ratios, the smallest and the largest, and
whether the two builds gave the same bits.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.contender import CACHE
from benchmarks.timing import SETTLE, TURN  # a worker's are those of its own checkout


def worker() -> None:
    """Answer one line of JSON on stdout for each on stdin: "weights" makes the contenders, "turn" times one of them."""
    import torch

    from benchmarks import contender, ours
    from benchmarks.cpu_linear import variants

    answers, sys.stdout = sys.stdout, sys.stderr
    runs: dict[str, Any] = {}
    inputs: dict[int, torch.Tensor] = {}
    clock = time.perf_counter
    bound: dict[tuple[str, int], Any] = {}
    with torch.no_grad():
        for line in sys.stdin:
            ask = json.loads(line)
            if "weights" in ask:
                N, K = ask["weights"]
                contender.CACHE = ask["copies"]
                w = torch.randn(N, K, generator=torch.manual_seed(0)) * 0.02
                x = torch.randn(max(ask["tokens"]), K, generator=torch.manual_seed(1))
                inputs = {M: x[:M].contiguous() for M in ask["tokens"]}
                runs, bound = {}, {}
                for nbits, dtypes, options in variants(ask["bits"], ask["quick"]):
                    runs |= {c.name: c for c in ours.contenders(w, nbits, dtypes, **options)}
                answer: Any = list(runs)
            else:
                key = (ask["turn"], ask["M"])
                if key not in bound:
                    bound[key] = runs[key[0]].bind(inputs[key[1]])
                run, begin = bound[key], clock()
                y = run()
                while clock() - begin < SETTLE:
                    run()
                times: list[float] = []
                begin = clock()
                while len(times) < 3 or clock() - begin < TURN:
                    before = clock()
                    run()
                    times.append(clock() - before)
                answer = {"seconds": statistics.median(times)}
                if ask["hash"]:
                    answer["hash"] = hashlib.sha256(y.float().numpy().tobytes()).hexdigest()
            print(json.dumps(answer), file=answers, flush=True)


class Build:
    """A process that runs ``worker`` in a checkout; it ends with the ``with`` block."""

    def __init__(self, directory: Path) -> None:
        env = {**os.environ, "PYTHONPATH": str(directory)}
        command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
        self.process = subprocess.Popen(
            command, cwd=directory, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Build":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, **question: Any) -> Any:
        """The worker's answer; RuntimeError where it has ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the worker of {self.process.args} ended with {self.process.wait()}")
        return json.loads(answer)


Row = tuple[str, int, str]
"""Shape, tokens and name of the contender."""


def compare(before: Build, after: Build, name: str, M: int, rounds: int) -> dict[str, Any]:
    """Medians of both builds' turns, of their ratios, and whether the outputs are equal."""
    ratios, seconds, same = [], {before: [], after: []}, True
    for i in range(rounds):
        order = (before, after) if i % 2 else (after, before)
        answers = {build: build.ask(turn=name, M=M, hash=i == 0) for build in order}
        if i == 0:
            same = answers[before]["hash"] == answers[after]["hash"]
        for build, answer in answers.items():
            seconds[build].append(answer["seconds"])
        ratios.append(answers[after]["seconds"] / answers[before]["seconds"])
    ms = [1e3 * statistics.median(seconds[build]) for build in (before, after)]
    return {"before ms": ms[0], "after ms": ms[1], "ratio": statistics.median(ratios), "same": same}


def compare_all(before: Build, after: Build, args: argparse.Namespace) -> dict[Row, dict[str, Any]]:
    """Every row that both builds have, by one pair of processes."""
    out = {}
    for shape in args.shapes:
        weights = {"weights": [int(n) for n in shape.split("x")], "copies": int(args.copies_mib * 2**20)}
        settings = {"tokens": args.tokens, "bits": args.bits, "quick": args.quick}
        names = [build.ask(**weights, **settings) for build in (before, after)]
        for M in args.tokens:
            for name in [n for n in names[1] if n in names[0]]:
                out[shape, M, name] = compare(before, after, name, M, args.rounds)
    return out


def summary(row: Row, pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """What all pairs of processes say of a row."""
    ratios = [pair["ratio"] for pair in pairs]
    shape, M, name = row
    return {
        "shape": shape,
        "M": M,
        "name": name,
        **{key: statistics.median(pair[key] for pair in pairs) for key in ("before ms", "after ms", "ratio")},
        "smallest": min(ratios),
        "largest": max(ratios),
        "same": all(pair["same"] for pair in pairs),
    }


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="DIR", help="checkout of the other build")
    parser.add_argument("--after", type=Path, default=Path(__file__).resolve().parents[1], metavar="DIR")
    parser.add_argument("--shapes", nargs="+", default=["11008x4096"], metavar="NxK")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 128], metavar="M")
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 7, 6, 5, 4, 3, 2, 1])
    parser.add_argument(
        "--copies-mib", type=float, default=CACHE / 2**20, metavar="MIB",
        help="memory that the copies of a weight exceed together, so that no cache holds the next one (default: "
        "%(default)g); 0: one copy, which the caches hold if it fits",
    )  # fmt: skip
    parser.add_argument("--pairs", type=int, default=5, metavar="P", help="pairs of processes, at least 1")
    parser.add_argument("--rounds", type=int, default=5, help="turns of a row in each process")
    parser.add_argument("--quick", action="store_true", help="fewer settings, as in benchmarks.cpu_linear")
    parser.add_argument("--limit", type=float, default=1.03, help="rows whose median is above it are named")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        worker()
        return []
    if args.before is None:
        parser.error("--before is needed")
    if args.pairs < 1 or args.rounds < 1:
        parser.error(f"--pairs and --rounds must be at least 1, got {args.pairs} and {args.rounds}")
    found: list[dict[Row, dict[str, Any]]] = []
    for pair in range(args.pairs):
        with Build(args.before.resolve()) as before, Build(args.after.resolve()) as after:
            found.append(compare_all(before, after, args))
        print(f"pair {pair + 1} of {args.pairs}", file=sys.stderr, flush=True)
    rows = [summary(row, [pair[row] for pair in found]) for row in found[0]]
    for row in rows:
        note = "" if row["same"] else "  other bits"
        note += "  SLOWER" if row["ratio"] > args.limit else ""
        ratios = f"{row['ratio']:.3f} ({row['smallest']:.3f} to {row['largest']:.3f})"
        times = f"{row['before ms']:9.3f} {row['after ms']:9.3f}  {ratios}"
        print(f"{row['shape']:>12} M={row['M']:<4} {row['name']:<34} {times}{note}")
    slower = sum(row["ratio"] > args.limit for row in rows)
    other = sum(not row["same"] for row in rows)
    median = statistics.median(row["ratio"] for row in rows)
    print(f"{len(rows)} rows: median ratio {median:.3f}, {slower} above {args.limit}, {other} with other bits")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
