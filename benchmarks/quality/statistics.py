"""Bootstrap over windows: how sure a mean, or a ratio of two means over the same windows, is."""

import torch

RESAMPLES, SEED = 2000, 0


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high): the mean and its 95 % percentile interval."""
    means = _resample(torch.tensor(values, dtype=torch.float64))
    return sum(values) / len(values), *_ends(means)


def ratio_interval(values: list[float], base: list[float]) -> tuple[float, float, float]:
    """(ratio, low, high) of two means over the same windows, resampled together."""
    if len(values) != len(base):
        raise ValueError(f"the two must be over the same windows, got {len(values)} and {len(base)}")
    pair = torch.tensor([values, base], dtype=torch.float64)
    top, bottom = _resample(pair[0]), _resample(pair[1])
    return (pair[0].mean() / pair[1].mean()).item(), *_ends(top / bottom)


def _resample(values: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED)
    picks = torch.randint(0, len(values), (RESAMPLES, len(values)), generator=generator)
    return values[picks].mean(-1)


def _ends(samples: torch.Tensor) -> tuple[float, float]:
    low, high = samples.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
