"""A monitor's figures as Prometheus metrics, read when they are asked for, through prometheus_client."""

from collections.abc import Callable, Iterator
from typing import Any

from hqqtensor.diagnostics.usage import UsagePerformance

Report = Callable[[], UsagePerformance]


def text(report: Report) -> str:
    """The figures in Prometheus' text format."""
    return _client().generate_latest(_registry(report)).decode()


def serve(report: Report, port: int, address: str) -> tuple[int, Callable[[], None]]:
    """Answer ``http://address:port/metrics`` in a thread; the port, and what stops it."""
    server, thread = _client().start_http_server(port, address, registry=_registry(report))

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, stop


def _client() -> Any:
    try:
        import prometheus_client
    except ImportError as error:
        raise ImportError("Prometheus metrics need prometheus_client (pip install 'hqqtensor[monitor]')") from error
    return prometheus_client


def _registry(report: Report) -> Any:
    registry = _client().CollectorRegistry()
    registry.register(_Collector(report))
    return registry


class _Collector:
    """Gives the metrics when they are asked for: nothing is counted twice."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def describe(self) -> list[Any]:
        """No metrics are named before they are asked for."""
        return []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily as Counter
        from prometheus_client.core import GaugeMetricFamily as Gauge

        report = self._report()
        passes = Counter("hqqtensor_passes", "Forward passes.", labels=["kind"])
        tokens = Counter("hqqtensor_tokens", "Tokens (or samples) that went into forward passes.", labels=["kind"])
        seconds = Counter("hqqtensor_model_seconds", "Seconds within the model.", labels=["kind"])
        latency = Gauge("hqqtensor_pass_seconds", "Seconds of a recent pass.", labels=["kind", "quantile"])
        for kind, times in report.passes.items():
            passes.add_metric([kind], times.count)
            tokens.add_metric([kind], times.tokens)
            seconds.add_metric([kind], times.seconds)
            for quantile, value in (("0.5", times.p50), ("0.95", times.p95), ("0.99", times.p99)):
                latency.add_metric([kind, quantile], value)
        labels = ["op", "backend", "bits", "out_features", "in_features", "rows"]
        products = Counter("hqqtensor_products", "Products with quantized weights.", labels=labels)
        read = Counter(
            "hqqtensor_read_bytes", "Bytes of quantized weights that products read.", labels=["op", "backend"]
        )
        fallbacks = Counter("hqqtensor_fallbacks", "Products without a kernel for packed weights.", labels=["op"])
        merged: dict[tuple[str, ...], int] = {}
        by_op: dict[tuple[str, str], int] = {}
        fallen: dict[str, int] = {}
        for p in report.products:
            key = (p.op, p.backend, str(p.nbits), str(p.out_features), str(p.in_features), str(p.rows))
            merged[key] = merged.get(key, 0) + p.calls
            by_op[p.op, p.backend] = by_op.get((p.op, p.backend), 0) + p.nbytes
            if p.is_fallback:
                fallen[p.op] = fallen.get(p.op, 0) + p.calls
        for values, calls in merged.items():
            products.add_metric(list(values), calls)
        for pair, nbytes in by_op.items():
            read.add_metric(list(pair), nbytes)
        for op, calls in fallen.items():
            fallbacks.add_metric([op], calls)
        yield from (passes, tokens, seconds, latency, products, read, fallbacks)
        yield Gauge(
            "hqqtensor_memory_bandwidth_bytes_per_second",
            "Bytes a second that this machine reads.",
            value=report.memory_bandwidth,
        )
        yield Gauge("hqqtensor_resident_bytes", "Resident memory of the process.", value=report.resident)
        yield Gauge("hqqtensor_model_bytes", "Bytes of the model's parameters.", value=report.model_bytes)
