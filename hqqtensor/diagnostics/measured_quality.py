"""What settings lose, measured: a few rows of docs/data/quality.json, which a test compares with this table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """model, method: the names of the row in docs/data. bits: of a weight of the layers, metadata counted.

    kl: mean KL of the next-token distribution to the dense model, in nats. agreement: share of tokens where both rank
    the same token first.
    """

    model: str
    method: str
    bits: float
    kl: float
    agreement: float


MEASURED = {
    "8": Measured("doclm", "hqqtensor 8-bit g64", 8.5, 0.0, 0.997),
    "4": Measured("SmolLM2", "hqqtensor 4-bit default", 4.4904, 0.1376, 0.8035),
    "3 good": Measured("SmolLM2", "hqqtensor 3-bit default, own text", 3.4904, 0.2825, 0.7387),
    "3": Measured("SmolLM2", "hqqtensor 3-bit default", 3.4904, 0.5407, 0.6285),
    "2 good": Measured("SmolLM2", "hqqtensor 2-bit g16 4-bit meta, own text", 2.5668, 0.8862, 0.5515),
    "2": Measured("SmolLM2", "hqqtensor 2-bit default", 2.4904, 4.3936, 0.1712),
}
"""By bits of the recommended settings, "good" where they are calibrated (``quality="good"``). SmolLM2 has 135 million
parameters and doclm 6 million; larger models lose less at the same bits."""

CLASSES = (("near lossless", 0.95), ("good", 0.78), ("fair", 0.6), ("poor", 0.0))
"""Names for what a setting loses, and the share of next tokens from which on each is given."""


def quality_class(agreement: float) -> str:
    """The name for a share of next tokens that stay the same."""
    return next(name for name, least in CLASSES if agreement >= least)
