"""HqqConfig: how to quantize; every setting is checked when a config is created."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torchao.core.config import AOBaseConfig

from hqqtensor.formats import get_format
from hqqtensor.solvers import get_solver

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ACTIVATIONS = ("float", "exact", "int8")
CODEBOOKS = ("tensor", "row")
META_NBITS = (4, 8)
_LAYER_FIELDS = (
    "nbits", "group_size", "axis", "format", "solver", "scale_dtype", "quant_scale", "quant_zero", "meta_nbits",
    "compute_dtype", "view_as_float", "lp_norm", "activation", "codebook", "integer_zero", "rotation", "rotation_seed",
)  # fmt: skip
_DTYPE_FIELDS = ("scale_dtype", "compute_dtype")
_GROUP_FIELDS = ("group_size", "quant_scale", "quant_zero", "meta_nbits", "solver")
_WIDTHS = range(1, 9)

AUTO: Any = "auto"
"""The group size that is chosen when a config is made. A config that exists has a number (or None) in its place, so
that readers of ``group_size`` see ``int | None``."""

_CHOSEN: Any = None
"""The solver that is chosen when a config is made; a config that exists has a name in its place."""

PLAIN_GROUP_SIZE = 64
"""The group size that "auto" takes with plain scales, as in the hqq library."""

RECOMMENDED_GROUP_SIZE = {4: 20, 3: 20, 2: 20, 1: 20}
"""By bits, the group size that "auto" takes with scales and zero points of 4 bits and column scales.

Groups of 20 then cost about 0.46 bits a weight in large layers, where groups of 64 with float16 scales cost 0.5. On
SmolLM2-135M at 3 bits the KL to the dense model falls from 1.73 (groups of 64) to 0.54; docs/quality.md has all models.
Above 4 bits the rounding of the scales would be most of the error.
"""


@dataclass
class HqqConfig(AOBaseConfig):
    """Settings of half-quadratic weight-only quantization; every one is checked here (ValueError).

    nbits: bits a code, 1 to 8.
    group_size: weights that share a scale (and a zero point); None for a whole row (axis 1) or column (axis 0). "auto"
        takes the best buy: ``RECOMMENDED_GROUP_SIZE`` with scales and zero points of 4 bits and column scales for
        integers of up to 4 bits grouped along in_features, else 64 with plain ones. It takes 64 too where integer_zero,
        quant_scale=False, quant_zero=False or meta_nbits=8 ask for something else.
    axis: 1 groups along in_features, 0 along out_features.
    format: number format of the codes: "int" (1 to 8 bits), "fp4", "fp6", "fp8", "nf4" or "codebook" (learned, 1 to 4
        bits), see ``hqqtensor.formats``. Only "int" has zero points.
    solver: "hqq_joint", "hqq" (the published one, for "int" only), "rtn" or "column_scaled". None is chosen with the
        group size: "column_scaled" with the groups that "auto" recommends, unless the inputs are rotated, else
        "hqq_joint".
    scale_dtype: storage dtype of scale and zero point (float16, bfloat16, float32). None takes float16 where
        it holds every scale and zero point of the weight well, else float32.
    quant_scale, quant_zero: store scales / zero points as integer codes, quantized in groups of 128 rows (axis 0). None
        is chosen with the group size: False where that is given.
    meta_nbits: bits of those codes, 8 or 4: with 4, groups of 16 to 32 weights cost no more than plain ones of 64. None
        is chosen with the group size: 8 where that is given.
    compute_dtype: dtype that the quantized tensor has to the outside and computes in; None takes the weight's.
    dynamic_config: per-layer settings by tag, ``{"self_attn.q_proj": {"nbits": 3}}``; None as an entry leaves
        the layer alone. A tag matches a run of the dotted parts of a module's name, ``*`` within a part matches
        anything, the longest matching tag wins. What an entry leaves out is as above; where that is "auto", it is
        chosen for the entry's own settings.
    skip_modules: tags of modules left alone.
    view_as_float: store the packed bytes viewed as the weight's floating dtype.
    weight_quant_params: the hqq library's nested dict, translated into the settings above and then dropped.
    lp_norm: p of the error |w - dequantized|^p that hqq_joint minimises, over 0 and up to 2.
    activation: "float" multiplies activations as they are; many tokens of bfloat16 may meet weights that are rounded to
        bfloat16 once, as in a dense product. "exact" never rounds weights. "int8" rounds activations to 8-bit integers,
        one step for each token and group of features (see docs/numerics.md for speed and error).
    integer_zero: zero points are integers, which costs about 14 % more squared error.
    rotation: mix inputs by a random Hadamard rotation (``hqqtensor.transforms``): the weight is quantized rotated,
        the activations are rotated before each product.
    rotation_seed: seed of the rotation's random signs.
    codebook: for the format "codebook", whether one codebook is learned for the "tensor" or one for each "row" (axis 1
        only).
    embedding_nbits: bits of a model's input embedding and output layer, tied or not, whatever "lm_head" in skip_modules
        says: integers, grouped as "auto" does for this width. None leaves both as other settings say (dense, unless a
        tag names the embedding). A dynamic_config tag that matches one of them comes first.

    A config that was made holds numbers where "auto" or None stood, in the entries of dynamic_config as well.
    """

    nbits: int = 4
    group_size: int | None = AUTO
    axis: int = 1
    format: str = "int"
    solver: str = _CHOSEN
    scale_dtype: torch.dtype | None = None
    quant_scale: bool | None = None
    quant_zero: bool | None = None
    compute_dtype: torch.dtype | None = None
    dynamic_config: dict[str, dict[str, Any] | None] | None = None
    skip_modules: list[str] = field(default_factory=lambda: ["lm_head"])
    view_as_float: bool = False
    weight_quant_params: dict[str, Any] | None = None
    lp_norm: float = 2.0
    activation: str = "float"
    codebook: str = "tensor"
    integer_zero: bool = False
    rotation: bool = False
    rotation_seed: int = 0
    meta_nbits: int | None = None
    embedding_nbits: int | None = None

    def __post_init__(self) -> None:
        if self.weight_quant_params is not None:
            if self.group_size == AUTO:
                self.group_size = PLAIN_GROUP_SIZE  # what hqq takes where its dict has none
            for name, value in _from_hqq_params(self.weight_quant_params).items():
                setattr(self, name, value)
            self.weight_quant_params = None
        self._given_groups = {name: getattr(self, name) for name in _GROUP_FIELDS}
        self._choose_groups()
        for name in _DTYPE_FIELDS:
            setattr(self, name, _as_dtype(name, getattr(self, name)))
        self._check()
        if self.dynamic_config is not None:
            self.dynamic_config = {tag: self._with_groups(tag) for tag in self.dynamic_config}

    def _choose_groups(self) -> None:
        """Put numbers in the place of "auto" and None."""
        recommended = None
        if self.group_size == AUTO:
            if self._suits_coarse_scales() and _is_int(self.nbits):
                recommended = RECOMMENDED_GROUP_SIZE.get(self.nbits)
            self.group_size = recommended or PLAIN_GROUP_SIZE
        scaled = "hqq_joint" if self.rotation else "column_scaled"
        chosen = (False, False, 8, "hqq_joint") if recommended is None else (True, True, 4, scaled)
        for name, value in zip(_GROUP_FIELDS[1:], chosen, strict=True):
            if getattr(self, name) is None:
                setattr(self, name, value)

    def _suits_coarse_scales(self) -> bool:
        """Whether the groups of "auto" may be small ones with 4-bit scales and zero points."""
        wanted = self.quant_scale is not False and self.quant_zero is not False and self.meta_nbits in (None, 4)
        return wanted and self.format == "int" and self.axis == 1 and not self.integer_zero

    def _with_groups(self, tag: str) -> dict[str, Any] | None:
        """The entry of ``tag``, checked, with numbers for what is chosen for it rather than inherited."""
        given = {name: getattr(self, name) for name in _LAYER_FIELDS} | self._given_groups
        entry, layer = (self.dynamic_config or {})[tag], self._for_entry(tag, given)
        if entry is None or layer is None or AUTO not in (given["group_size"], entry.get("group_size")):
            return entry
        return {**entry, **{name: getattr(layer, name) for name in _GROUP_FIELDS}}

    def _check(self) -> None:
        self._check_types()
        self._check_codes()
        self._check_solver()
        self._check_metadata()

    def _check_types(self) -> None:
        for name in ("quant_scale", "quant_zero", "view_as_float", "integer_zero", "rotation"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in _DTYPE_FIELDS:
            if getattr(self, name) not in (None, *SCALE_DTYPES):
                raise ValueError(f"{name} must be None or one of {list(SCALE_DTYPES)}, got {getattr(self, name)}")
        if not _is_int(self.rotation_seed) or not 0 <= self.rotation_seed < 2**63:
            raise ValueError(f"rotation_seed must be an integer from 0 to 2**63 - 1, got {self.rotation_seed!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, got {self.activation!r}")
        if not isinstance(self.skip_modules, list) or not all(isinstance(s, str) and s for s in self.skip_modules):
            raise ValueError(f"skip_modules must be a list of module names, got {self.skip_modules!r}")
        if self.embedding_nbits is not None and (
            not _is_int(self.embedding_nbits) or self.embedding_nbits not in _WIDTHS
        ):
            raise ValueError(f"embedding_nbits must be None or an integer from 1 to 8, got {self.embedding_nbits!r}")
        if self.dynamic_config is not None and not isinstance(self.dynamic_config, dict):
            raise ValueError(f"dynamic_config must be a dict of tags, got {self.dynamic_config!r}")

    def _check_codes(self) -> None:
        fmt = get_format(self.format)
        if not _is_int(self.nbits) or self.nbits not in fmt.widths:
            raise ValueError(
                f"nbits must be an integer out of {list(fmt.widths)} for format {self.format!r}, got {self.nbits!r}"
            )
        if self.group_size is not None and (not _is_int(self.group_size) or self.group_size < 1):
            raise ValueError(f'group_size must be a positive integer, None or "auto", got {self.group_size!r}')
        if not _is_int(self.axis) or self.axis not in (0, 1):
            raise ValueError(f"axis must be 0 (along out_features) or 1 (along in_features), got {self.axis!r}")
        if self.codebook not in CODEBOOKS:
            raise ValueError(f"codebook must be one of {list(CODEBOOKS)}, got {self.codebook!r}")
        if fmt.learned and self.codebook == "row" and self.axis == 0:
            raise ValueError('codebook "row" needs axis 1: with axis 0 a group runs across rows')

    def _check_solver(self) -> None:
        fmt = get_format(self.format)
        get_solver(self.solver)
        if self.solver == "hqq" and not fmt.has_zero_point:
            raise ValueError(
                f'solver "hqq" moves zero points, which format {self.format!r} has not; use "hqq_joint" or "rtn"'
            )
        if self.integer_zero and (not fmt.has_zero_point or self.solver == "hqq" or self.quant_zero):
            raise ValueError(
                'integer_zero needs format "int", solver "hqq_joint" or "rtn", and quant_zero=False; '
                f"got {self.format!r}, {self.solver!r}, quant_zero={self.quant_zero}"
            )
        if not isinstance(self.lp_norm, (int, float)) or not 0 < self.lp_norm <= 2:
            raise ValueError(f"lp_norm must be over 0 and at most 2, got {self.lp_norm!r}")

    def _check_metadata(self) -> None:
        if self.quant_zero and not get_format(self.format).has_zero_point:
            raise ValueError(f"quant_zero needs zero points, which format {self.format!r} has not")
        if not _is_int(self.meta_nbits) or self.meta_nbits not in META_NBITS:
            raise ValueError(f"meta_nbits must be one of {list(META_NBITS)}, got {self.meta_nbits!r}")
        if self.meta_nbits != 8 and not (self.quant_scale or self.quant_zero):
            raise ValueError(f"meta_nbits {self.meta_nbits} needs quant_scale=True or quant_zero=True")

    @property
    def scale_nbits(self) -> int | None:
        """Bits of a stored scale, None where it is a floating-point number."""
        return self.meta_nbits if self.quant_scale else None

    @property
    def zero_nbits(self) -> int | None:
        """Bits of a stored zero point, None where it is a floating-point number."""
        return self.meta_nbits if self.quant_zero else None

    def given_groups(self) -> dict[str, Any]:
        """group_size, quant_scale, quant_zero, meta_nbits and solver as they were given, "auto" and None included.

        ``dataclasses.replace(config, nbits=8, **config.given_groups())`` chooses anew what was chosen for ``config``.
        """
        return dict(self._given_groups)

    def for_tag(self, tag: str | None) -> "HqqConfig | None":
        """Settings of the layers that ``tag`` names (None: of all others); None where they are not to be quantized.

        KeyError for a tag that ``dynamic_config`` has not; ValueError, naming the tag, for a bad entry.
        """
        defaults = {name: getattr(self, name) for name in _LAYER_FIELDS}
        return HqqConfig(**defaults) if tag is None else self._for_entry(tag, defaults)

    def for_embedding(self, in_features: int) -> "HqqConfig | None":
        """Settings that ``embedding_nbits`` gives to a weight whose rows have ``in_features``; None where it is None.

        A row shorter than the group is a group.
        """
        if self.embedding_nbits is None:
            return None
        # Column scales are for few bits: with more they are not worth what they cost.
        solver = _CHOSEN if self.solver == "column_scaled" else self.solver
        config = HqqConfig(
            self.embedding_nbits, solver=solver, scale_dtype=self.scale_dtype, compute_dtype=self.compute_dtype,
            view_as_float=self.view_as_float, lp_norm=self.lp_norm, activation=self.activation,
        )  # fmt: skip
        assert config.group_size is not None
        return config if config.group_size <= in_features else dataclasses.replace(config, group_size=None)

    def _for_entry(self, tag: str, defaults: dict[str, Any]) -> "HqqConfig | None":
        """``for_tag`` with ``defaults`` for what the entry leaves out."""
        entry = (self.dynamic_config or {})[tag]
        if entry is None:
            return None
        if not isinstance(entry, dict) or set(entry) - {*_LAYER_FIELDS, "weight_quant_params"}:
            raise ValueError(f"dynamic_config[{tag!r}] must be None or a dict of {list(_LAYER_FIELDS)}, got {entry!r}")
        if entry.get("group_size") == AUTO:
            defaults = {**defaults, **dict.fromkeys(_GROUP_FIELDS)}
        try:
            return HqqConfig(**{**defaults, **entry})
        except ValueError as error:
            raise ValueError(f"dynamic_config[{tag!r}]: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON-safe values; ``from_dict`` makes an equal config of them."""
        out: dict[str, Any] = {}
        for name in (f.name for f in dataclasses.fields(self) if f.name != "weight_quant_params"):
            value = getattr(self, name)
            out[name] = _dtype_name(value)
        if self.dynamic_config is not None:
            out["dynamic_config"] = {
                tag: None if entry is None else {k: _dtype_name(v) for k, v in entry.items()}
                for tag, entry in self.dynamic_config.items()
            }
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "HqqConfig":
        """Read ``to_dict``'s form; an unknown setting raises ValueError with those on offer."""
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise ValueError(f"unknown HqqConfig options {unknown}; options are {known}")
        return cls(**data)


def hqq_weight_only(nbits: int = 4, group_size: int | Literal["auto"] | None = "auto", **options: Any) -> HqqConfig:
    """``HqqConfig(nbits, group_size, **options)``; an unknown option raises ValueError."""
    return HqqConfig.from_dict({"nbits": nbits, "group_size": group_size, **options})


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_dtype(name: str, value: Any) -> torch.dtype | None:
    if value is None or isinstance(value, torch.dtype):
        return value
    dtype = getattr(torch, str(value).removeprefix("torch."), None)
    if not isinstance(value, str) or not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} must be a torch.dtype or its name, got {value!r}")
    return dtype


def _dtype_name(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _from_hqq_params(params: dict[str, Any]) -> dict[str, Any]:
    """Translate hqq's ``BaseQuantizeConfig`` dict; what has no counterpart raises ValueError."""
    if not isinstance(params, dict):
        raise ValueError(f"weight_quant_params must be a dict, got {params!r}")
    nested = params if "weight_quant_params" in params else {"weight_quant_params": params}
    weight = nested["weight_quant_params"]
    known = {"nbits", "group_size", "axis", "optimize", "round_zero", "channel_wise", "view_as_float"}
    if not isinstance(weight, dict) or set(weight) - known:
        raise ValueError(f"weight_quant_params must be a dict of {sorted(known)}, got {weight!r}")
    unknown = set(nested) - {"weight_quant_params", "scale_quant_params", "zero_quant_params", "offload_meta"}
    if unknown:
        raise ValueError(f"unknown entries {sorted(unknown)} in the hqq quantization parameters")
    if not weight.get("channel_wise", True):
        raise ValueError("weight_quant_params with channel_wise=False (one scale for the tensor) is not offered")
    out = {key: weight[key] for key in ("nbits", "group_size", "axis", "view_as_float") if key in weight}
    if not weight.get("optimize", True):
        out["solver"] = "rtn"
    meta = {kind: nested.get(f"{kind}_quant_params") for kind in ("scale", "zero")}
    out |= {f"quant_{kind}": settings is not None for kind, settings in meta.items()}
    quantized = [settings for settings in meta.values() if settings is not None]
    widths = {settings.get("nbits", 8) if isinstance(settings, dict) else settings for settings in quantized}
    if not widths <= set(META_NBITS) or len(widths) > 1:
        raise ValueError(f"scale_quant_params and zero_quant_params must have the same nbits, 8 or 4, got {meta}")
    return {**out, "meta_nbits": widths.pop()} if widths else out
