"""One self-contained HTML page about a quantized model: figures, plots of them as inline SVG, and the page."""
