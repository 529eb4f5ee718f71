"""Hugging Face model directories: opening dense and quantized ones, and writing one in a single step."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hqqtensor import HqqConfig
from hqqtensor.cli.errors import CommandError, UsageError, from_files
from hqqtensor.integrations.transformers import QUANT_METHOD
from hqqtensor.model_config import quantization_entry, quantized_settings, read_settings
from hqqtensor.serialization.scratch import left_beside, locked, new_locked_folder
from hqqtensor.streaming.folder import settle as settle_streamed

SMALL = 64 * 2**20
"""Bytes up to which a file of a model directory is carried over with the model."""
_NOT_COMPANIONS = re.compile(
    r"config\.json|quantize_config\.json|quant_config\.json|.*\.index\.json|"
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|npz|part|tmp)"
)
"""Files that hold weights, say where they lie, or describe a model that is not the one that is written."""


def import_transformers() -> Any:
    """The transformers module, quiet; CommandError with the command that installs it where it is missing."""
    try:
        import transformers
    except ImportError as error:
        raise CommandError(f"this command needs transformers (pip install 'hqqtensor[cli]'): {error}") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a model directory. UsageError where there is none, CheckpointError where it is damaged.

    What a run that was killed while it replaced the directory left behind is put in order first.
    """
    _settle_killed(directory.resolve())
    with from_files():
        return read_settings(directory)


def write_config(directory: Path, settings: Mapping[str, Any], dtype: torch.dtype) -> None:
    """``config.json`` of a model directory, with the model's ``dtype`` where ``settings`` name none.

    Without it transformers would take the dtype of the first tensor in the file, which is that of a scale.
    """
    if settings.get("dtype") is None and settings.get("torch_dtype") is None:
        settings = {**settings, "dtype": str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def complete(
    directory: Path, source: Path, settings: Mapping[str, Any], config: HqqConfig, dtype: torch.dtype,
    name: str | None = None,
) -> None:  # fmt: skip
    """Add to the weights in ``directory`` what lies beside those of ``source``, and a config.json that says how they
    were quantized. settings, dtype: of the dense model. name: what it is called, by default as its directory.
    """
    copy_companions(source, directory)
    # The name of the original's directory says what it was; its place on this machine concerns nobody else.
    entry = {"quant_method": QUANT_METHOD, **config.to_dict(), "source": name or source.name}
    write_config(directory, {**settings, "quantization_config": entry}, dtype)


def quantization_of(directory: Path) -> dict[str, Any] | None:
    """The ``quantization_config`` that hqqtensor wrote; None for a dense directory, UsageError for another's."""
    with from_files():
        return quantization_entry(read_config(directory), directory)


def read_dense_config(directory: Path) -> dict[str, Any]:
    """``read_config`` of a model that is to be quantized; UsageError where it is quantized already."""
    if quantization_of(directory) is not None:
        raise UsageError(f"{directory} is already quantized by hqqtensor")
    return read_config(directory)


def read_text(path: Path) -> str:
    """A file of UTF-8 text; UsageError where it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def open_dense(directory: Path) -> nn.Module:
    """The dense model in its checkpoint's dtype, in eval mode; UsageError where hqqtensor quantized it."""
    settings = read_dense_config(directory)
    _say_if_without_head(settings, directory)
    cls = _class_of(settings) or import_transformers().AutoModel
    return cls.from_pretrained(directory, local_files_only=True, dtype="auto").eval()


def open_quantized(directory: str | os.PathLike[str], mmap: bool = True) -> nn.Module:
    """The model of a directory that ``hqqtensor quantize`` wrote, in eval mode, on the CPU.

    The model is built on the meta device, so that dense weights never take memory. ``mmap`` as in ``load``. UsageError
    where the directory is not one of hqqtensor's, CheckpointError where its file leaves a parameter without a value.
    """
    directory = Path(directory)
    _settle_killed(directory.resolve())
    with from_files():
        _say_if_without_head(quantized_settings(directory), directory)
    import_transformers()
    from hqqtensor.open_directory import load

    with from_files():
        return load(directory, mmap=mmap)


def empty_model_of(directory: Path, otherwise: torch.dtype | None = None) -> nn.Module:
    """The model of a directory, tied as it is when it is opened, with parameters on the meta device.

    otherwise: builds it in the dtype that config.json names, else in this, as ``open_dense`` does; None in float32.
    """
    import_transformers()
    from hqqtensor import open_directory

    return open_directory.empty_model(directory, read_config(directory), otherwise)


def empty_model(settings: Mapping[str, Any]) -> nn.Module:
    """The model that the contents of a ``config.json`` describe, on the meta device: for its structure alone."""
    transformers = import_transformers()
    cls = _class_of(settings)
    if cls is None or not isinstance(settings.get("model_type"), str):
        raise CommandError(
            f"config.json names no model of transformers (architectures {settings.get('architectures')})"
        )
    options = {key: value for key, value in settings.items() if key not in ("quantization_config", "model_type")}
    with torch.device("meta"):
        return cls(transformers.AutoConfig.for_model(settings["model_type"], **options))


def _architecture(settings: Mapping[str, Any]) -> str | None:
    """The name of the class that a ``config.json`` names first."""
    names = settings.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def _class_of(settings: Mapping[str, Any]) -> Any:
    """The transformers class that a ``config.json`` names first; None where there is none."""
    name = _architecture(settings)
    return None if name is None else getattr(import_transformers(), name, None)


def _say_if_without_head(settings: Mapping[str, Any], directory: Path) -> None:
    if _class_of(settings) is None:
        name = _architecture(settings)
        why = f"transformers has no class {name}" if name else "config.json names no architecture"
        print(f"hqqtensor: {directory}: {why}; using AutoModel", file=sys.stderr)


def open_tokenizer(directory: Path) -> Any:
    """The tokenizer beside a model."""
    return import_transformers().AutoTokenizer.from_pretrained(directory, local_files_only=True)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what lies beside the weights of a model directory: tokenizer, chat template, README, code, and so on.

    These are the files of up to ``SMALL`` bytes that hold no weights and are not hidden, and those in folders that a
    ``modules.json`` (of sentence-transformers) names; not config.json, which ``write_config`` writes.
    """
    for folder in (Path(), *_folders_of_modules(source)):
        for path in sorted((source / folder).iterdir()):
            is_companion = path.is_file() and not path.name.startswith(".") and path.stat().st_size <= SMALL
            if is_companion and (folder.parts or not _NOT_COMPANIONS.fullmatch(path.name)):
                (target / folder).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / folder / path.name)


def _folders_of_modules(source: Path) -> list[Path]:
    try:
        modules = json.loads((source / "modules.json").read_text(encoding="utf-8"))
        names = [module["path"] for module in modules]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    plain = [name for name in names if isinstance(name, str) and name and Path(name).name == name and name != ".."]
    return [Path(name) for name in plain if (source / name).is_dir()]


def check_output(out: Path, source: Path, overwrite: bool) -> None:
    """UsageError where ``out`` must not be written: in use, not a model directory, or holding ``source``.

    What a run that was killed while it replaced ``out`` left behind is put in order first, see ``written_at_once``.
    """
    out, source = out.resolve(), source.resolve()
    _settle_killed(out)
    if out == source or out in source.parents:
        raise UsageError(f"OUT_DIR {out} is or holds MODEL_DIR; choose another")
    if not out.exists():
        _check_parent(out)
        return
    if not out.is_dir():
        raise UsageError(f"OUT_DIR {out} exists and is not a directory")
    if any(out.iterdir()):
        if not overwrite:
            raise UsageError(f"OUT_DIR {out} is not empty; --overwrite replaces it")
        if not (out / "config.json").is_file():  # --overwrite deletes: not someone's home directory
            raise UsageError(f"OUT_DIR {out} is not a model directory (no config.json); --overwrite leaves it alone")


def _check_parent(out: Path) -> None:
    """UsageError where ``out`` cannot be created: before the work, not after it."""
    parent = next(place for place in out.parents if place.exists())
    if not parent.is_dir():
        raise UsageError(f"OUT_DIR {out} cannot be created: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"OUT_DIR {out} cannot be created: {parent} is not writable")


@contextmanager
def written_at_once(out: Path) -> Iterator[Path]:
    """A directory beside ``out`` to write into, which replaces ``out`` at the end; removed where the block raises.

    Whatever stops this, an exception or an interrupt, the old or the new model is whole in its place. Only a process
    that is killed between two renames leaves none there: the next run with this ``out`` puts the old one back. Plain
    renames of directories work alike on every file system, which cannot be said of an exchange in one step.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    _settle_killed(out)
    with new_locked_folder(out) as work:
        try:
            new = work / "new"
            new.mkdir()  # mkdtemp's own directory is private to the user; this one follows the umask
            yield new
            if out.exists():
                out.rename(work / "old")
            new.rename(out)
        finally:
            _settle(work, out)


def _settle(work: Path, out: Path) -> str:
    """Remove ``work``, after putting the old model back where none is in its place. Returns what was done, in words.

    The directories say how far the work had come, so that this can follow whatever stopped it, be it this function:

        new     old     out
        there   -       any     not finished, or nothing was there before: remove
        there   there   -       stopped between the two renames: put back, remove
        there   there   there   the same, and someone has written to ``out`` since: leave both models alone
        -       any     any     finished: remove
    """
    new, old, done = work / "new", work / "old", "removed"
    if new.exists() and old.exists():
        if out.exists():
            print(f"hqqtensor: {out}: the model that an interrupted run was to replace is in {old}", file=sys.stderr)
            return ""
        old.rename(out)
        done = "put the model that was here back and removed"
    shutil.rmtree(work, ignore_errors=True)
    return done


def _settle_killed(out: Path) -> None:
    """Settle what runs that were killed left beside ``out``; says so on stderr."""
    left = left_beside(out)
    if done := settle_streamed(out):
        print(f"hqqtensor: {out}: {done}", file=sys.stderr)
    for work in left:
        with locked(work) as is_ours:
            between = (work / "new").exists() and (work / "old").exists()
            # Without locks, a run that is alive may be writing there: then only what has no model in place is touched.
            settle = is_ours or (is_ours is None and between and not out.exists())
            if settle and (done := _settle(work, out)):
                print(f"hqqtensor: {out}: {done} what an interrupted run left in {work.name}", file=sys.stderr)
