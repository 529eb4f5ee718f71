"""What is driven while a call goes wrong: commands, and functions that write or read files.

Each works in a folder of its own. ``prepare`` fills it, ``run`` writes ``target`` in it. The old state of the target is
what ``prepare`` left there, the new one what ``run`` leaves where nothing goes wrong.
"""

import contextlib
import io
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers

from hqqtensor import HqqConfig, HQQTensor, load_model, quantize_, save_model
from hqqtensor.cli import main, model_dir
from hqqtensor.run_record import ResumeError
from hqqtensor.search import Sensitivity
from hqqtensor.serialization.layout import CheckpointError
from hqqtensor.streaming import plan

ERRORS = (OSError, CheckpointError, ResumeError)
"""What the functions that read and write files raise where a file cannot be read or written."""


@dataclass(frozen=True)
class Scenario:
    """name: as the table shows it. target: what ``run`` writes, within the folder.

    prepare: fills a folder. run: the work, in a child process; its exit code. look: what a user does next who
    only reads the target, such as opening it. stays: what may lie in the folder after an error, for the same call to go
    on with.
    """

    name: str
    target: str
    prepare: Callable[[Path], None]
    run: Callable[[Path], int]
    look: Callable[[Path], None] = field(default=lambda root: None)
    stays: tuple[str, ...] = ()


def tiny_llama(seed: int = 0, width: int = 64) -> Any:
    """A model whose save takes few calls."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


def _function(work: Callable[[Path], None], root: Path) -> int:
    """A function of the package, with what a user's program would print."""
    try:
        work(root)
    except ERRORS as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("KeyboardInterrupt", file=sys.stderr)
        return 130
    return 0


def _command(arguments: list[str], root: Path) -> int:
    return main([argument.replace("ROOT", str(root)) for argument in arguments])


def _quiet() -> contextlib.AbstractContextManager[Any]:
    return contextlib.redirect_stdout(io.StringIO())


# ---- what the scenarios begin with


def _dense(root: Path) -> None:
    tiny_llama().save_pretrained(root / "dense", max_shard_size="40KB")


def _quantized(place: Path, bits: int, size: str) -> None:
    """A quantized directory, as ``hqqtensor quantize`` writes it."""
    model = tiny_llama()
    quantize_(model, HqqConfig(bits, 32))
    save_model(model, place, max_shard_size=size, non_persistent_buffers=False)
    settings = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    entry = {"quant_method": model_dir.QUANT_METHOD, **HqqConfig(bits, 32).to_dict()}
    model_dir.write_config(place, settings | {"quantization_config": entry}, torch.bfloat16)


def _all_of(*steps: Callable[[Path], None]) -> Callable[[Path], None]:
    def prepare(root: Path) -> None:
        for step in steps:
            step(root)

    return prepare


def _old_model(root: Path) -> None:
    _quantized(root / "out", 2, "12KB")


def _source(root: Path) -> None:
    _quantized(root / "source", 4, "12KB")


def _old_stream(root: Path) -> None:
    _save(root, "out.hqqpack", compression="none")


def _packed(root: Path) -> None:
    _source(root)
    with _quiet():
        assert _command(["pack", "ROOT/source", "ROOT/model.hqqpack", "--compression", "deflate", "--json"], root) == 0


def _settle(root: Path) -> None:
    """Reads the directory's config.json, as every command does; there need be none."""
    with contextlib.suppress(Exception):
        model_dir.read_config(root / "out")


# ---- the work


@cache
def model_to_save(bits: int, seed: int) -> Any:
    """A quantized model; made once, before the processes that save it are forked."""
    model = tiny_llama(seed)
    quantize_(model, HqqConfig(bits, 32))
    return model


def _save(root: Path, name: str, **options: Any) -> None:
    save_model(model_to_save(4, 1), root / name, **options)


def _load(root: Path) -> None:
    model = tiny_llama(2)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    try:
        load_model(model, root / "source")
    except BaseException:
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()), "the model has changed"
        raise
    for name, tensor in model_to_save(4, 0).state_dict().items():
        read = model.state_dict()[name]
        assert torch.equal(_numbers(tensor), _numbers(read)), f"other numbers were read for {name}"


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.dequantize() if isinstance(tensor, HQQTensor) else tensor


_BATCHES = [torch.arange(32).reshape(1, 32)]


def _quantize_resumed(root: Path) -> None:
    """``quantize_`` with a folder to go on from, then a save; the model is as it was where that fails."""
    model = tiny_llama()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    try:
        quantize_(model, HqqConfig(4, 32), calibration=_BATCHES, resume=root / "kept")
    except BaseException:
        now = model.state_dict()
        is_as_before = all(type(now[n]) is type(t) and torch.equal(now[n], t) for n, t in before.items())
        # Ctrl-C may come while what was kept is removed: the model is quantized already, all of it.
        assert is_as_before or _quantized_names(now) == _quantized_names(model_to_save(4, 0).state_dict()), "in part"
        raise
    save_model(model, root / "out")
    with contextlib.suppress(OSError):
        (root / "kept").rmdir()  # empty by now, but after a warning


def _quantized_names(state: Mapping[str, Any]) -> set[str]:
    return {name for name, tensor in state.items() if isinstance(tensor, HQQTensor)}


def _save_sensitivity(root: Path) -> None:
    layers = {f"layer{i}": {"key": "k" * 32, "bytes": [1, 2], "loss": [0.5, 0.25]} for i in range(200)}
    Sensitivity("weights", [{"nbits": 4}, {"nbits": 3}], layers).save(root / "sensitivity.json")


def _old_sensitivity(root: Path) -> None:
    Sensitivity("weights", [{"nbits": 4}, {"nbits": 3}]).save(root / "sensitivity.json")


def _old_card(root: Path) -> None:
    _source(root)
    (root / "README.md").write_text("# What somebody wrote\n" * 500)


_QUANTIZE = ["quantize", "ROOT/dense", "ROOT/out", "--overwrite", "--max-shard-size", "12KB", "--bits", "3", "--json"]
_UNFINISHED = ("out.unfinished",)


def _interrupted(root: Path) -> None:
    """What a run leaves that an error stops at its sixth weight."""
    real, count = plan.Choice.quantize, iter(range(1000))

    def stop(self: Any, weight: Any) -> Any:
        if next(count) == 5:
            raise OSError("stopped")
        return real(self, weight)

    plan.Choice.quantize = stop  # type: ignore[method-assign]
    try:
        with _quiet(), contextlib.redirect_stderr(io.StringIO()):
            assert _command(_QUANTIZE, root) == 1
    finally:
        plan.Choice.quantize = real  # type: ignore[method-assign]
    assert (root / "out.unfinished" / "run.json").is_file(), "nothing was finished"


def scenarios() -> list[Scenario]:
    """All of them, in the order of the table."""
    plan.BATCH_BYTES = 4096  # several batches, so that there is something to go on with
    model_to_save(4, 0), model_to_save(4, 1)
    function: Callable[..., Any] = lambda work: partial(_function, work)  # noqa: E731
    command: Callable[..., Any] = lambda *arguments: partial(_command, list(arguments))  # noqa: E731
    convert, pack = ["convert", "ROOT/source", "ROOT/out", "--overwrite"], ["pack", "ROOT/source", "ROOT/out.hqqpack"]
    return [
        Scenario("save_model, one file", "out", lambda root: None, function(partial(_save, name="out"))),
        Scenario("save_model over another one", "out", _old_model, function(partial(_save, name="out"))),
        Scenario("save_model, shards over shards", "out", _old_model,
                 function(partial(_save, name="out", max_shard_size="12KB"))),
        Scenario("save_model, compressed", "out.hqqpack", _old_stream,
                 function(partial(_save, name="out.hqqpack", compression="deflate"))),
        Scenario("quantize", "out", _dense, command(*_QUANTIZE), _settle, _UNFINISHED),
        Scenario("quantize --overwrite", "out", _all_of(_dense, _old_model), command(*_QUANTIZE), _settle, _UNFINISHED),
        Scenario("quantize, going on", "out", _all_of(_dense, _old_model, _interrupted), command(*_QUANTIZE), _settle,
                 _UNFINISHED),
        Scenario("quantize --calibrate random", "out", _all_of(_dense, _old_model),
                 command(*_QUANTIZE, "--calibrate", "random"), _settle, _UNFINISHED),
        Scenario("convert --overwrite", "out", _all_of(_source, _old_model), command(*convert), _settle),
        Scenario("convert --to hqq", "out", _all_of(_source, _old_model), command(*convert, "--to", "hqq"), _settle),
        Scenario("pack --overwrite", "out.hqqpack", _all_of(_source, _old_stream),
                 command(*pack, "--overwrite", "--compression", "deflate", "--json")),
        Scenario("unpack --overwrite", "out", _all_of(_packed, _old_model),
                 command("unpack", "ROOT/model.hqqpack", "ROOT/out", "--overwrite", "--json"), _settle),
        Scenario("quantize_(resume=...), save_model", "out", lambda root: None, function(_quantize_resumed),
                 stays=("kept",)),
        Scenario("Sensitivity.save", "sensitivity.json", _old_sensitivity, function(_save_sensitivity)),
        Scenario("card --output", "README.md", _old_card, command("card", "ROOT/source", "--output", "ROOT/README.md")),
        Scenario("load_model", "source", _source, function(_load)),
    ]  # fmt: skip
