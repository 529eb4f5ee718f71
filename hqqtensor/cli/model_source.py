"""Where ``hqqtensor quantize`` takes a dense model from: a directory, a GGUF file, or the Hugging Face Hub."""

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hqqtensor.cli import model_dir
from hqqtensor.cli.errors import CommandError, UsageError, from_files
from hqqtensor.serialization.gguf_file import open_gguf
from hqqtensor.serialization.gguf_llama import llama_config
from hqqtensor.streaming import GgufSource, Source

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NOT_FETCHED = [
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.tflite", "onnx/*", "original/*",
]  # fmt: skip
"""What of a repository is not needed: weights in other formats than safetensors."""


@dataclass(frozen=True)
class ModelSource:
    """A dense model.

    directory: with its config.json, its tokenizer and other small files, and with its weights where ``gguf`` is None.
    name: what the model is called in the new config.json. gguf: the file of its weights.
    """

    directory: Path
    name: str
    gguf: Path | None = None

    def open_files(self) -> Source:
        """The files of the weights; NotStreamable where they have to be opened by transformers."""
        with from_files():
            return Source(self.directory) if self.gguf is None else GgufSource(self.gguf)


@contextmanager
def located(place: Path) -> Iterator[ModelSource]:
    """The model at ``place``: a directory, a ``.gguf`` file, or a name such as ``org/model`` on the hub.

    UsageError where there is none. Configuration and tokenizer of a GGUF file lie in a temporary directory meanwhile.
    """
    if place.suffix == ".gguf":
        if not place.is_file():
            raise UsageError(f"{place} is not a file")
        with tempfile.TemporaryDirectory(prefix="hqqtensor-") as folder:
            directory = Path(folder) / place.name
            _write_companions(place.resolve(), directory)
            yield ModelSource(directory, place.name, place.resolve())
    elif not place.exists() and _HUB_ID.fullmatch(str(place)):
        yield ModelSource(_fetched(str(place)), str(place))
    else:
        yield ModelSource(place.resolve(), place.resolve().name)


def _write_companions(file: Path, directory: Path) -> None:
    """config.json and tokenizer of a GGUF file."""
    with from_files():
        header = open_gguf(file)
        settings = llama_config(header)
        source = GgufSource(file)
        source.close()
    directory.mkdir()
    if "tokenizer.ggml.model" in header.metadata:
        _write_tokenizer(file, directory)
    else:
        print(f"hqqtensor: {file} holds no tokenizer, so none is written", file=sys.stderr)
    settings["dtype"] = str(source.dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(file: Path, directory: Path) -> None:
    transformers = model_dir.import_transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except ImportError as error:
        raise CommandError(f"{file}: its tokenizer takes gguf (pip install 'hqqtensor[gguf]'): {error}") from error
    except Exception as error:  # whatever transformers makes of a vocabulary that it does not know
        raise CommandError(f"{file}: transformers cannot read its tokenizer: {error}") from error
    tokenizer.save_pretrained(directory)


def _fetched(name: str) -> Path:
    """The directory of a model on the hub, in the hub's cache; it is fetched where it is not there."""
    model_dir.import_transformers()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, ignore_patterns=_NOT_FETCHED))
    except Exception as error:  # of huggingface_hub, of its HTTP client, of the file system
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(
            f"{name} is no directory here, and could not be fetched from the Hugging Face Hub: {reason}"
        ) from error
