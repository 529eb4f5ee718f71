# mypy: disable-error-code="no-untyped-def"
"""Choosing experts of a 3-D weight ``[E, N, K]`` by their numbers, as transformers' expert layers do.

Its "eager" experts take ``weight[e]`` into ``F.linear`` or ``@``. "batched_mm" takes ``weight[experts]``, an expert a
row of activations, into ``torch.bmm``, where ``products`` takes it as either operand. "grouped_mm" calls
``F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)``, which is ``torch._grouped_mm``, on rows sorted by expert; see
also ``hqqtensor.integrations.transformers.experts``.
"""

import torch

from hqqtensor.tensor import HQQTensor

aten = torch.ops.aten


@HQQTensor.implements([aten.index.Tensor])
def _(func, types, args, kwargs):
    self, indices = args
    picked = [i for i in indices if i is not None]
    whole = len(picked) == 1 and indices[0] is picked[0] and not picked[0].is_floating_point()
    if not whole or picked[0].dtype == torch.bool or self.ndim < 3 or self.row_dims > 1:
        raise NotImplementedError("index: only the first dimension (experts) of an HQQTensor, with whole numbers")
    by_expert = [name for name in self.__tensor_flatten__()[0] if name != "act_pre_scale"]
    data = {name: getattr(self, name)[picked[0]] for name in by_expert}
    return self.with_data(**data, shape=torch.Size([*picked[0].shape, *self.shape[1:]]))
