import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hqqtensor.search import best_choice

OPTIONS = st.lists(st.tuples(st.integers(0, 50), st.floats(0, 10)), min_size=1, max_size=4)


def by_trying_all(layers, budget):
    """Least loss of all choices that fit; None where none does."""
    fitting = [
        sum(o[1] for o in choice) for choice in itertools.product(*layers) if sum(o[0] for o in choice) <= budget
    ]
    return min(fitting, default=None)


@settings(max_examples=200, deadline=None)
@given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(0, 200))
def test_no_other_choice_within_the_budget_is_better(layers, budget):
    expected = by_trying_all(layers, budget)
    if expected is None:
        with pytest.raises(ValueError, match="smallest settings take"):
            best_choice(layers, budget)
        return
    chosen = [layer[i] for layer, i in zip(layers, best_choice(layers, budget), strict=True)]
    assert sum(size for size, _ in chosen) <= budget
    assert sum(loss for _, loss in chosen) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_two_hundred_layers_of_many_sizes_take_no_time():
    layers = [
        [(int((1000 + 37 * i) * bits), (1 + i % 13) * 4.0**-bits) for bits in (2.25, 2.5, 3.25, 3.5, 4.25, 4.5, 5.25)]
        for i in range(224)
    ]
    budget = int(3.25 * sum(1000 + 37 * i for i in range(224)))
    chosen = best_choice(layers, budget)
    used = sum(layer[i][0] for layer, i in zip(layers, chosen, strict=True))
    assert 0.999 * budget < used <= budget


def test_a_layer_without_settings_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        best_choice([[(1, 1.0)], []], 10)
