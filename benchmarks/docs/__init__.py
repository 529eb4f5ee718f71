"""The generated parts of the documentation: tables, plots and the API reference; run ``python -m benchmarks.docs``."""
