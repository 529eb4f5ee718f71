"""The command to try next on a directory that was written."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

from hqqtensor.cli import model_dir


def command_to_try(out: Path) -> str:
    """The command that shows what the model does: to chat with it, to let it write, or to list its tensors."""
    place = shlex.quote(shown_path(out))
    empty: Any = model_dir.empty_model_of(out)
    if not empty.can_generate() or getattr(empty.config, "is_encoder_decoder", False):
        return f"hqqtensor inspect {place}"
    if not any(out.glob("tokenizer*")):
        return f"hqqtensor bench {place}"
    has_template = any(out.glob("chat_template*")) or "chat_template" in _tokenizer_config(out)
    return f"hqqtensor chat {place}" if has_template else f"hqqtensor generate {place} -p 'Once upon a time'"


def shown_path(path: Path) -> str:
    """``path`` from the working directory where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def _tokenizer_config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
