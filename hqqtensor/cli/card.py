"""``hqqtensor card``: the README.md of a quantized model, with what its files say of it."""

import argparse
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import hqqtensor
from hqqtensor.cli import byte_table, model_dir
from hqqtensor.cli.dry_run import settings_of
from hqqtensor.cli.errors import UsageError, writing
from hqqtensor.cli.output import print_json
from hqqtensor.config import HqqConfig
from hqqtensor.diagnostics.byte_parts import BytePart
from hqqtensor.diagnostics.table import megabytes
from hqqtensor.whole_file import write_text_whole

_VERSIONS = ("torch", "torchao", "transformers")


def run(args: argparse.Namespace) -> int:
    """Read config and headers, write or print the card."""
    entry = model_dir.quantization_of(args.dir)
    if entry is None:
        raise UsageError(f"{args.dir} is not quantized: its config.json has no quantization_config")
    facts = facts_of(args.dir, entry)
    text = card(facts)
    if args.output is not None:
        with writing(args.output):
            write_text_whole(args.output, text)
    if args.json:
        print_json({**facts, "parts": byte_table.as_dicts(facts["parts"]), "card": text})
    elif args.output is None:
        print(text, end="")
    else:
        print(f"wrote {args.output}")
    return 0


def facts_of(directory: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """What the card says; all but ``parts`` is JSON-safe."""
    settings = {k: v for k, v in entry.items() if k not in ("quant_method", "source")}
    config = HqqConfig.from_dict(settings)
    model_config = model_dir.read_config(directory)
    return {
        "name": directory.resolve().name,
        "source": entry.get("source") if isinstance(entry.get("source"), str) else None,
        "architecture": str((model_config.get("architectures") or ["a model"])[0]),
        "writes_text": bool(model_dir.empty_model_of(directory).can_generate()),  # type: ignore[operator]
        "settings": settings_of(config),
        "config": config.to_dict(),
        "parts": byte_table.parts_of(directory),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of hqqtensor, Python and the libraries that make the model."""
    return {
        "hqqtensor": hqqtensor.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _VERSIONS},
    }


def card(facts: dict[str, Any]) -> str:
    """The card as Markdown with a head of YAML, as the hub reads it; JSON texts are YAML texts."""
    parts: list[BytePart] = facts["parts"]
    total, weights = sum(part.nbytes for part in parts), sum(part.weights for part in parts)
    head = ["library_name: transformers", "tags:", "- hqqtensor", "- quantized"]
    if facts["writes_text"]:
        head.insert(1, "pipeline_tag: text-generation")
    if facts["source"]:
        head.append(f"base_model: {json.dumps(_plain(facts['source']))}")
    title, source = _plain(facts["name"]), _plain(facts["source"] or "a model")
    table = "\n".join("| " + " | ".join(row) + " |" for row in (byte_table.HEADER, ["---"] * 7, *_rows(parts)))
    loader = "AutoModelForCausalLM" if facts["writes_text"] else "AutoModel"
    return f"""---
{chr(10).join(head)}
---

# {title}

{source} ({_plain(facts["architecture"])}), quantized by
[hqqtensor](https://pypi.org/project/hqqtensor/): {facts["settings"]}.
{weights:,} weights in {megabytes(total)}, {8 * total / weights:.2f} bits a weight in all.

{table}

## Use it
```sh
pip install 'hqqtensor[cli]'
hqqtensor {"chat" if facts["writes_text"] else "inspect"} DIRECTORY
```

```python
import hqqtensor
from transformers import {loader}

model = {loader}.from_pretrained("DIRECTORY", device_map="cpu")
{"hqqtensor.prepare_for_generation_(model)  # fast generate() on a CPU" if facts["writes_text"] else ""}
```

## How it was made
Written with {", ".join(f"{name} {version}" for name, version in facts["versions"].items())}. The settings:

```json
{json.dumps(facts["config"], indent=1)}
```
"""


def _rows(parts: list[BytePart]) -> list[tuple[str, ...]]:
    return byte_table.rows_of(parts)


def _plain(text: str) -> str:
    """A name without the signs that mean something in Markdown or HTML."""
    return "".join(sign if sign.isalnum() or sign in "-_. /" else "?" for sign in text)
