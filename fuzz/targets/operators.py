"""Direct calls of ``torch.ops.hqqtensor.*`` with wrong arguments, compared between the kernels and the plain path."""

import random
from pathlib import Path

import torch

from fuzz.target import Target, Wrong
from fuzz.wrong_calls import LAYOUTS, arguments, check, many, quantizing


class Refused(Exception):
    """Both paths refused the call."""


def _run(number: int, folder: Path) -> None:
    rng = random.Random(number)
    torch.default_generator.manual_seed(number)  # torch.manual_seed looks for every other device, too
    quantizing(rng)
    name = rng.choice([*LAYOUTS, "linear_many"])
    try:
        refused = check(rng, name, many(rng) if name == "linear_many" else arguments(rng, name))
    except SystemExit as difference:
        raise Wrong(str(difference)) from None
    if refused:
        raise Refused


TARGETS = (Target("operators", lambda rng: rng.randrange(2**60), _run, (Refused,)),)
