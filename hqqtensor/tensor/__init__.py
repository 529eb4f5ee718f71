"""HQQTensor: packed codes, scales and zero points that behave as the weight they stand for."""

import hashlib
import inspect
import math
from typing import Any

import torch
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from hqqtensor import ops
from hqqtensor.config import HqqConfig
from hqqtensor.encode import Encoded, check_weight, encode, prepare
from hqqtensor.ops import PackedWeight
from hqqtensor.packing import pack, pack_meta, row_bytes, unpack, unpack_meta
from hqqtensor.tensor.validate import check
from hqqtensor.transforms import rotate


class HQQTensor(TorchAOBaseTensor):
    """A weight ``[..., N, K]`` kept in ``nbits`` bits; value = (code - zero_point) * scale, or table[code] * scale.

    Tensor data:
        qdata: packed codes, uint8 ``[..., N, row_bytes]`` (layout in ``hqqtensor.packing``), or the same bytes
            viewed as a floating dtype.
        scale: ``[..., N, ceil(K / group_size)]`` for axis 1, ``[..., ceil(N / group_size), K]`` for axis 0 (or more
            groups: row n belongs to group n % groups, and a slice of rows keeps all); a plain floating tensor, or an
            HQQTensor of 8 or 4 bits whose qdata is laid out by ``packing.pack_meta``.
        zero_point (optional): for the format "int" as ``scale``, in units of codes; for "codebook" the entries,
            ``[..., N or 1, 2**nbits]``, ascending; other formats have none.
        act_pre_scale (optional): ``[K]``, multiplied into the activations; the signs of a rotation are in it.

    Attributes:
        nbits, group_size, axis, format: as in ``HqqConfig``, group_size always a number.
        in_features, out_features: K and N, the length and the number of stored rows. rank: of the logical shape.
        shape: logical shape. dtype: dtype it presents and computes in. transposed: whether the last two
            dimensions of ``shape`` are swapped against the stored ``[N, K]``. activation: as in ``HqqConfig``.
        row_dims: how many trailing dimensions of ``shape`` lie in a stored row: 1, or for the weight of a convolution
            ``[N, C, *kernel]`` all but the first, K = C times the kernel's elements.
        rotation: inputs that a Hadamard matrix mixes with one another (``hqqtensor.transforms``), 0 for none.

    The constructor raises ValueError where data and attributes do not fit (``hqqtensor.tensor.validate``).
    """

    tensor_data_names = ["qdata", "scale"]
    optional_tensor_data_names = ["zero_point", "act_pre_scale"]
    tensor_attribute_names = [
        "nbits", "group_size", "axis", "shape", "dtype", "format", "transposed", "activation", "row_dims", "rotation",
    ]  # fmt: skip

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor | None
    act_pre_scale: Tensor | None
    shard_rows: int | None = None  # of a shard of FSDP that was moved to another device: see rows.padded_rows
    # Of rows that begin within the groups of axis 0: the shared scales that theirs are rolled copies of, and how far.
    rolled_from: tuple[dict[str, Tensor], int] | None = None

    def __new__(
        cls, qdata: Tensor, scale: Any = None, nbits: int = 0, group_size: int = 0, axis: int = 1, shape: Any = None,
        dtype: Any = None, format: str = "int", transposed: bool = False, activation: str = "float", row_dims: int = 1,
        rotation: int = 0, zero_point: Tensor | None = None, act_pre_scale: Tensor | None = None, *,
        requires_grad: bool = False,
    ) -> "HQQTensor":  # fmt: skip
        if isinstance(qdata, HQQTensor):
            # accelerate makes a parameter anew by its type: HQQTensor(q, requires_grad=...), as nn.Parameter(t, ...).
            return torch.nn.Parameter(qdata, requires_grad)  # type: ignore[return-value]
        attributes = (nbits, group_size, axis, shape, dtype, format, transposed, activation, row_dims, rotation)
        check(qdata, scale, zero_point, act_pre_scale, *attributes)
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=qdata.device, requires_grad=False
        )

    def __init__(
        self, qdata: Tensor, scale: Any = None, nbits: int = 0, group_size: int = 0, axis: int = 1, shape: Any = None,
        dtype: Any = None, format: str = "int", transposed: bool = False, activation: str = "float", row_dims: int = 1,
        rotation: int = 0, zero_point: Tensor | None = None, act_pre_scale: Tensor | None = None, *,
        requires_grad: bool = False,
    ) -> None:  # fmt: skip
        if isinstance(qdata, HQQTensor):
            return
        super().__init__()
        self.qdata, self.scale, self.zero_point, self.act_pre_scale = qdata, scale, zero_point, act_pre_scale
        self.nbits, self.group_size, self.axis = nbits, group_size, axis
        self.format, self.transposed, self.activation = format, transposed, activation
        self.row_dims, self.rotation = row_dims, rotation
        self.nested = isinstance(scale, HQQTensor) or isinstance(zero_point, HQQTensor)
        # Plain numbers: to ask the tensor itself for its shape goes through torch's function dispatch each time.
        self.rank = len(shape)
        self.in_features = shape[-2] if transposed else math.prod(shape[-row_dims:])
        self.out_features = shape[-1] if transposed else shape[-row_dims - 1]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """torchao's dispatch by table, with the call that models make most taken straight to its operator."""
        if func is torch.nn.functional.linear and len(args) >= 2 and not kwargs:
            x, weight, bias = args if len(args) == 3 else (*args, None)
            if type(x) is Tensor and type(weight) is not Tensor and weight.rank == 2 and not weight.transposed:
                return products.linear(x, weight, bias)
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except unsupported.UnsupportedOperation as error:
            raise error.of(func) from None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """torchao's dispatch by table, with an error that says what to do for what is not in it."""
        implementation = HQQTensor._ATEN_OP_TABLE[HQQTensor].get(func)
        if implementation is None:
            raise unsupported.unsupported(func, args, kwargs or {})
        return implementation(func, types, args, kwargs or {})

    @staticmethod
    @torch.compiler.disable
    def from_hp(weight: Tensor, config: HqqConfig | None = None, row_dims: int = 1) -> "HQQTensor":
        """Quantize ``weight`` ``[..., N, K]`` (any strides, float32/bfloat16/float16); bad weights raise.

        ``row_dims``: 1, or for a convolution's ``[N, C, *kernel]`` all dimensions but the first: groups then run
        along C and the kernel as they lie in memory, or for axis 0 along N.
        """
        config, shape = config or HqqConfig(), weight.shape
        check_weight(weight, config, row_dims=row_dims)
        weight = weight.flatten(-row_dims)
        prepared, inner, act, block = prepare(weight, config)
        out = HQQTensor.from_encoded(encode(prepared, inner), config, weight.dtype, act, block)
        return out if row_dims == 1 else out.with_data(shape=shape, row_dims=row_dims)

    @staticmethod
    def from_encoded(
        e: Encoded, config: HqqConfig, dtype: torch.dtype, act_pre_scale: Tensor | None, rotation: int
    ) -> "HQQTensor":
        """The tensor of a weight of ``dtype`` that was encoded after ``transforms.prepare``, which gives the rest."""
        out = HQQTensor._from_encoded(e, config.compute_dtype or dtype, config.format)
        out.act_pre_scale, out.rotation, out.activation = act_pre_scale, rotation, config.activation
        if config.view_as_float:
            out.qdata = out.qdata.view(dtype)
        return out

    @staticmethod
    def _from_encoded(e: Encoded, dtype: torch.dtype, format: str = "int") -> "HQQTensor":
        meta = [HQQTensor.meta_from_encoded(m) if isinstance(m, Encoded) else m for m in (e.scale, e.zero_point)]
        attributes = (e.nbits, e.group_size, e.axis, e.shape, dtype, format)
        return HQQTensor(e.qdata, meta[0], *attributes, zero_point=meta[1])  # type: ignore[arg-type]

    @staticmethod
    def meta_from_encoded(e: Encoded) -> "HQQTensor":
        """Quantized scales or zero points ``[..., rows, columns]``, without the padding of rows to eight codes."""
        out = HQQTensor._from_encoded(e, torch.float32)
        out.qdata = pack_meta(unpack(out.qdata, e.nbits, out.in_features), e.nbits)
        return out

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        """torchao's, without its look-ups: a compiled graph's guards ask every weight at every call."""
        names = self.tensor_data_names + [n for n in self.optional_tensor_data_names if getattr(self, n) is not None]
        return names, {name: getattr(self, name) for name in self.tensor_attribute_names}

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of all data: packed codes, scales, zero points, activation scale."""
        names, _ = self.__tensor_flatten__()
        return sum(getattr(self, name).nbytes for name in names)

    def operand(self) -> PackedWeight:
        """What the operators take of this weight: plain tensors, quantized scales and zero points as uint8."""
        qdata = self.qdata if self.qdata.dtype == torch.uint8 else self.qdata.view(torch.uint8)
        scale: Tensor | None = self.scale
        zero, meta = self.zero_point, None
        if self.nested:
            meta = [
                t for level in (scale, zero) if isinstance(level, HQQTensor) for t in (level.scale, level.zero_point)
            ]
            scale, zero = (t.qdata if isinstance(t, HQQTensor) else t for t in (scale, zero))
        settings = (self.nbits, self.format, self.group_size, self.axis, self.in_features)
        return tuple.__new__(PackedWeight, (qdata, scale, zero, meta, *settings))  # half the time of PackedWeight(...)

    def packed(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``qdata``, ``scale`` and ``zero_point`` as the operators take them."""
        return self.operand()[:3]

    def settings(self) -> tuple[list[Tensor], int, str, int, int, int]:
        """(meta, nbits, format, group_size, axis, in_features): what the operators take after the data."""
        packed = self.operand()
        return list(packed.meta or ()), *packed[4:]

    @property
    def codebook(self) -> str | None:
        """For the format "codebook", whether the "tensor" or each "row" has entries of its own; else None."""
        if self.format != "codebook":
            return None
        return "tensor" if self.zero_point.shape[-2] == 1 else "row"  # type: ignore[union-attr]

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        """The dense weight of the logical shape, in ``output_dtype`` or the tensor's own dtype."""
        dtype = output_dtype or self.dtype
        if not self.in_features:  # an empty slice has no codes to decode
            return self.qdata.new_empty(self.shape, dtype=dtype)
        packed = self.operand()
        if packed.qdata.shape[-1] != row_bytes(self.in_features, self.nbits):  # see meta_from_encoded
            packed = packed._replace(qdata=pack(unpack_meta(packed.qdata, self.in_features), self.nbits))
        w = ops.dequantize(packed, torch.float32 if self.rotation else dtype)
        if self.rotation:
            w = rotate(w, self.rotation).to(dtype)
        if self.act_pre_scale is not None:
            w = w * self.act_pre_scale.to(dtype)
        if self.row_dims > 1:
            w = w.unflatten(-1, self.shape[-self.row_dims :])
        return w.transpose(-1, -2) if self.transposed else w

    def with_data(self, **changes: object) -> "HQQTensor":
        """A new tensor with some data or attributes replaced."""
        names = [*self.tensor_data_names, *self.tensor_attribute_names, *self.optional_tensor_data_names]
        return HQQTensor(**{**{name: getattr(self, name) for name in names}, **changes})  # type: ignore[arg-type]

    def _stable_hash_for_caching(self) -> str:
        """Key of torch's AOTAutograd cache: everything but the numbers, the same in every process."""
        names, attributes = self.__tensor_flatten__()
        parts = [repr(attributes), str(self.requires_grad)]
        for name in names:
            t = getattr(self, name)
            own = t._stable_hash_for_caching() if isinstance(t, HQQTensor) else f"{t.dtype} {t.stride()} {t.device}"
            parts.append(f"{name} {list(t.shape)} {own}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def describe(self) -> str:
        """One line: bits, format, group size, axis, scale dtype."""

        def meta(t: Tensor) -> str:
            return f"{t.nbits}-bit" if isinstance(t, HQQTensor) else str(t.dtype).removeprefix("torch.")

        text = f"{self.nbits}-bit {self.format}, group_size={self.group_size}, axis={self.axis}"
        text += f", rotation={self.rotation}" if self.rotation else ""
        text += f", scale={meta(self.scale)}"
        if self.codebook is not None:
            return f"{text}, codebook={self.codebook}"
        return text if self.zero_point is None else f"{text}, zero_point={meta(self.zero_point)}"

    def __repr__(self) -> str:  # type: ignore[override]
        dtype = str(self.dtype).removeprefix("torch.")
        flag = ", transposed" if self.transposed else ""
        return f"HQQTensor({list(self.shape)}, {self.describe()}, dtype={dtype}, device={self.device}{flag})"


_DEFAULTS = {
    name: None if parameter.default is parameter.empty else parameter.default
    for name, parameter in inspect.signature(HQQTensor.__init__).parameters.items()
}
"""What stored tensors had before an attribute was introduced."""


def _set_state(self: HQQTensor, state: Any) -> None:
    """Take over the attributes that ``torch.load`` and pickle read, checked; what follows from them is computed anew.

    ``state``: by name, as ``torch.save`` stored them; shape and dtype are those of ``self``, which torch made already.
    """
    if not isinstance(state, dict):
        raise ValueError(f"a stored HQQTensor has its attributes by name, got {type(state).__name__}")
    stored = {**_DEFAULTS, **state, "shape": self.shape, "dtype": self.dtype}
    data = [*self.tensor_data_names, *self.optional_tensor_data_names]
    parts: dict[str, Any] = {name: stored[name] for name in [*data, *self.tensor_attribute_names]}
    check(*parts.values())
    HQQTensor.__init__(self, **parts)
    others = state.keys() - parts.keys() - self.__dict__.keys()  # whatever code outside has put there
    self.__dict__.update({name: state[name] for name in others})


HQQTensor.__setstate__ = _set_state  # after the class: torchao's base class puts its own into every subclass
torch.serialization.add_safe_globals([HQQTensor])

# Registers what torch functions do with an HQQTensor.
from hqqtensor.tensor import experts as experts  # noqa: E402
from hqqtensor.tensor import flat as flat  # noqa: E402
from hqqtensor.tensor import products as products  # noqa: E402
from hqqtensor.tensor import sharding as sharding  # noqa: E402
from hqqtensor.tensor import storage as storage  # noqa: E402
from hqqtensor.tensor import unsupported as unsupported  # noqa: E402
from hqqtensor.tensor import views as views  # noqa: E402
