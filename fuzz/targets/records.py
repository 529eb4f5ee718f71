"""Files of JSON and of plain values: sensitivities, settings, an interrupted calibration, the autotuner's cache."""

import json
import random
import tempfile
import warnings
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fuzz.mutate import damage_bytes, json_text
from fuzz.target import Files, Target, Wrong, check_usable
from hqqtensor import HqqConfig, HQQTensor
from hqqtensor.calibration.resume import ResumeFolder
from hqqtensor.run_record import ResumeError
from hqqtensor.search import Sensitivity

FILE = "file.json"
RUN = ({"nbits": 4, "group_size": 16}, ["0.weight"], "a model")


def _sensitivity(rng: random.Random) -> Files:
    candidates = [{"nbits": 4, "group_size": 64}, {"nbits": 3, "group_size": 32, "format": "int"}]
    layers = {
        "0": {"key": "abc", "bytes": [100, 80], "loss": [0.25, 1.5]},
        "1": {"key": "", "bytes": [50, None], "loss": [0.0, None]},
    }
    data = {"version": 1, "method": "weights", "candidates": candidates, "layers": layers}
    return {FILE: json_text(rng, data).encode("utf-8", "surrogatepass")}


def _run_sensitivity(files: Files, folder: Path) -> None:
    read = Sensitivity.load(folder / FILE)
    for candidate in read.candidates:
        HqqConfig.from_dict(candidate)
    read.save(folder / "again.json")
    if Sensitivity.load(folder / "again.json") != read:
        raise Wrong("saved again, it reads as something else")


def _config(rng: random.Random) -> Files:
    whole = HqqConfig(3, 32, axis=0, dynamic_config={"0": {"nbits": 8}, "re:.*mlp": {}}).to_dict()
    return {FILE: json_text(rng, whole).encode("utf-8", "surrogatepass")}


class NoJson(ValueError):
    """The text is no JSON object: not what the target is about."""


def _run_config(files: Files, folder: Path) -> None:
    try:
        values = json.loads(files[FILE])
    except (ValueError, RecursionError):
        raise NoJson from None
    if not isinstance(values, dict):
        raise NoJson
    config = HqqConfig.from_dict(values)
    if HqqConfig.from_dict(json.loads(json.dumps(config.to_dict()))) != config:
        raise Wrong(f"written and read again, {config!r} is another")


@cache
def _run_files() -> Files:
    torch.manual_seed(0)
    weight = HQQTensor.from_hp(torch.randn(8, 32), HqqConfig(4, 16))
    with tempfile.TemporaryDirectory() as path:
        run = _folder(Path(path))
        run.open("mode", "text")
        run.save("batches", [torch.arange(4)])
        run.finish("step", {"0.weight": weight}, [torch.randn(2, 8)])
        return {file.name: file.read_bytes() for file in Path(path).iterdir()}


def _folder(path: Path) -> ResumeFolder:
    run = ResumeFolder(path)
    settings, names, identity = RUN
    run.describe(torch.nn.Linear(1, 1), settings, names, identity)
    return run


def _resume(rng: random.Random) -> Files:
    files = dict(_run_files())
    name = rng.choice(sorted(files))
    if name.endswith(".json") and rng.random() < 0.7:
        files[name] = json_text(rng, json.loads(files[name])).encode("utf-8", "surrogatepass")
    else:
        files[name] = damage_bytes(rng, files[name])
    return files


def _run_resume(files: Files, folder: Path) -> None:
    run = _folder(folder)
    run.open("mode", "text")
    run.load("batches", torch.device("cpu"))
    if run.steps:
        run.streams(torch.device("cpu"), mmap=False)
    for weights in run.steps.values():
        for name, tensor in weights.items():
            check_usable(name, tensor)


def _autotune(rng: random.Random) -> Files:
    from hqqtensor.kernels.triton.config import shipped

    tiles = shipped("sm_90")
    table: dict[str, Any] = {f"torch 2 triton 3 file 4 rows {rows}": asdict(tile) for rows, tile in tiles.items()}
    return {FILE: json_text(rng, table).encode("utf-8", "surrogatepass")}


def _run_autotune(files: Files, folder: Path) -> None:
    from hqqtensor.kernels.triton import autotune
    from hqqtensor.kernels.triton.config import Tile

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiles = autotune.read(folder / FILE)
    for tile in tiles.values():
        if not isinstance(tile, Tile) or any(type(value) is not int for value in asdict(tile).values()):
            raise Wrong(f"a tile that is none: {tile!r}")


TARGETS = (
    Target("sensitivity", _sensitivity, _run_sensitivity, (ValueError,)),
    Target("config", _config, _run_config, (ValueError, TypeError)),
    Target("resume", _resume, _run_resume, (ResumeError,)),
    Target("autotune", _autotune, _run_autotune, ()),
)
