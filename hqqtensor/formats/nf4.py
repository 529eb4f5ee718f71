"""NF4: 16 quantiles of the normal distribution, from -1 to 1 with an exact zero.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, section 3 and appendix E. With Q the normal
quantile function and d = (1/2) ((1 - 1/30) + (1 - 1/32)): the positive levels are Q of 8 points evenly spaced from d
down to, but without, 1/2, the negative ones -Q of 7 such points, all divided by Q(d). The numbers are those of the
appendix, so that codes and tables of other libraries can be read; they agree with the formula to 1e-6.
"""

import torch

from hqqtensor.formats.base import register_format
from hqqtensor.formats.levels import Levels
from hqqtensor.formats.table import TableFormat

VALUES = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
"""The value of each code, ascending."""

NF4 = TableFormat("nf4", VALUES, Levels.between(VALUES), torch.arange(16, dtype=torch.uint8))
register_format(NF4)
