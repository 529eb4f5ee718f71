"""What a PerformanceMonitor saw: typed figures, a table, and what JSON holds."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hqqtensor.diagnostics.table import megabytes, text_table


@dataclass(frozen=True)
class PassTimes:
    """Forward passes of one kind. tokens: those that went in, or samples. seconds: of all passes.

    p50, p95, p99, longest: seconds of a pass, of the last 10,000 passes.
    """

    count: int
    tokens: int
    seconds: float
    p50: float
    p95: float
    p99: float
    longest: float

    @staticmethod
    def of(count: int, tokens: int, seconds: float, latencies: Sequence[float]) -> "PassTimes":
        """From latencies in ascending order, at least one."""
        last = len(latencies) - 1
        p50, p95, p99 = (latencies[round(last * share)] for share in (0.5, 0.95, 0.99))
        return PassTimes(count, tokens, seconds, p50, p95, p99, latencies[-1])

    @property
    def rate(self) -> float:
        """Tokens (or samples) a second of time within the model."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class ProductCount:
    """Calls of one operator with weights of one kind.

    op: its name, "decoder" for products within decoder layers (``prepare_for_generation_``). backend: what computed
    them; for the compiled kernels with the instruction set. rows: of the activations (for an embedding, rows looked
    up), rounded up to a power of two; 0 where there are none. nbytes: of packed weights, scales and zero points that
    all calls read; experts count in full in ``grouped_linear``, by the share that was chosen in "decoder".
    """

    op: str
    backend: str
    rows: int
    out_features: int
    in_features: int
    nbits: int
    format: str
    group_size: int
    calls: int
    nbytes: int

    @property
    def is_fallback(self) -> bool:
        """Whether this is the plain path, or a weight that was made dense."""
        return self.backend == "reference" or self.op in ("dequantize", "dequantize_into")

    def describe(self) -> str:
        """In words."""
        weight = f"{self.nbits}-bit {self.format} g{self.group_size} [{self.out_features}, {self.in_features}]"
        return f"{self.op} of {weight} by {self.backend}, {self.calls:,} times"


@dataclass(frozen=True)
class UsagePerformance:
    """seconds: since the block began, or of the whole block. passes: by kind, "prompt", "decode" and "samples".

    products: those with the most bytes first; dense layers and compiled graphs are not among them.
    memory_bandwidth: bytes a second that this machine reads. resident, most_resident: bytes of the process, mapped
    files included, as seen every quarter of a second. model_bytes: of all parameters. why_no_decoder: why a model that
    ``prepare_for_generation_`` prepared is not served by a decoder; None where it is, or was not prepared.
    """

    seconds: float
    passes: dict[str, PassTimes]
    products: list[ProductCount]
    memory_bandwidth: float
    resident: int
    most_resident: int
    model_bytes: int
    why_no_decoder: str | None

    @property
    def bytes_read(self) -> int:
        """Bytes of quantized weights that products read."""
        return sum(product.nbytes for product in self.products)

    @property
    def read_rate(self) -> float:
        """Bytes of quantized weights a second of time within the model."""
        seconds = sum(times.seconds for times in self.passes.values())
        return self.bytes_read / seconds if seconds else 0.0

    @property
    def fallbacks(self) -> list[str]:
        """In words: what did not run in a kernel for packed weights, and why where that is known."""
        texts = [product.describe() for product in self.products if product.is_fallback]
        return texts + ([f"no decoder: {self.why_no_decoder}"] if self.why_no_decoder else [])

    def to_dict(self) -> dict[str, Any]:
        """All fields and the figures that follow from them, as JSON can hold them."""
        passes = {kind: {**dataclasses.asdict(times), "rate": times.rate} for kind, times in self.passes.items()}
        figures = {"bytes_read": self.bytes_read, "read_rate": self.read_rate, "fallbacks": self.fallbacks}
        return {**dataclasses.asdict(self), "passes": passes, **figures}

    def __str__(self) -> str:
        rows = [
            (
                kind,
                f"{times.count:,}",
                f"{times.tokens:,}",
                f"{times.rate:,.1f}",
                *(f"{1e3 * seconds:.1f}" for seconds in (times.p50, times.p95, times.p99, times.longest)),
            )
            for kind, times in self.passes.items()
        ]
        header = ("passes", "count", "tokens", "tokens/s", "p50 ms", "p95 ms", "p99 ms", "longest")
        lines = [text_table(header, rows) if rows else "no forward pass yet"]
        busy = sum(times.seconds for times in self.passes.values()) / self.seconds if self.seconds else 0.0
        share = self.read_rate / self.memory_bandwidth if self.memory_bandwidth else 0.0
        lines.append(f"{self.seconds:.1f} s, {busy:.0%} of it in the model")
        rates = [f"{rate / 1e9:.1f} GB/s" for rate in (self.read_rate, self.memory_bandwidth)]
        lines.append(f"weights read at {rates[0]}, {share:.0%} of the {rates[1]} that this machine reads")
        lines.append(
            f"{megabytes(self.resident)} resident, at most {megabytes(self.most_resident)}; the model has "
            f"{megabytes(self.model_bytes)}"
        )
        if self.products:
            lines += ["", text_table(_PRODUCT_HEADER, [_product_row(product) for product in self.products])]
        lines += [f"fallback: {text}" for text in self.fallbacks]
        return "\n".join(lines)


_PRODUCT_HEADER = ("product", "by", "rows", "weight", "bits", "group", "calls", "read")


def _product_row(product: ProductCount) -> tuple[str, ...]:
    return (
        product.op,
        product.backend,
        str(product.rows),
        f"{product.out_features}x{product.in_features}",
        f"{product.nbits}" if product.format == "int" else f"{product.nbits} {product.format}",
        str(product.group_size),
        f"{product.calls:,}",
        megabytes(product.nbytes),
    )
