"""The page: HTML with its style, its plots and its figures within; whatever comes from a model is escaped."""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hqqtensor.diagnostics.table import megabytes
from hqqtensor.report import plots

MOST_ROWS = 400
"""Longest table of layers."""

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --soft: #57606a; --grid: #d0d7de;
  --series-0: #0969da; --series-1: #bc4c00; --series-2: #1a7f37; --series-3: #8250df; --series-4: #bf3989;
  --series-5: #4d5566; --series-6: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --paper: #0d1117; --ink: #e6edf3; --soft: #9198a1; --grid: #3d444d;
  --series-0: #58a6ff; --series-1: #f0883e; --series-2: #3fb950; --series-3: #bc8cff; --series-4: #f778ba;
  --series-5: #b1bac4; --series-6: #e3b341; } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 46rem; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p.note, figcaption { color: var(--soft); font-size: 0.9rem; }
figure { margin: 0 0 1rem; } svg { width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, sans-serif !important; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
blockquote { margin: 0 0 1rem; padding: 0 0 0 0.8rem; border-left: 3px solid var(--series-0); white-space: pre-wrap; }
.mark { display: inline-block; width: 0.8em; height: 0.8em; border-radius: 50%; margin: 0 0.3em 0 0.8em; }
details { margin: 1rem 0; } summary { cursor: pointer; } pre { overflow-x: auto; font-size: 0.8rem; }
"""


def page(figures: Mapping[str, Any]) -> str:
    """The page for the figures that ``hqqtensor report`` collects."""
    title = escape(figures["name"])
    body = "\n".join(
        (
            _summary(figures), _parts(figures["parts"]), _layers(figures["layers"]), _errors(figures["layers"]),
            _worst(figures["worst"]), _sensitivity(figures["sensitivity"]), _quality(figures),
            _texts(figures["texts"]), _settings(figures),
        )
    )  # fmt: skip
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
{body}
<script type="application/json" id="figures">{json_in_html(figures)}</script>
</body>
</html>
"""


def escape(value: object) -> str:
    """Text for HTML, within elements and attributes alike."""
    return html.escape(str(value), quote=True)


def json_in_html(data: Any) -> str:
    """JSON that no browser takes for markup: the signs that could end the element are written as escapes."""
    text = json.dumps(data, allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table that scrolls sideways where the screen is narrow."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{lines}\n</tbody></table></div>'


def _figure(drawing: str, caption: str) -> str:
    text = escape(caption)
    return f'<figure role="img" aria-label="{text}">{drawing}<figcaption>{text}</figcaption></figure>'


def _summary(figures: Mapping[str, Any]) -> str:
    total = sum(part["code_bytes"] + part["metadata_bytes"] for part in figures["parts"])
    weights = sum(part["weights"] for part in figures["parts"])
    text = f"{figures['architecture']}, {figures['settings']}: {weights:,} weights in {megabytes(total)}"
    source = f" Made from {figures['source']}." if figures["source"] else ""
    lines = [f"<p>{escape(f'{text}, {8 * total / weights:.2f} bits a weight in all.{source}')}</p>"]
    compared = figures["comparison"]
    if compared is not None:
        rows = [
            ("perplexity", f"{compared['perplexity_before']:.3f}", f"{compared['perplexity_after']:.3f}"),
            ("KL to the original, nats a token", "0", f"{compared['kl']:.4f}"),
            ("same next token", "", f"{compared['top1_agreement']:.1%}"),
        ]
        lines.append(table((f"on {compared['tokens']} tokens", "original", "quantized"), rows))
    return "\n".join(lines)


def _parts(parts: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for part in parts:
        nbytes = part["code_bytes"] + part["metadata_bytes"]
        sizes = (megabytes(part["code_bytes"]), megabytes(part["metadata_bytes"]), megabytes(nbytes))
        rows.append((part["part"], f"{part['weights']:,}", *sizes, f"{part['bits_per_weight']:.2f}"))
    header = ("", "weights", "codes", "scales, zeros", "in all", "bits/weight")
    return f"<h2>Where the bytes are</h2>\n{table(header, rows)}"


def _layers(layers: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            layer["name"], "x".join(map(str, layer["shape"])), layer["bits"], layer["group_size"],
            f"{layer['bits_per_weight']:.3f}", f"{layer['bytes']:,}", f"{layer['saturated']:.1%}",
            "" if layer["error"] is None else f"{layer['error']:.2e}",
        )
        for layer in layers[:MOST_ROWS]
    ]  # fmt: skip
    more = "" if len(layers) <= MOST_ROWS else f"<p>{len(layers) - MOST_ROWS} more are in the page's JSON.</p>"
    header = ("weight", "shape", "bits", "group", "bits/weight", "bytes", "end codes", "error")
    details = f"<details><summary>{len(layers)} quantized weights</summary>{table(header, rows)}{more}</details>"
    drawing = ""
    if any(layer["number"] is not None for layer in layers):
        drawing = _figure(plots.bytes_by_layer(layers), "Bytes and bits a weight by decoder layer, metadata counted.")
    return f"<h2>Bytes and bits by layer</h2>\n{drawing}\n{details}"


def _errors(layers: Sequence[Mapping[str, Any]]) -> str:
    if not any(layer["error"] is not None and layer["number"] is not None for layer in layers):
        return '<h2>Error by layer</h2>\n<p class="note">Not known: no --original was given.</p>'
    marks = "".join(
        f'<span class="mark" style="background: var(--series-{i % len(plots.SERIES)})"></span>{escape(kind)}'
        for i, kind in enumerate(plots.kinds_of(layers))
    )
    caption = "Squared error of the weights over the sum of their squares."
    return f'<h2>Error by layer</h2>\n{_figure(plots.error_by_layer(layers), caption)}\n<p class="note">{marks}</p>'


def _worst(worst: Sequence[Mapping[str, Any]]) -> str:
    caption = "Left: weights, before (filled, if the original was given) and after. Right: how often each code is used."
    drawings = [
        f"<h3>{escape(each['name'])}</h3>\n{_figure(plots.worst_layer(each, f'worst-{i}'), caption)}"
        for i, each in enumerate(worst)
    ]
    return "\n".join(["<h2>The worst layers</h2>", *drawings])


def _sensitivity(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        text = "Not known: neither --sensitivity nor --original with --text was given."
        return f'<h2>Sensitivity</h2>\n<p class="note">{text}</p>'
    caption = "What quantizing one weight alone does to the model, in the order of the model."
    if figures["estimated"]:
        caption += f" {figures['estimated']} of {len(figures['layers'])} are estimated from others of the same kind."
    return f"<h2>Sensitivity</h2>\n{_figure(plots.sensitivity(figures), caption)}"


def _quality(figures: Mapping[str, Any]) -> str:
    caption = "KL of the next token against bits a weight, measured on SmolLM2-135M; larger models lose less."
    if figures["quality"]["this"] is None:
        caption += " This model's point needs --original and --text."
    return f"<h2>Quality against size</h2>\n{_figure(plots.quality(figures['quality']), caption)}"


def _texts(texts: Mapping[str, str] | None) -> str:
    if texts is None:
        return ""
    lines = [f'<h2>What it writes</h2>\n<p class="note">{escape(texts["prompt"])}</p>']
    for key, label in (("original", "The original:"), ("quantized", "Quantized:")):
        if texts.get(key) is not None:
            lines.append(f"<p>{label}</p><blockquote>{escape(texts[key])}</blockquote>")
    return "\n".join(lines)


def _settings(figures: Mapping[str, Any]) -> str:
    rows = list(figures["versions"].items())
    config = escape(json.dumps(figures["config"], indent=1))
    return (
        f"<h2>Settings and versions</h2>\n{table(('', 'version'), rows)}\n"
        f"<details><summary>all settings</summary><pre>{config}</pre></details>"
    )
