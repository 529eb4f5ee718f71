"""Files of sensitivities: what is wrong with one is named, and nothing of it is used."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hqqtensor import HqqConfig
from hqqtensor.search import Sensitivity, choose_config, measure_sensitivity

CANDIDATES = ({"nbits": 2, "group_size": 32}, {"nbits": 4, "group_size": 128})


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128))


@pytest.fixture
def data(model: nn.Module, tmp_path: Path) -> dict[str, Any]:
    """What a whole file holds; groups of 128 do not fit the second layer."""
    file = tmp_path / "whole.json"
    measure_sensitivity(model, candidates=CANDIDATES, file=file)
    return json.loads(file.read_text())


def layer(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["layers"]["0"].update(changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.pop("version"), "version must be 1, got None"),
        (lambda d: d.update(method="guess"), "method must be one of ['weights', 'outputs'], got 'guess'"),
        (lambda d: d.update(candidates={}), "candidates must be a list"),
        (lambda d: d.update(candidates=[]), "candidates must be a list"),
        (lambda d: d.update(layers=[]), "layers must be an object"),
        (lambda d: d["candidates"].__setitem__(1, 4), "candidates[1] must be an object of settings, got 4"),
        (lambda d: d["candidates"][1].update(bits=3), "candidates[1]: unknown HqqConfig options ['bits']"),
        (lambda d: d["candidates"][0].update(nbits=9), "candidates[0]: nbits must be"),
        (lambda d: d["candidates"][0].update(format=[]), "candidates[0]: "),
        (lambda d: d["layers"].update({"0": None}), "layers['0'] must be an object, got None"),
        (layer(key=3), "layers['0']: key must be a text, got 3"),
        (layer(bytes="many"), "layers['0']: bytes must be a list of 2 numbers"),
        (layer(loss=[0.5]), "layers['0']: loss must be a list of 2 numbers"),
        (layer(bytes=[10, -1]), "layers['0']: bytes[1] must be a positive whole number, got -1"),
        (layer(bytes=[10, 1.5]), "layers['0']: bytes[1] must be a positive whole number, got 1.5"),
        (layer(bytes=[True, 1]), "layers['0']: bytes[0] must be a positive whole number, got True"),
        (layer(bytes=[10, None]), "layers['0']: bytes[1] must be a positive whole number, got None"),
        (layer(loss=[0.5, float("nan")]), "layers['0']: loss[1] must be a finite number from 0, got nan"),
        (layer(loss=[float("inf"), 1]), "layers['0']: loss[0] must be a finite number from 0, got inf"),
        (layer(loss=[0.5, -1.0]), "layers['0']: loss[1] must be a finite number from 0, got -1.0"),
        (layer(loss=["a", 1.0]), "layers['0']: loss[0] must be a finite number from 0, got 'a'"),
        (layer(loss=[10**400, 1.0]), "layers['0']: loss[0] must be a finite number from 0"),
        (layer(bytes=[None, None], loss=[None, None]), "layers['0']: no candidate fits the layer"),
    ],
)
def test_a_wrong_entry_is_named(damage, message: str, data: dict[str, Any], model: nn.Module, tmp_path: Path) -> None:
    file, whole = tmp_path / "s.json", copy.deepcopy(data)
    damage(data)
    file.write_text(json.dumps(data))
    for read in (Sensitivity.load, lambda file: measure_sensitivity(model, candidates=CANDIDATES, file=file)):
        with pytest.raises(ValueError) as error:
            read(file)
        assert str(error.value).startswith(f"{file} is no sensitivity file of hqqtensor: ")
        assert message in str(error.value)
        assert json.loads(json.dumps(data)) != whole and file.read_text() == json.dumps(data)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, None],
    ids=["empty", "cut", "latin", "deep", "directory"],
)
def test_a_file_that_is_no_json_is_named(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"s\.json is no sensitivity file"):
        Sensitivity.load(file)


def test_a_file_of_another_model_is_refused_and_left_alone(data: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "whole.json"
    other = nn.Sequential(nn.Linear(128, 64))
    with pytest.raises(ValueError, match=r"whole\.json is of another model: '2' \(1 such\)"):
        measure_sensitivity(other, candidates=CANDIDATES, file=file)
    assert json.loads(file.read_text()) == data


def test_layers_that_are_skipped_now_may_be_in_the_file(data: dict[str, Any], model: nn.Module, tmp_path: Path) -> None:
    config = HqqConfig(skip_modules=["2"])
    again = measure_sensitivity(model, config, candidates=CANDIDATES, file=tmp_path / "whole.json")
    assert list(again.layers) == ["0"] and again.layers["0"]["loss"] == data["layers"]["0"]["loss"]


def test_a_run_with_other_candidates_that_is_stopped_leaves_a_file_that_can_be_read(
    data: dict[str, Any], model: nn.Module, tmp_path: Path
) -> None:
    def stop(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    file = tmp_path / "whole.json"
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(model, candidates=CANDIDATES[:1], file=file, progress=stop)
    assert list(Sensitivity.load(file).layers) == ["0"]
    found = measure_sensitivity(model, candidates=CANDIDATES[:1], file=file)
    assert choose_config(model, found, target_bpw=8).counts == {"2-bit g32": 2}
