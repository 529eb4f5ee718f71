"""The loops of benchmarks.export_decode around a package."""

import torch
from torch import Tensor

from benchmarks.export_decode import PackageRunner, measure, prompt_by_tokens


def counting(input_ids: Tensor, cache_position: Tensor) -> Tensor:
    """Logits whose likeliest token is one more than the last position; prompts only where they start at 0."""
    assert input_ids.shape == (1, len(cache_position))
    assert len(cache_position) == 1 or cache_position[0] == 0
    calls.append(len(cache_position))
    return torch.nn.functional.one_hot(cache_position + 1, 32)[None].float()


calls: list[int] = []


def test_a_prompt_goes_in_whole_or_token_by_token_and_gives_the_same_tokens() -> None:
    ids = torch.randint(0, 32, (1, 5))
    runners = [PackageRunner("any", counting), PackageRunner("one", prompt_by_tokens(counting))]
    calls.clear()
    rows = measure(runners, ids, new=4, rounds=0)
    assert [row["tokens"] for row in rows] == [[5, 6, 7, 8]] * 2
    assert calls == [5, 1, 1, 1] + [1] * 8
    assert all(row["tokens/s"] > 0 for row in rows)
