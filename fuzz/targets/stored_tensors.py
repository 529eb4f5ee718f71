"""Weights made from parts: ``__tensor_unflatten__``, ``load_state_dict``, and ``torch.load`` with ``weights_only``."""

import io
import random
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fuzz.mutate import NUMBERS, VALUES, WORDS, damage_bytes
from fuzz.target import ROOT, Files, Target, Wrong, check_usable
from fuzz.wrong_calls import DTYPES, wrong_tensor
from hqqtensor import HqqConfig, HQQTensor, quantize_

STATE = "state.pt"
Parts = tuple[dict[str, Any], dict[str, Any]]


@cache
def _weights() -> list[HQQTensor]:
    torch.manual_seed(0)
    meta = {"quant_scale": True, "quant_zero": True}
    configs = [
        HqqConfig(4, 16), HqqConfig(3, 16, axis=0), HqqConfig(4, 8, **meta, meta_nbits=4),
        HqqConfig(8, 8, axis=0, **meta),
        HqqConfig(4, 32, format="nf4"), HqqConfig(8, 32, format="fp8"), HqqConfig(6, 32, format="fp6"),
        HqqConfig(4, 32, format="codebook", codebook="row"), HqqConfig(2, 32, format="codebook"),
        HqqConfig(4, 32, rotation=True), HqqConfig(4, 16, solver="column_scaled"), HqqConfig(4, 16, view_as_float=True),
    ]  # fmt: skip
    out = [HQQTensor.from_hp(torch.randn(24, 64), config) for config in configs]
    out += [HQQTensor.from_hp(torch.randn(2, 16, 32), HqqConfig(5, 8)), out[0].t()]
    return [*out, HQQTensor.from_hp(torch.randn(8, 3, 2, 2), HqqConfig(4, 12), row_dims=3)]


def _parts(rng: random.Random, weight: HQQTensor) -> Parts:
    names, attributes = weight.__tensor_flatten__()
    tensors: dict[str, Any] = {name: getattr(weight, name) for name in names}
    for _ in range(rng.choice([1, 1, 2, 3])):
        if rng.random() < 0.5:
            key = rng.choice([*tensors, "zero_point", "act_pre_scale"])
            tensors[key] = _other_tensor(rng, tensors.get(key))
        else:
            key = rng.choice([*attributes, "shape"])
            attributes[key] = _other_attribute(rng, attributes[key])
    return tensors, attributes


def _other_tensor(rng: random.Random, value: Any) -> Any:
    choice = rng.random()
    if choice < 0.15:
        return rng.choice([None, 5, "x", torch.ones(3), rng.choice(_weights())])
    if isinstance(value, HQQTensor):
        tensors, attributes = _parts(rng, value)
        try:
            return HQQTensor.__tensor_unflatten__(tensors, attributes, None, None)
        except (ValueError, TypeError):
            return value.dequantize()
    if isinstance(value, Tensor):
        return value if value.numel() > 2**22 else wrong_tensor(rng, value)  # to join two of those takes terabytes
    return rng.choice([None, torch.ones(64), torch.ones(24, 1)])


def _other_attribute(rng: random.Random, value: Any) -> Any:
    if isinstance(value, (tuple, torch.Size)) and rng.random() < 0.8:
        shape = list(value)
        at = rng.randrange(len(shape))
        changes = [
            [*shape[:at], rng.choice([*NUMBERS, shape[at] + 1, shape[at] * 2]), *shape[at + 1 :]],
            shape[::-1], shape[1:], [1, *shape], [*shape, 1], [float(extent) for extent in shape],
        ]  # fmt: skip
        return rng.choice([tuple, list])(rng.choice(changes))
    if isinstance(value, torch.dtype) and rng.random() < 0.8:
        return rng.choice([*DTYPES, torch.bfloat16])
    if isinstance(value, int) and rng.random() < 0.8:
        return rng.choice([*NUMBERS, value + 1, value * 2, value // 2])
    if isinstance(value, str) and rng.random() < 0.8:
        return rng.choice(WORDS)
    return rng.choice([*VALUES, *DTYPES])


def _run_unflatten(parts: Parts, folder: Path) -> None:
    tensors, attributes = parts
    weight = HQQTensor.__tensor_unflatten__(tensors, attributes, None, None)
    if any(isinstance(t, Tensor) and t.is_meta for t in tensors.values()):
        return
    check_usable("weight", weight)
    repr(weight)


def _state(rng: random.Random) -> tuple[int, dict[str, Any], dict[str, bool]]:
    seed = rng.randrange(16)
    state: dict[str, Any] = dict(_model(seed).state_dict())
    for _ in range(rng.choice([1, 1, 2])):
        key = rng.choice(list(state) or ["x"])
        choice, value = rng.random(), state.get(key)
        if choice < 0.1:
            state.pop(key, None)
        elif choice < 0.2:
            state[rng.choice(["x", "0", "0.weight.qdata", key + "."])] = value
        elif choice < 0.5 and isinstance(value, HQQTensor):
            state[key] = rng.choice([value.dequantize(), *_weights()])
        elif choice < 0.7 and isinstance(value, HQQTensor):
            state[key] = _other_tensor(rng, value)
        elif isinstance(value, Tensor) and not isinstance(value, HQQTensor) and value.numel() < 2**22:
            state[key] = wrong_tensor(rng, value)
        else:
            state[key] = rng.choice(VALUES)
    return seed, state, {"strict": rng.random() < 0.5, "assign": rng.random() < 0.5}


@cache
def _quantized(seed: int) -> list[tuple[HQQTensor, Tensor]]:
    """Weight and bias of each layer of a model; to quantize them anew takes longer than to load."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 24), nn.Linear(24, 3))
    quantize_(model, HqqConfig(*[(4, 16), (3, 8), (8, 24), (4, 8)][seed % 4]))
    return [(part.weight.detach(), part.bias.detach()) for part in model]


def _model(seed: int) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    for part, (weight, bias) in zip(model, _quantized(seed), strict=True):
        part.out_features, part.in_features = weight.shape
        part.weight, part.bias = nn.Parameter(weight.clone(), requires_grad=False), nn.Parameter(bias.clone())
    return model


def _run_state(case: tuple[int, dict[str, Any], dict[str, bool]], folder: Path) -> None:
    seed, state, options = case
    model = _model(seed)
    model.load_state_dict(state, **options)
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            return
        check_usable(name, tensor)
        given = state.get(name)
        if isinstance(given, Tensor) and not given.is_meta:
            want, got = (t.dequantize() if isinstance(t, HQQTensor) else t for t in (given, tensor))
            # Scales in 8 or 4 bits are rounded where they are copied into plain ones of the model.
            nested = [t.nested for t in (given, tensor) if isinstance(t, HQQTensor)]
            error = float(want.abs().max()) / 64 if len(set(nested)) > 1 else 0.0
            if got.shape != want.shape or not torch.allclose(got, want.to(got.dtype), 0, error, equal_nan=True):
                raise Wrong(f"{name}: loaded {tensor!r} from {given!r}, and their numbers differ")


@cache
def _pickle_seed() -> bytes:
    return (ROOT / "tests" / "assets" / "checkpoints" / "v1" / "torch_save" / STATE).read_bytes()


def _pickled(rng: random.Random) -> Files:
    if rng.random() < 0.2:
        return {STATE: damage_bytes(rng, _pickle_seed())}
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_pickle_seed())) as old, zipfile.ZipFile(out, "w") as new:
        entries = {info.filename: old.read(info) for info in old.infolist()}
        target = next(n for n in entries if n.endswith("data.pkl")) if rng.random() < 0.8 else rng.choice(list(entries))
        for name, content in entries.items():
            new.writestr(name, damage_bytes(rng, content) if name == target else content)
    return {STATE: out.getvalue()}


class Unreadable(Exception):
    """torch.load refused the file; what it raises for a damaged pickle is its own choice."""


def _run_pickled(files: Files, folder: Path) -> None:
    try:
        state = torch.load(folder / STATE, weights_only=True, map_location="cpu")
    except MemoryError:
        raise
    except Exception as error:
        raise Unreadable from error
    for name, tensor in state.items() if isinstance(state, dict) else ():
        if isinstance(tensor, HQQTensor) and not tensor.is_meta:
            check_usable(str(name), tensor)


TARGETS = (
    Target(
        "unflatten", lambda rng: _parts(rng, rng.choice(_weights())), _run_unflatten, (ValueError, TypeError, KeyError)
    ),
    Target("load-state-dict", _state, _run_state, (RuntimeError, ValueError, TypeError)),
    Target("pickle", _pickled, _run_pickled, (Unreadable,)),
)
