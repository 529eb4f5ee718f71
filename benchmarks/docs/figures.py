"""The measured figures in docs/data, and how a benchmark's result gets there.

Each file holds ``runs``; a run has an id, the machine, the date, versions, and rows in the words of its benchmark.
The ``kind`` of a row is "ours", "peer" (another library), "other" (one that is not compared) or "dense".
``quality.json`` has rows alone: it does not depend on the machine.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[2] / "docs" / "data"
Run = dict[str, Any]
Row = dict[str, Any]


def runs(kind: str) -> dict[str, Run]:
    """The runs of docs/data/``kind``.json by id."""
    return {run["id"]: run for run in json.loads((DATA / f"{kind}.json").read_text())["runs"]}


def quality() -> dict[str, Any]:
    """docs/data/quality.json: date, versions and rows."""
    return json.loads((DATA / "quality.json").read_text())


def answers() -> dict[str, Any]:
    """docs/data/answers.json: date, questions, and for each model its size, agreement and answers."""
    return json.loads((DATA / "answers.json").read_text())


def row(run: Run, name: str) -> Row:
    """The row called ``name``; KeyError lists those of the run."""
    for one in run["rows"]:
        if one["name"] == name:
            return one
    raise KeyError(f"run {run['id']!r} has no row {name!r}; it has {[one['name'] for one in run['rows']]}")


def ratios(run: Run, over: str, under: str) -> list[float | None]:
    """Milliseconds of one row over those of another, for each number of tokens."""
    pairs = zip(row(run, over)["ms"], row(run, under)["ms"], strict=True)
    return [None if a is None or b is None else a / b for a, b in pairs]


def fastest_peer(run: Run, column: int, exact: bool = False) -> Row | None:
    """The fastest other library at one number of tokens; ``exact``: of those that do not round activations to int8."""
    peers = [
        one
        for one in run["rows"]
        if one["kind"] == "peer" and one["ms"][column] is not None and not (exact and one["computes in"] == "int8")
    ]
    return min(peers, key=lambda one: one["ms"][column], default=None)


def digest(data: Any) -> str:
    """A short hash of what a plot was drawn from."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def record(kind: str, result: dict[str, Any], id: str, machine: str) -> None:
    """Put a benchmark's JSON (``--json``) into docs/data/``kind``.json as run ``id``, in place of one of that id."""
    about = result["machine"]
    run: Run = {"id": id, "machine": machine, "set": about["HQQTENSOR_CPU"] or "best of the machine"}
    run |= {"date": about["date"], "versions": {"torch": about["torch"]}, "note": ""}
    run |= _READ[kind](result["results"])
    kept = {**runs(kind), id: run}
    (DATA / f"{kind}.json").write_text(as_text(list(kept.values())))


def from_linear(results: dict[str, Any]) -> Run:
    shape = results["cells"][0]["shape"]
    cells = [cell for cell in results["cells"] if cell["shape"] == shape]
    names = [one["name"] for one in cells[0]["rows"]]
    by_cell = [{one["name"]: one for one in cell["rows"]} for cell in cells]
    rows = [
        {
            **{key: by_cell[0][name][key] for key in ("name", "kind", "computes in")},
            "ms": [c[name]["ms"] for c in by_cell],
        }
        for name in names
    ]
    return {
        "shape": shape,
        "tokens": [cell["M"] for cell in cells],
        "read_gb_s": [cell["read GB/s"] for cell in cells],
        "rows": rows,
    }


def from_generate(results: list[dict[str, Any]]) -> Run:
    kinds = {"llama.cpp": "peer"}
    return {"rows": [{**one, "kind": kinds.get(one["kind"], one["kind"]), "MB": round(one["MB"])} for one in results]}


def from_quantize(results: dict[str, Any]) -> Run:
    first = results["rows"][0]["shape"]
    rows = []
    for one in (one for one in results["rows"] if one["shape"] == first):
        solver, _, name = one["solver"].removeprefix("plain ").partition(" ")
        if one["solver"] == "hqq library":
            solver, name = "hqq library", ""
        solver = f"plain {solver}" if one["solver"].startswith("plain ") else solver
        rows.append(
            {"solver": solver, "format": name or "int", **{k: one[k] for k in ("bits", "dtype", "M weights/s")}}
        )
    return {"shape": first, "rows": rows}


_READ = {
    "linear": from_linear,
    "generate": from_generate,
    "quantize": from_quantize,
    "speed_quality": from_generate,
}
KINDS = tuple(_READ)


def as_text(all_runs: list[Run]) -> str:
    """JSON with one row a line, so that changes of one figure show as such."""
    parts = []
    for run in all_runs:
        head = json.dumps({key: value for key, value in run.items() if key != "rows"})
        rows = ",\n".join(f"  {json.dumps(one)}" for one in run["rows"])
        parts.append(f' {head[:-1]}, "rows": [\n{rows}\n ]}}')
    return '{"runs": [\n' + ",\n".join(parts) + "\n]}\n"
