"""The multiple-choice knapsack: one setting for each layer, least total loss within a budget of bytes, exactly.

Layers are added one by one. Of the partial choices, those remain that no other beats in both bytes and loss. A partial
choice is dropped as well where the layers to come cannot bring it below the best whole choice known, not even if
fractions of settings were allowed (the linear relaxation; Sinha and Zoltners 1979). That leaves few, and neither rule
drops an optimum.
"""

import itertools
from collections.abc import Sequence

import numpy as np

Options = Sequence[tuple[int, float]]
"""(bytes, loss) of each setting of a layer."""


def best_choice(layers: Sequence[Options], budget: int) -> list[int]:
    """Index of the setting of each layer; ValueError where even the smallest do not fit ``budget`` bytes."""
    if any(not options for options in layers):
        raise ValueError("every layer needs at least one setting")
    least = sum(min(size for size, _ in options) for options in layers)
    if least > budget:
        raise ValueError(f"the smallest settings take {least} bytes, over the budget of {budget}")
    # Layers whose sizes differ most come first: the bounds then exclude more partial choices early.
    order = sorted(range(len(layers)), key=lambda i: -(max(o[0] for o in layers[i]) - min(o[0] for o in layers[i])))
    to_come = [_Relaxation([layers[i] for i in order[depth:]]) for depth in range(len(order) + 1)]
    best_known = to_come[0].rounded_down(budget)

    sizes, losses = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []  # at each depth: where a state came from, which setting it took
    for depth, i in enumerate(order):
        extra = np.array([o[0] for o in layers[i]], np.int64)
        more = np.array([o[1] for o in layers[i]])
        size, loss = (sizes[:, None] + extra).ravel(), (losses[:, None] + more).ravel()
        # A little slack: sums in another order must not drop the best choice itself.
        bound = loss + to_come[depth + 1].bound(budget - size)
        keep = np.flatnonzero(bound <= best_known + 1e-12 * max(1.0, abs(best_known)))
        keep = keep[np.lexsort((loss[keep], size[keep]))]
        falling = np.minimum.accumulate(loss[keep])
        keep = keep[np.concatenate([[True], loss[keep][1:] < falling[:-1]])]
        sizes, losses = size[keep], loss[keep]
        trail.append((keep // len(extra), keep % len(extra)))
    state = int(losses.argmin())
    chosen = [0] * len(layers)
    for i, (parent, setting) in zip(reversed(order), reversed(trail), strict=True):
        chosen[i] = int(setting[state])
        state = int(parent[state])
    return chosen


class _Relaxation:
    """Least loss of some layers by budget when fractions of settings are allowed: convex, piecewise linear."""

    def __init__(self, layers: Sequence[Options]) -> None:
        steps: list[tuple[float, int, float]] = []
        size, loss = 0, 0.0
        for options in layers:
            hull = _hull(options)
            size, loss = size + hull[0][0], loss + hull[0][1]
            for (a, x), (b, y) in itertools.pairwise(hull):
                steps.append(((y - x) / (b - a), b - a, y - x))
        steps.sort()
        self.sizes = np.cumsum([size, *[s[1] for s in steps]]).astype(np.float64)
        self.losses = np.cumsum([loss, *[s[2] for s in steps]])

    def bound(self, budget: np.ndarray) -> np.ndarray:
        """Lower bounds of the loss within ``budget``; infinite where nothing fits."""
        return np.where(budget < self.sizes[0], np.inf, np.interp(budget, self.sizes, self.losses))

    def rounded_down(self, budget: int) -> float:
        """The loss of a whole choice: the steps of the hulls that fit, in order, without the first that does not."""
        fits = np.flatnonzero(self.sizes <= budget)
        return float(self.losses[fits[-1]])


def _hull(options: Options) -> list[tuple[int, float]]:
    """The settings on the lower convex hull, smallest first, each larger one with less loss."""
    hull: list[tuple[int, float]] = []
    for size, loss in sorted(options):
        if hull and loss >= hull[-1][1]:
            continue
        while len(hull) > 1 and (loss - hull[-1][1]) * (hull[-1][0] - hull[-2][0]) <= (hull[-1][1] - hull[-2][1]) * (
            size - hull[-1][0]
        ):
            hull.pop()
        if hull and hull[-1][0] == size:
            hull.pop()
        hull.append((size, loss))
    return hull
