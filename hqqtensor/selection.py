"""Which parameters of a model ``quantize_`` takes, with which settings; nothing here looks at their numbers."""

import dataclasses
import fnmatch
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hqqtensor.config import HqqConfig
from hqqtensor.encode import check_weight
from hqqtensor.tensor import HQQTensor

OUTPUT_LAYER = "lm_head"
"""The tag that stands for the output layer of a transformers model, whatever its name."""

MIN_EMBEDDING_ROWS = 1024
"""Rows from which on an ``nn.Embedding`` of a model that does not say which one is its input embedding counts as one:
smaller ones (positions, token types) save nothing."""

EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "gate_proj", "down_proj")
"""Names of the 3-D weights of transformers' expert modules, in the order in which they are used."""


@dataclass(frozen=True, eq=False)
class Choice:
    """A parameter to quantize.

    names: more than one where it is tied. settings: of this parameter alone, without tags. transposed: the module
    stores it as ``[..., K, N]``, in_features before out_features. row_dims: as in ``HQQTensor``. is_embedding: whether
    the settings are those of ``embedding_nbits``.
    """

    names: tuple[str, ...]
    weight: nn.Parameter
    settings: HqqConfig
    transposed: bool = False
    row_dims: int = 1
    is_embedding: bool = False

    @property
    def is_experts(self) -> bool:
        """Whether this is a 3-D weight of a transformers module of experts."""
        return self.names[0].rpartition(".")[2] in EXPERT_WEIGHTS

    def quantize(self, weight: Tensor) -> nn.Parameter:
        """``weight``, the values of this parameter (on any device), as a quantized parameter of the same shape."""
        rows = weight.detach()
        out = HQQTensor.from_hp(rows.transpose(-1, -2) if self.transposed else rows, self.settings, self.row_dims)
        return nn.Parameter(out.transpose(-1, -2) if self.transposed else out, requires_grad=False)

    def matrix_shape(self) -> list[int]:
        """``[..., N, K]``: the weight's shape as it is grouped."""
        return _matrix_shape(self.weight, self.transposed, self.row_dims)

    def check(self, weight: Tensor) -> None:
        """Raise TypeError or ValueError, naming the parameter, where ``weight`` cannot be quantized as wanted."""
        if type(weight) in (Tensor, nn.Parameter) and self.transposed:
            weight = weight.detach().transpose(-1, -2)
        check_weight(weight, self.settings, self.names[0], self.row_dims)


@dataclass(frozen=True, eq=False)
class _Request:
    """What one module asks for its parameter ``name``.

    tag: the ``dynamic_config`` entry that says so, None for other settings. settings: None leaves it alone.
    is_embedding: whether the settings are those of ``embedding_nbits``.
    """

    name: str
    weight: nn.Parameter
    tag: str | None
    settings: HqqConfig | None
    transposed: bool
    row_dims: int
    is_embedding: bool

    @property
    def rank(self) -> int:
        """Of two requests for a tied weight the one of higher rank is followed."""
        return 2 if self.tag is not None else int(self.is_embedding)


def choose(
    model: nn.Module,
    config: HqqConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    ties: Mapping[str, str] | None = None,
) -> tuple[list[Choice], list[str]]:
    """The parameters to quantize, and the names of modules that are quantized already.

    Taken are linear layers and experts (or the modules that ``filter_fn`` accepts), and the embeddings and
    convolutions that a ``dynamic_config`` tag names, less ``skip_modules``, of which "lm_head" stands for the output
    layer of a transformers model under any name. With ``embedding_nbits`` the input embedding (``get_input_embeddings``
    of a transformers model, elsewhere every ``nn.Embedding`` of at least MIN_EMBEDDING_ROWS rows) and the output layer
    are taken too, "lm_head" or not. Tied weights take the settings that a tag gives to any of their modules, else those
    of ``embedding_nbits`` if it is for one of them, else the default ones.

    Works on the meta device. ``ties``: names of parameters that will be the same one as another, {name: other name}, in
    a model where they are not yet.

    Raises ValueError for a tag that matches nothing, and for tied weights of which ``skip_modules`` names one or tags
    ask for different settings; TypeError for a weight that is computed (parametrized).
    """
    tags = config.dynamic_config or {}
    settings_of: dict[str | None, HqqConfig | None] = {tag: config.for_tag(tag) for tag in (None, *tags)}
    embeddings: set[nn.Module] = set()
    if config.embedding_nbits is not None:
        embeddings = _embeddings(model)
        skip = [tag for tag in config.skip_modules if tag != OUTPUT_LAYER]
    else:
        skip = config.skip_modules + (output_layers(model) if OUTPUT_LAYER in config.skip_modules else [])
    config = dataclasses.replace(config, skip_modules=skip)
    used_tags: set[str] = set()
    requests: dict[int, list[_Request]] = {}
    already: list[str] = []
    for name, module in model.named_modules():
        parameters = _candidates(module)
        matching = [tag for tag in tags if parameters and tag_matches(tag, name)]
        used_tags.update(matching)
        is_embedding = module in embeddings
        is_taken = filter_fn(module, name) if filter_fn is not None else _by_default(module) or is_embedding
        is_named = matching and filter_fn is None and isinstance(module, (nn.Embedding, _ConvNd))
        if not (is_taken or is_named) or skipped(name, config):
            continue
        tag = max(matching, key=lambda t: (t.count("."), len(t)), default=None)
        for leaf, transposed, row_dims in parameters:
            full = f"{name}.{leaf}" if name else leaf
            weight, settings = module._parameters.get(leaf), settings_of[tag]
            if tag is None and is_embedding and weight is not None:
                settings = config.for_embedding(_matrix_shape(weight, transposed, row_dims)[-1])
            if settings is not None and isinstance(getattr(module, leaf), HQQTensor):
                already.append(name)
            elif settings is not None and weight is None:
                raise TypeError(f"{name}: its weight is computed (parametrized), not a parameter; remove that first")
            elif weight is not None:
                request = _Request(full, weight, tag, settings, transposed, row_dims, tag is None and is_embedding)
                requests.setdefault(id(weight), []).append(request)
    unused = [tag for tag in tags if tag not in used_tags]
    if unused:
        raise ValueError(f"dynamic_config tags {unused} match no module with a weight of rank 2 or more")
    choices = [_decide(tied, names, config) for tied, names in _tied_requests(model, requests, ties or {})]
    return [choice for choice in choices if choice is not None], already


def _tied_requests(
    model: nn.Module, requests: dict[int, list[_Request]], ties: Mapping[str, str]
) -> list[tuple[list[_Request], list[str]]]:
    """The requests for each weight and the names of all that use it, where tied weights are one weight."""
    names_by_id: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_by_id.setdefault(id(parameter), []).append(name)
    for name, other in ties.items():
        first, second = (names_by_id[id(model.get_parameter(n))] for n in (other, name))
        if first is not second:
            first += second
            names_by_id |= dict.fromkeys((id(model.get_parameter(n)) for n in second), first)
    groups: dict[int, tuple[list[_Request], list[str]]] = {}
    for weight_id, of_weight in requests.items():
        names = names_by_id[weight_id]
        groups.setdefault(id(names), ([], names))[0].extend(of_weight)
    return list(groups.values())


def _decide(requests: list[_Request], names: list[str], config: HqqConfig) -> Choice | None:
    """What all modules that use one weight agree on; None leaves it alone."""
    first = requests[0]
    explicit = [request for request in requests if request.tag is not None]
    decisive = max(requests, key=lambda request: request.rank)  # the first of several
    for other in explicit[1:]:
        if other.settings != decisive.settings:
            raise ValueError(
                f"{decisive.name} is tied to {other.name}, but dynamic_config has different settings for them, under "
                f"{decisive.tag!r} and {other.tag!r}: give both the same, or only one of them an entry"
            )
    if decisive.settings is None:
        return None
    for owner in names:
        tag = skipped(owner.rpartition(".")[0], config)
        if tag:
            raise ValueError(f"{decisive.name} is tied to {owner}, which skip_modules ({tag!r}) leaves alone")
    for other in requests:
        if (other.transposed, other.row_dims) != (first.transposed, first.row_dims):
            raise ValueError(f"{other.name} is tied to {first.name}, but their modules store it differently")
    ordered = (first.name, *(name for name in names if name != first.name))
    layout = (first.transposed, first.row_dims)
    return Choice(ordered, first.weight, decisive.settings, *layout, decisive.is_embedding)


def check_shapes(choices: list[Choice]) -> None:
    """``Choice.check`` by shape and dtype alone, for parameters on the meta device that are loaded later."""
    seen: set[tuple[object, ...]] = set()
    for choice in choices:
        weight = choice.weight
        key = (weight.shape, weight.dtype, repr(choice.settings), choice.transposed, choice.row_dims)
        if key not in seen:
            seen.add(key)
            choice.check(torch.zeros((), dtype=weight.dtype, device="cpu").expand(weight.shape))


def output_layers(model: nn.Module) -> list[str]:
    """Names of the modules that "lm_head" stands for."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return [name for name, module in model.named_modules() if module is head or tag_matches(OUTPUT_LAYER, name)]


def embeddings_and_output(model: nn.Module) -> set[str]:
    """Names of all embeddings and of the output layer of a transformers model: what other libraries keep dense."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {name for name, module in model.named_modules() if isinstance(module, nn.Embedding) or module is head} - {""}


def _embeddings(model: nn.Module) -> set[nn.Module]:
    """The input embedding and the output layer, as far as they can be quantized."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        inputs = [get()] if callable(get) else None
    except NotImplementedError:  # transformers says so where a model has none of a known name
        inputs = None
    if inputs is None:
        inputs = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings >= MIN_EMBEDDING_ROWS]
    outputs = [model.get_submodule(name) for name in output_layers(model)]
    return {m for m in inputs if isinstance(m, nn.Embedding)} | {m for m in outputs if _by_default(m)}


def _by_default(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module) or is_experts(module)


def row_dims(module: nn.Module) -> int:
    """``HQQTensor.row_dims`` of the module's weight: a convolution's kernels lie in its rows."""
    return module.weight.ndim - 1 if isinstance(module, _ConvNd) else 1


def _matrix_shape(weight: Tensor, transposed: bool, row_dims: int) -> list[int]:
    shape = weight.shape
    if transposed:
        return [*shape[:-2], shape[-1], shape[-2]]
    return [*shape[:-row_dims], math.prod(shape[-row_dims:])]


def _candidates(module: nn.Module) -> list[tuple[str, bool, int]]:
    """Parameters of rank 2 and more that may be quantized: (name, whether it is stored ``[..., K, N]``, row_dims)."""
    if is_experts(module):
        weights = [(name, module._parameters.get(name)) for name in EXPERT_WEIGHTS]
        return [(name, bool(module.is_transposed), 1) for name, w in weights if w is not None and w.ndim == 3]
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        return []
    return [("weight", _is_conv1d(module), row_dims(module))]


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): a linear layer that stores its weight as ``[K, N]``."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


def is_experts(module: nn.Module) -> bool:
    """A transformers module of 3-D expert weights: its class went through ``use_experts_implementation``."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(type(module), "_apply_gate")


def tag_matches(tag: str, name: str) -> bool:
    """Whether ``tag``'s dotted parts match a run of the parts of ``name``; ``*`` in a part matches anything."""
    patterns, parts = tag.split("."), name.split(".")
    return any(
        all(fnmatch.fnmatchcase(part, pattern) for part, pattern in zip(parts[start:], patterns, strict=False))
        for start in range(len(parts) - len(patterns) + 1)
    )


def skipped(name: str, config: HqqConfig) -> str | None:
    """The ``skip_modules`` tag that leaves the module ``name`` alone, if any."""
    return next((tag for tag in config.skip_modules if tag_matches(tag, name)), None)


def counting(choices: list[Choice], progress: Callable[[int, int, str], None] | None) -> Callable[[int, str], None]:
    """A function to call with each weight's count of numbers and its name; it tells ``progress`` how many are done."""
    total, done = sum(choice.weight.numel() for choice in choices), 0

    def report(elements: int, name: str) -> None:
        nonlocal done
        done += elements
        if progress is not None:
            progress(done, total, name)

    return report
