"""How an HQQTensor is laid out in a safetensors file, and the check of what a file claims.

The weight ``a.b.weight`` becomes ``a.b._weight_qdata``, ``a.b._weight_scale`` and ``a.b._weight_zero_point`` (the
names that torchao's and transformers' loaders know); a quantized scale becomes ``a.b._weight_scale_qdata`` and so
on. The safetensors metadata has a JSON entry under ``a.b.weight`` with the attributes. Geometry is taken from the
entry and each stored tensor is held against it, never the other way round.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hqqtensor.config import ACTIVATIONS, CODEBOOKS, META_NBITS, SCALE_DTYPES
from hqqtensor.formats import get_format
from hqqtensor.packing import meta_bytes, row_bytes
from hqqtensor.tensor import HQQTensor
from hqqtensor.transforms import block_of

MAX_DIM = 2**40
_PLAIN_ATTRIBUTES = ("nbits", "group_size", "axis", "format", "transposed", "activation", "rotation")
_ATTRIBUTES = {*_PLAIN_ATTRIBUTES, "shape", "dtype", "view_as_float", "row_dims"}


class CheckpointError(ValueError):
    """A file that is missing, cut short, or does not hold what it claims."""


class InputError(CheckpointError):
    """Nothing is damaged: another path or another argument would do, and the message says which."""


def data_key(name: str, part: str) -> str:
    """Key of one data tensor of the parameter ``name``."""
    prefix, _, leaf = name.rpartition(".")
    return f"{prefix}{'.' if prefix else ''}_{leaf}_{part}"


def flatten(name: str, tensor: HQQTensor) -> tuple[dict[str, Tensor], str]:
    """The plain tensors of ``tensor`` by key, and its JSON entry."""
    tensors: dict[str, Tensor] = {}
    entry = _describe(tensor, lambda part, value: tensors.__setitem__(data_key(name, part), value), "")
    return tensors, json.dumps(entry)


def _describe(tensor: HQQTensor, put: Any, prefix: str) -> dict[str, Any]:
    data: dict[str, Any] = {n: getattr(tensor, n) for n in _PLAIN_ATTRIBUTES}
    data["shape"] = list(tensor.shape)
    data["dtype"] = str(tensor.dtype).removeprefix("torch.")
    if get_format(tensor.format).learned:
        data["codebook"] = tensor.codebook
    if tensor.row_dims > 1:
        data["row_dims"] = tensor.row_dims
    qdata = tensor.qdata
    data["view_as_float"] = None if qdata.dtype == torch.uint8 else str(qdata.dtype).removeprefix("torch.")
    put(prefix + "qdata", qdata if qdata.dtype == torch.uint8 else qdata.view(torch.uint8))
    names = ["qdata"]
    nested: dict[str, Any] = {}
    for part in ("scale", "zero_point", "act_pre_scale"):
        value = getattr(tensor, part)
        if value is None:
            continue
        names.append(part)
        if isinstance(value, HQQTensor):
            nested[part] = _describe(value, put, f"{prefix}{part}_")
        else:
            put(prefix + part, value)
    entry = {"_type": "HQQTensor", "_data": data, "_tensor_data_names": names}
    return {**entry, "_nested": nested} if nested else entry


def keys_of(name: str, entry: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Keys of the data tensors that ``entry`` names."""
    nested = entry.get("_nested", {})
    out: list[str] = []
    for part in entry["_tensor_data_names"]:
        if part in nested:
            out += keys_of(name, nested[part], f"{prefix}{part}_")
        else:
            out.append(data_key(name, prefix + part))
    return out


def parse_entry(name: str, text: str) -> dict[str, Any]:
    """The JSON entry of ``name``, checked; CheckpointError says what is wrong."""
    try:
        entry = json.loads(text)
    except ValueError:
        raise CheckpointError(f"{name}: its metadata is no JSON") from None
    _from_torchao(entry)
    _check_entry(name, entry, nested=False)
    return entry


def torchao_entry(tensor: HQQTensor) -> str:
    """The JSON entry that torchao's safetensors code writes and reads; it knows no quantized scales."""
    from torchao.prototype.safetensors.safetensors_utils import TensorSubclassAttributeJSONEncoder

    return json.dumps(tensor, cls=TensorSubclassAttributeJSONEncoder)


def _from_torchao(entry: Any) -> None:
    """Turn an entry that torchao wrote into ours, in place: its dtype is a dict, its names are in another order."""
    data = entry.get("_data") if isinstance(entry, dict) else None
    dtype = data.get("dtype") if isinstance(data, dict) else None
    if isinstance(data, dict) and isinstance(dtype, dict) and dtype.get("_type") == "torch.dtype":
        data["dtype"] = dtype.get("_data")
        data.setdefault("view_as_float", None)
        names = entry.get("_tensor_data_names")
        if isinstance(names, list):
            entry["_tensor_data_names"] = [n for n in ("qdata", "scale", "zero_point", "act_pre_scale") if n in names]


def _check_entry(name: str, entry: Any, nested: bool) -> None:
    def need(ok: bool, what: str) -> None:
        if not ok:
            raise CheckpointError(f"{name}: {what}")

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    need(isinstance(entry, dict) and entry.get("_type") == "HQQTensor", "metadata is not of an HQQTensor")
    data = entry.get("_data")
    if isinstance(data, dict):
        data.setdefault("activation", "float")  # files of before there was a choice
        data.setdefault("row_dims", 1)  # written for convolutions only
        data.setdefault("rotation", 0)
    need(isinstance(data, dict) and set(data) >= _ATTRIBUTES, f"metadata must have {sorted(_ATTRIBUTES)}")
    try:
        fmt = get_format(data["format"])
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{name}: {error}") from None
    extra = set(data) - _ATTRIBUTES
    need(extra == ({"codebook"} if fmt.learned else set()), f"unexpected attributes {sorted(extra)} for {fmt.name!r}")
    need(whole(data["nbits"]) and data["nbits"] in fmt.widths, f"nbits {data['nbits']!r} is not in {list(fmt.widths)}")
    need(whole(data["axis"]) and data["axis"] in (0, 1), f"axis {data['axis']!r} is not 0 or 1")
    need(whole(data["group_size"]) and 0 < data["group_size"] < MAX_DIM, f"bad group_size {data['group_size']!r}")
    need(isinstance(data["transposed"], bool), "transposed must be true or false")
    kept = data["nbits"] in META_NBITS and (data["axis"], fmt.name, data["transposed"]) == (0, "int", False)
    need(not nested or kept, "quantized scales and zero points are integers of 8 or 4 bits, axis 0")
    need(data["activation"] in ACTIVATIONS, f"activation {data['activation']!r} is not in {list(ACTIVATIONS)}")
    shape = data["shape"]
    good = isinstance(shape, list) and 2 <= len(shape) <= 8 and all(whole(s) and 0 < s < MAX_DIM for s in shape)
    need(good, f"bad shape {shape!r}")
    folded = data["row_dims"]
    fits = whole(folded) and (folded == 1 or (folded == len(shape) - 1 and not data["transposed"] and not nested))
    need(fits, f"row_dims {folded!r} does not fit shape {shape!r}")
    size = 1
    for extent in shape:
        size *= extent
    need(size < 2**62, f"shape {shape!r} overflows")
    turned, inputs = data["rotation"], shape[-2 if data["transposed"] else -1]
    good = whole(turned) and (turned == 0 or (not nested and turned == block_of(turned) and inputs % turned == 0))
    need(good, f"rotation {turned!r} is no power of two that divides {inputs} in_features")
    allowed = {str(d).removeprefix("torch.") for d in SCALE_DTYPES}
    need(
        isinstance(data["dtype"], str) and data["dtype"] in allowed,
        f"dtype {data['dtype']!r} is not in {sorted(allowed)}",
    )
    view = data["view_as_float"]
    need(view is None or (isinstance(view, str) and view in allowed), "bad view_as_float")
    names = entry.get("_tensor_data_names")
    required = ["qdata", "scale", "zero_point"] if fmt.has_zero_point or fmt.learned else ["qdata", "scale"]
    need(names in (required, [*required, "act_pre_scale"]), f"bad _tensor_data_names {names!r} for {fmt.name!r}")
    need(not fmt.learned or data["codebook"] in CODEBOOKS, f"codebook must be one of {list(CODEBOOKS)}")
    inner = entry.get("_nested", {})
    may_nest = {"scale", "zero_point"} if fmt.has_zero_point else {"scale"}
    need(isinstance(inner, dict) and set(inner) <= may_nest, "bad _nested")
    need(not (nested and inner), "metadata is nested more than once")
    for part, sub in inner.items():
        _check_entry(f"{name}.{part}", sub, nested=True)


def build(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str = "") -> HQQTensor:
    """The HQQTensor of a checked ``entry``, each stored tensor held against it; CheckpointError where they differ."""
    data, nested = entry["_data"], entry.get("_nested", {})
    shape, folded = data["shape"], data["row_dims"]
    *lead, out_features = shape[:-folded]
    in_features = math.prod(shape[-folded:])
    if data["transposed"]:
        out_features, in_features = in_features, out_features
    groups = -(-(in_features if data["axis"] else out_features) // data["group_size"])
    meta_shape = [*lead, out_features, groups] if data["axis"] else [*lead, groups, in_features]

    def take(part: str, shape: list[int], dtypes: tuple[torch.dtype, ...]) -> Tensor:
        key = data_key(name, prefix + part)
        if key not in tensors:
            raise CheckpointError(f"{name}: tensor {key!r} is missing")
        t = tensors[key]
        if list(t.shape) != shape or t.dtype not in dtypes:
            raise CheckpointError(
                f"{name}: {key!r} should be {shape} of {list(dtypes)}, the file has {list(t.shape)} {t.dtype}"
            )
        if t.dtype.is_floating_point and not bool(t.isfinite().all()):
            raise CheckpointError(f"{name}: {key!r} holds NaN or Inf")
        return t

    width = (meta_bytes if prefix else row_bytes)(in_features, data["nbits"])
    qdata = take("qdata", [*lead, out_features, width], (torch.uint8,))
    if data["view_as_float"]:
        dtype = getattr(torch, data["view_as_float"])
        if qdata.shape[-1] % dtype.itemsize:
            raise CheckpointError(f"{name}: rows of {qdata.shape[-1]} bytes cannot be viewed as {dtype}")
        qdata = qdata.view(dtype)
    meta: dict[str, Tensor] = {}
    for part in ("scale", "zero_point"):
        if part not in entry["_tensor_data_names"]:
            continue
        if part == "zero_point" and get_format(data["format"]).learned:
            rows = out_features if data["codebook"] == "row" else 1
            meta[part] = take(part, [*lead, rows, 2 ** data["nbits"]], SCALE_DTYPES)
        elif part in nested:
            if nested[part]["_data"]["shape"] != meta_shape:
                raise CheckpointError(f"{name}: quantized {part} should have shape {meta_shape}")
            meta[part] = build(name, nested[part], tensors, f"{prefix}{part}_")
        else:
            meta[part] = take(part, meta_shape, SCALE_DTYPES)
    act = take("act_pre_scale", [in_features], SCALE_DTYPES) if "act_pre_scale" in entry["_tensor_data_names"] else None
    return HQQTensor(
        qdata, meta["scale"], data["nbits"], data["group_size"], data["axis"], torch.Size(data["shape"]),
        getattr(torch, data["dtype"]), data["format"], data["transposed"], data["activation"], data["row_dims"],
        data["rotation"], zero_point=meta.get("zero_point"), act_pre_scale=act,
    )  # fmt: skip
