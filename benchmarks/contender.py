"""What takes part in a comparison of y = x W^T, and the check of its answer before it is timed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

CACHE = 96 << 20
"""Bytes that the copies of a weight must exceed together, so that no cache holds the one whose turn it is."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2, "int8": 8e-2}
"""Largest error of an output in units of the outputs' root mean square, by how a contender computes: over 5 standard
deviations of what rounding activations and outputs to bfloat16, or activations to int8, does to one output."""

T = TypeVar("T")


class WrongAnswer(AssertionError):
    """A contender's product differs from the dense product of its own weight."""


class NotHere(Exception):
    """A peer that is not installed or cannot take this shape; the message says why."""


@dataclass
class Contender:
    """One way to multiply.

    bind: takes activations float32 ``[M, K]`` and returns the run that is timed; converting the activations to what
        the contender wants happens in ``bind``. A run returns the product, ``[M, N]``, as a tensor.
    dense: the float32 weight ``[N, K]`` that the packed one stands for.
    nbytes: bytes of the packed weight, scales and zero points included.
    precision: "float32", "bfloat16" (activations) or "int8" (activations).
    kind: "ours", "dense" or "peer".
    note: what a reader should know, such as how the weight is stored.
    """

    name: str
    kind: str
    nbits: float
    precision: str
    nbytes: int
    bind: Callable[[torch.Tensor], Callable[[], torch.Tensor]]
    dense: Callable[[], torch.Tensor]
    note: str = ""


def copies(value: T, nbytes: int, copy: Callable[[T], T]) -> list[T]:
    """``value`` and as many copies of it as no cache holds."""
    return [value, *(copy(value) for _ in range(copies_needed(nbytes) - 1))]


def copies_needed(nbytes: int) -> int:
    """How many weights of ``nbytes`` no cache holds together."""
    return CACHE // max(nbytes, 1) + 1


def bound_and_checked(contender: Contender, inputs: dict[int, torch.Tensor]) -> dict[int, Callable[[], torch.Tensor]]:
    """The runs for each M of ``inputs``, whose values are the leading rows of the longest one. WrongAnswer if wrong."""
    longest = inputs[max(inputs)]
    if contender.precision == "bfloat16":
        longest = longest.bfloat16().float()
    want = longest @ contender.dense().T
    unit = want.square().mean().sqrt()
    runs = {}
    for M, x in inputs.items():
        runs[M] = contender.bind(x)
        got = runs[M]().float()
        if got.shape != want[:M].shape:
            raise WrongAnswer(f"{contender.name}: shape {list(got.shape)}, expected {list(want[:M].shape)}")
        error = ((got - want[:M]).abs().max() / unit).item()
        if not error <= TOLERANCE[contender.precision]:
            raise WrongAnswer(f"{contender.name}, M={M}: off by {error:.2e} of the outputs' root mean square")
    return runs
