"""How an HQQTensor is laid out in a safetensors file, and the check of what a file claims.

The weight ``a.b.weight`` becomes ``a.b._weight_qdata``, ``a.b._weight_scale`` and ``a.b._weight_zero_point`` (the
names that torchao's and transformers' loaders know); a quantized scale becomes ``a.b._weight_scale_qdata`` and so
on. The safetensors metadata has a JSON entry under ``a.b.weight`` with the attributes. Geometry is taken from the
entry and each stored tensor is held against it (``hqqtensor.tensor.validate``), never the other way round; only the
number of groups along out_features (axis 0) is the scale's, since a slice of rows keeps all groups.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hqqtensor.config import CODEBOOKS, SCALE_DTYPES
from hqqtensor.formats import get_format
from hqqtensor.packing import row_bytes
from hqqtensor.tensor import HQQTensor
from hqqtensor.tensor.validate import DTYPES, check_attributes, check_quantized, is_whole

_NUMBERS = ("nbits", "group_size", "axis", "format", "transposed", "activation", "rotation")
_ATTRIBUTES = {*_NUMBERS, "shape", "dtype", "view_as_float", "row_dims"}
_ABSENT = {"activation": "float", "row_dims": 1, "rotation": 0}
"""Attributes that older files lack, or that are written only where they differ from this."""
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_VIEWS = {str(dtype).removeprefix("torch."): dtype for dtype in SCALE_DTYPES}


class CheckpointError(ValueError):
    """A file that is missing, cut short, or does not hold what it claims."""


class InputError(CheckpointError):
    """Nothing is damaged: another path or another argument would do, and the message says which."""


def read_json(text: str | bytes, what: str) -> Any:
    """Parsed JSON; CheckpointError beginning with ``what`` where it is none, or is nested too deeply to be honest."""
    try:
        return json.loads(text)
    except RecursionError:
        raise CheckpointError(f"{what} is JSON nested too deeply") from None
    except ValueError:
        raise CheckpointError(f"{what} is not valid JSON") from None


def data_key(name: str, part: str) -> str:
    """Key of one data tensor of the parameter ``name``."""
    prefix, _, leaf = name.rpartition(".")
    return f"{prefix}{'.' if prefix else ''}_{leaf}_{part}"


def flatten(name: str, tensor: HQQTensor) -> tuple[dict[str, Tensor], str]:
    """The plain tensors of ``tensor`` by key, and its JSON entry.

    CheckpointError where ``build`` would refuse to read them back (numbers that are not finite, a dtype that no file
    holds): what is saved can be loaded.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_describe(tensor, lambda part, value: tensors.__setitem__(data_key(name, part), value), ""))
    if tensor.device.type != "meta":
        build(name, parse_entry(name, text), tensors)
    return tensors, text


def _describe(tensor: HQQTensor, add: Callable[[str, Tensor], None], prefix: str) -> dict[str, Any]:
    data: dict[str, Any] = {n: getattr(tensor, n) for n in _NUMBERS}
    data["shape"] = list(tensor.shape)
    data["dtype"] = str(tensor.dtype).removeprefix("torch.")
    if get_format(tensor.format).learned:
        data["codebook"] = tensor.codebook
    if tensor.row_dims > 1:
        data["row_dims"] = tensor.row_dims
    qdata = tensor.qdata
    data["view_as_float"] = None if qdata.dtype == torch.uint8 else str(qdata.dtype).removeprefix("torch.")
    add(prefix + "qdata", qdata if qdata.dtype == torch.uint8 else qdata.view(torch.uint8))
    names = ["qdata"]
    nested: dict[str, Any] = {}
    for part in ("scale", "zero_point", "act_pre_scale"):
        value = getattr(tensor, part)
        if value is None:
            continue
        names.append(part)
        if isinstance(value, HQQTensor):
            nested[part] = _describe(value, add, f"{prefix}{part}_")
        else:
            add(prefix + part, value)
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
    entry = read_json(text, f"{name}: its metadata")
    _from_torchao(entry)
    _check_entry(name, entry, nested=False)
    return entry


def torchao_entry(tensor: HQQTensor) -> str:
    """The JSON entry that torchao's safetensors code writes and reads; it knows no quantized scales."""
    from torchao.prototype.safetensors.safetensors_utils import TensorSubclassAttributeJSONEncoder

    return json.dumps(tensor, cls=TensorSubclassAttributeJSONEncoder)


def _from_torchao(entry: Any) -> None:
    """Make an entry that torchao wrote ours, in place: its dtype is a dict, its names are in another order."""
    data = entry.get("_data") if isinstance(entry, dict) else None
    dtype = data.get("dtype") if isinstance(data, dict) else None
    if isinstance(data, dict) and isinstance(dtype, dict) and dtype.get("_type") == "torch.dtype":
        data["dtype"] = dtype.get("_data")
        data.setdefault("view_as_float", None)
        names = entry.get("_tensor_data_names")
        if isinstance(names, list):
            entry["_tensor_data_names"] = [n for n in ("qdata", "scale", "zero_point", "act_pre_scale") if n in names]


def _check_entry(name: str, entry: Any, nested: bool) -> None:
    """The form of the entry here, the attributes themselves by the check that every HQQTensor goes through."""

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise CheckpointError(f"{name}: {what}")

    need(isinstance(entry, dict) and entry.get("_type") == "HQQTensor", "metadata is not of an HQQTensor")
    data = entry.get("_data")
    need(isinstance(data, dict), "metadata must have _data")
    for key, value in _ABSENT.items():
        data.setdefault(key, value)
    need(set(data) >= _ATTRIBUTES, f"metadata must have {sorted(_ATTRIBUTES)}")
    shape, dtype, view = data["shape"], data["dtype"], data["view_as_float"]
    need(isinstance(shape, list) and all(map(is_whole, shape)), f"shape must be a list of whole numbers, got {shape!r}")
    need(isinstance(dtype, str) and dtype in _DTYPES, f"dtype {dtype!r} is not in {sorted(_DTYPES)}")
    known = view is None or (isinstance(view, str) and view in _VIEWS)
    need(known, f"view_as_float {view!r} is not null or in {sorted(_VIEWS)}")
    try:
        check_attributes(**_attributes(data))
        if nested:
            metadata = {key: data[key] for key in ("nbits", "axis", "format", "transposed", "row_dims", "rotation")}
            check_quantized(**metadata)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None
    need(not nested or view is None, "quantized scales and zero points are never viewed as floats")
    fmt = get_format(data["format"])
    extra = set(data) - _ATTRIBUTES
    need(extra == ({"codebook"} if fmt.learned else set()), f"unexpected attributes {sorted(extra)} for {fmt.name!r}")
    need(not fmt.learned or data["codebook"] in CODEBOOKS, f"codebook must be one of {list(CODEBOOKS)}")
    names = entry.get("_tensor_data_names")
    required = ["qdata", "scale", "zero_point"] if fmt.has_zero_point or fmt.learned else ["qdata", "scale"]
    allowed = (required,) if nested else (required, [*required, "act_pre_scale"])
    need(names in allowed, f"bad _tensor_data_names {names!r} for {fmt.name!r}")
    inner = entry.get("_nested", {})
    may_nest = {"scale", "zero_point"} if fmt.has_zero_point else {"scale"}
    need(isinstance(inner, dict) and set(inner) <= may_nest, "bad _nested")
    need(not (nested and inner), "metadata is nested more than once")
    for part, sub in inner.items():
        _check_entry(f"{name}.{part}", sub, nested=True)


def _attributes(data: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``HQQTensor`` that are no tensors, from an entry's ``_data``."""
    numbers = {key: data[key] for key in (*_NUMBERS, "row_dims")}
    return {**numbers, "shape": tuple(data["shape"]), "dtype": _DTYPES[data["dtype"]]}


def build(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str = "") -> HQQTensor:
    """The HQQTensor of a checked ``entry``, each stored tensor held against it; CheckpointError where they differ."""
    data, nested = entry["_data"], entry.get("_nested", {})
    parts: dict[str, Any] = {}
    for part in entry["_tensor_data_names"]:
        key = data_key(name, prefix + part)
        if part in nested:
            parts[part] = build(name, nested[part], tensors, f"{prefix}{part}_")
        elif key in tensors:
            parts[part] = tensors[key]
        else:
            raise CheckpointError(f"{name}: tensor {key!r} is missing")
    qdata = parts["qdata"]
    if qdata.dtype != torch.uint8 or qdata.ndim == 0:
        raise CheckpointError(f"{name}: {data_key(name, prefix + 'qdata')!r} must be rows of uint8, got {qdata.dtype}")
    view = _VIEWS.get(data["view_as_float"])
    if view is not None:
        if qdata.shape[-1] % view.itemsize:
            raise CheckpointError(f"{name}: rows of {qdata.shape[-1]} bytes cannot be viewed as {view}")
        shape = (*qdata.shape[:-1], qdata.shape[-1] // view.itemsize)
        parts["qdata"] = qdata.view(view) if qdata.numel() else qdata.new_empty(shape, dtype=view)
    try:
        tensor = HQQTensor(**parts, **_attributes(data))
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None
    if not prefix and qdata.shape[-1] != row_bytes(tensor.in_features, tensor.nbits):
        raise CheckpointError(f"{name}: rows of qdata are not filled up to eight codes, got {list(qdata.shape)}")
    rows = {None: None, "tensor": 1, "row": tensor.out_features}[data.get("codebook")]
    if rows is not None and parts["zero_point"].shape[-2] != rows:
        raise CheckpointError(f"{name}: zero_point must hold entries of {rows} rows, got {parts['zero_point'].shape}")
    for part, values in parts.items():
        if part != "qdata" and part not in nested and not bool(values.isfinite().all()):
            raise CheckpointError(f"{name}: {data_key(name, prefix + part)!r} holds NaN or Inf")
    return tensor
