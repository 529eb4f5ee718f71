"""Export to the hqq library's flat safetensors layout, for those who stay with hqq."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hqqtensor.packing import unpack
from hqqtensor.serialization.hqq_layer import PACKINGS, WIDTHS
from hqqtensor.tensor import HQQTensor


def to_flat(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names and tensors of hqq's layout. ValueError naming the weight where hqq has no form for it."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if isinstance(tensor, HQQTensor):
            prefix, _, leaf = name.rpartition(".")
            if leaf != "weight":
                raise ValueError(f"{name}: hqq quantizes the weights of linear layers only")
            dot = f"{prefix}." if prefix else ""
            out |= {dot + key: value for key, value in export_layer(name, tensor).items()}
        else:
            out[name] = tensor
    return out


def export_layer(name: str, tensor: HQQTensor) -> dict[str, Tensor]:
    """The entries of one layer, less its bias, encoded as hqq's ``state_dict`` does."""
    rows, columns = tensor.shape[-2:]
    bits, numel = tensor.nbits, rows * columns
    # With axis 0 the scale says how many groups there are: a slice of rows keeps all, each with fewer members.
    groups = -(-columns // tensor.group_size) if tensor.axis else tensor.scale.shape[-2]
    size = tensor.group_size if tensor.axis else rows // groups
    packing = WIDTHS.get(bits)
    reason = ""
    if tensor.ndim != 2 or tensor.transposed or tensor.format != "int" or tensor.act_pre_scale is not None:
        reason = "it is no plain 2-D weight of integer codes"
    elif packing is None:
        reason = f"it has {bits} bits, hqq has {sorted(b for b in WIDTHS if b != 1.58)}"
    elif groups * size != (columns if tensor.axis else rows) or numel == 0:
        extent = columns if tensor.axis else rows
        reason = f"group_size {size} does not divide its {extent} weights (quantize with one that does, such as 64)"
    if reason or packing is None:
        raise ValueError(f"{name}: cannot be kept in hqq's layout: {reason}")
    scale, zero = _plain(tensor.scale), _plain(tensor.zero_point)
    qdata = tensor.qdata.detach().cpu().view(torch.uint8)
    shape = (numel // size, size) if tensor.axis else (size, numel // size)
    per_word = PACKINGS[packing][1]
    if packing != "3bit_32" and shape[0] % per_word:
        raise ValueError(f"{name}: cannot be kept in hqq's layout: {shape[0]} grouped rows in slabs of {per_word}")
    codes = unpack(qdata.contiguous(), bits, columns).reshape(shape)
    one_each = (-1, 1) if tensor.axis else (1, -1)
    entries = {
        "W_q": _pack(codes, packing),
        "scale": scale.reshape(one_each).contiguous(),
        "zero": zero.reshape(one_each).contiguous(),
        "shape": torch.tensor([rows, columns]),
    }
    whole = {"nbits": bits, "group_size": size, "axis": tensor.axis}
    flags = {
        "view_as_float": False, "quant_scale": False, "quant_zero": False, "offload_meta": False,
        "encoded_state_dict": True, "stores_quant_config": True, "channel_wise": True, "optimize": True,
        "round_zero": False,
    }  # fmt: skip
    texts = {
        "packing": packing,
        "unpack_view_dtype": "torch.int32" if packing == "3bit_32" else "torch.uint8",
        "compute_dtype": str(tensor.dtype),
    }
    entries |= {key: torch.tensor(value, dtype=torch.int32) for key, value in whole.items()}
    entries |= {key: torch.tensor(int(value), dtype=torch.uint8) for key, value in flags.items()}
    return entries | {key: torch.tensor(list(value.encode()), dtype=torch.uint8) for key, value in texts.items()}


def _plain(values: Tensor | None) -> Tensor:
    assert values is not None  # integer codes have zero points
    return (values.dequantize() if isinstance(values, HQQTensor) else values).detach().cpu()


def _pack(codes: Tensor, packing: str) -> Tensor:
    """hqq's slabs: the first in the highest bits of a word; 3 bits are padded to ten rows a word."""
    bits, per_word = PACKINGS[packing]
    if packing == "8bit_u8":
        return codes.contiguous()
    words = math.ceil(codes.shape[0] / per_word)
    codes = torch.nn.functional.pad(codes, (0, 0, 0, words * per_word - codes.shape[0]))
    codes = codes.to(torch.int32 if packing == "3bit_32" else torch.uint8)
    out = torch.zeros_like(codes[:words])
    for place, slab in enumerate(codes.view(per_word, words, -1)):
        out |= slab << (bits * (per_word - 1 - place))
    return out
