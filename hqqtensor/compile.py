"""For torch.compile: products of one input joined, as ``q``, ``k`` and ``v`` or ``gate`` and ``up`` of a transformer:
``torch.compile(model, options={"post_grad_custom_pre_pass": JoinLinears()})``.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from hqqtensor import ops as ops  # defines the operators

LINEAR, LINEAR_MANY = torch.ops.hqqtensor._linear.default, torch.ops.hqqtensor._linear_many.default
"""Products as graphs hold them below autograd."""


class JoinLinears(CustomGraphPass):
    """Makes one ``hqqtensor::linear_many`` of the CPU's ``hqqtensor::linear`` calls that share input and settings.

    It wakes threads once, and prepares activations once where no ``act_pre_scale`` tells weights apart. Parts of its
    result are views. Left alone are weights that the graph computes and codebooks.
    """

    def __call__(self, graph: fx.Graph) -> None:
        alike: defaultdict[tuple[object, ...], list[fx.Node]] = defaultdict(list)
        for node in graph.find_nodes(op="call_function", target=LINEAR):
            x, *weight, act_pre_scale, meta, nbits, format, group_size, axis, K, activation = node.args
            tensors = (*weight, act_pre_scale, *(meta or ()))
            stored = all(t is None or t.op == "placeholder" for t in tensors)
            if stored and format != "codebook" and x.meta["val"].is_cpu:
                node_settings = (nbits, format, group_size, axis, K, activation)
                alike[(x, _kinds(tensors), *node_settings)].append(node)
        for (x, _, *settings), nodes in alike.items():
            if len(nodes) > 1:
                _join(graph, x, nodes, settings)  # type: ignore[arg-type]

    def uuid(self) -> object:
        return get_hash_for_files((__file__,))


def _kinds(tensors: Sequence[fx.Node | None]) -> tuple[object, ...]:
    """What must be equal of the tensors of two weights: which there are, and their dtypes (that of scales tells bits)."""
    return tuple(None if t is None else t.meta["val"].dtype for t in tensors)


def _join(graph: fx.Graph, x: fx.Node, nodes: list[fx.Node], settings: list[object]) -> None:
    # qdata, scale, zero point, bias, act_pre_scale; None where the weights have none.
    *parts, act_pre_scales = [[n.args[i] for n in nodes if n.args[i] is not None] or None for i in range(1, 6)]
    meta = [t for n in nodes for t in n.args[6] or ()] or None  # type: ignore[union-attr, arg-type]
    aten = torch.ops.aten

    def call(target: torch._ops.OpOverload, *args: object) -> fx.Node:
        node = graph.call_function(target, args)  # type: ignore[arg-type]
        node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))  # type: ignore[type-var]
        return node

    with graph.inserting_before(nodes[0]):
        joined, start = call(LINEAR_MANY, x, *parts, *settings, meta, act_pre_scales), 0
        for node in nodes:
            end = start + node.meta["val"].shape[-1]
            node.replace_all_uses_with(call(aten.slice.Tensor, joined, x.meta["val"].dim() - 1, start, end))
            start = end
    for node in nodes:
        graph.erase_node(node)
