"""One rule for all commands: 1 where the work failed, 2 where another command line mends it, 130 interrupted.

Each case is a command and a kind of mistake; a failed command leaves nothing behind.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hqqtensor.cli import (
    bench,
    card,
    chat,
    compare,
    completion,
    convert,
    env,
    evaluate,
    generate,
    inspect,
    main,
    model_dir,
    quantize,
    recommend,
    report,
    serve,
)  # fmt: skip
from hqqtensor.serialization.gptq_checkpoint import ACT_ORDER

DOCLM = Path(__file__).parent.parent / "assets" / "doclm"
TEXT = ["--text", str(DOCLM / "valid.txt"), "--context", "32", "--max-tokens", "64"]
COMMANDS = {
    "quantize": quantize, "convert": convert, "inspect": inspect, "eval": evaluate, "compare": compare,
    "recommend": recommend, "chat": chat, "generate": generate, "serve": serve, "bench": bench, "report": report,
    "card": card, "completion": completion, "env": env,
}  # fmt: skip
ARGUMENTS = {
    "quantize": ["a", "b"], "convert": ["a", "b"], "eval": ["a", "--text", "b"], "compare": ["a", "b", "--text", "c"],
    "generate": ["a", "-p", "b"], "completion": ["bash"], "env": [],
}  # fmt: skip
"""What a command needs at least, where that is not the name of one directory."""


@pytest.fixture(scope="session")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a dense model, a quantized one, and broken ones of each."""
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny, root / "dense")
    assert main(["quantize", str(root / "dense"), str(root / "quantized"), "--json"]) == 0
    for source, name, change in (
        ("dense", "no-json", lambda d: (d / "config.json").write_text("{")),
        ("dense", "gptq", lambda d: _edit(d, quantization_config={"quant_method": "gptq"})),
        ("dense", "encoder", lambda d: _edit(d, architectures=["LlamaModel"])),
        ("dense", "nan", _nan),
        ("dense", "no-weights", lambda d: (d / "model.safetensors").unlink()),
        ("dense", "wide", lambda d: _edit(d, vocab_size=7)),
        ("quantized", "cut", lambda d: os.truncate(d / "model.safetensors", 1000)),
        ("quantized", "stray", lambda d: _edit(d, quantization_config={"quant_method": "hqqtensor", "source": "gone"})),
    ):
        shutil.copytree(root / source, root / name)
        change(root / name)
    (root / "empty").mkdir()
    (root / "latin.txt").write_bytes(b"\xff\xfe\xff")
    (root / "short.txt").write_text("one line")
    (root / "a.gguf").write_bytes(b"GGUF, or not")
    return root


@pytest.fixture
def place(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``models`` as working directory; a test leaves it as it is."""
    monkeypatch.chdir(models)
    return models


def _edit(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _nan(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


WRONG = [
    # command line, and what the message says
    ("quantize dense out --bits 9", "nbits must be"),
    ("quantize dense out --bits four", "invalid int value: 'four'"),
    ("quantize dense out --embeddings 9", "embedding_nbits must be None or an integer from 1 to 8, got 9"),
    ("quantize dense out --embeddings few", "argument --embeddings: invalid"),
    ("quantize dense out --group-size best", "argument --group-size: invalid group_size value: 'best'"),
    ("quantize dense out --speed fast", "unrecognized arguments"),
    ("quantize dense out --max-shard-size much", "--max-shard-size must be a number"),
    ("quantize dense out --layers no_such_layer=4/64", "no_such_layer"),
    ("quantize dense out --skip model lm_head", "nothing to quantize"),
    ("quantize dense out --target-bpw 3 --text nowhere.txt", "cannot read nowhere.txt"),
    ("quantize dense out --target-bpw 3 --text latin.txt", "cannot read latin.txt"),
    ("quantize dense out --target-bpw 3 --text short.txt", "too few for one window"),
    ("quantize dense out --target-bpw 3 --sensitivity nowhere/s.json", "there is no directory"),
    ("quantize dense out --fast", "--fast and --time-limit are for --target-bpw or --target-size"),
    ("quantize dense out --time-limit 60", "--fast and --time-limit are for --target-bpw or --target-size"),
    ("quantize dense out --target-bpw 3 --time-limit 0", "--time-limit must be over 0 seconds, got 0.0"),
    ("quantize dense out --target-bpw 3 --time-limit nan", "--time-limit must be over 0 seconds, got nan"),
    ("quantize dense out --target-bpw 3 --fast --text short.txt", "leave --text out"),
    ("quantize nowhere out", "nowhere is not a directory"),
    ("quantize empty out", "no config.json"),
    ("quantize quantized out", "already quantized"),
    ("quantize gptq out", "quantized with 'gptq'"),
    ("quantize dense quantized", "--overwrite"),
    ("quantize dense short.txt", "not a directory"),
    ("quantize dense short.txt/out", "short.txt is not a directory"),
    ("convert quantized out --to paper", "invalid choice"),
    ("convert quantized out --max-shard-size 1.2.3GB", "--max-shard-size must be a number"),
    ("convert nowhere out", "nowhere does not exist"),
    ("convert nowhere.gguf out", "nowhere.gguf does not exist"),
    ("convert quantized out --config dense", "--config is for .gguf files"),
    ("convert a.gguf out --config nowhere", "nowhere is not a directory"),
    ("convert dense out", "holds no quantized weights"),
    ("convert no-weights out", "no checkpoint at"),
    ("convert quantized dense", "--overwrite"),
    ("inspect nowhere", "nowhere does not exist"),
    ("inspect empty", "no checkpoint at"),
    ("inspect", "required"),
    ("eval quantized", "required: --text"),
    ("eval nowhere TEXT", "not a directory"),
    ("eval dense --text nowhere.txt", "cannot read nowhere.txt"),
    ("eval dense --text short.txt --context 32", "too few for one window"),
    ("eval dense --text short.txt --context 1", "--context must be at least 2"),
    ("eval dense TEXT --context 4096 --max-tokens 8192", "more than the 64 positions"),
    ("eval dense TEXT --bits 9", "nbits must be"),
    ("eval dense TEXT --original dense", "--original is for a quantized DIR"),
    ("eval quantized TEXT --original dense --bits 2", "quantized already"),
    ("eval stray TEXT", "name it with --original"),
    ("eval quantized TEXT --original nowhere", "not a directory"),
    ("eval quantized TEXT --original quantized", "already quantized"),
    ("eval quantized TEXT --original wide", "not the original"),
    ("eval encoder TEXT", "not a causal language model"),
    ("eval gptq TEXT", "quantized with 'gptq'"),
    ("quantize dense out --preset 5", "--preset: there is no preset '5', only 8, 6, 4"),
    ("quantize dense out --preset 4 --bits 3", "--preset decides what --bits would"),
    ("quantize dense out --format nf5", "format must be one of"),
    ("quantize dense out --format nf4 --bits 3", "nbits must be an integer out of [4] for format 'nf4', got 3"),
    ("quantize dense out --dry-run --target-bpw 4", "--dry-run cannot say what a search would choose"),
    ("compare quantized dense", "required: --text"),
    ("compare quantized nowhere TEXT", "not a directory"),
    ("compare encoder dense TEXT", "not a causal language model"),
    ("compare dense wide TEXT", "vocabularies of"),
    ("recommend nowhere --memory 1GB", "not a directory"),
    ("recommend quantized --memory 1GB", "already quantized"),
    ("recommend dense --memory much", "--memory must be a number"),
    ("recommend dense --memory 1KB --seconds 0", "nothing fits 0.00 MB: the smallest setting takes"),
    ("recommend dense --memory 1GB --seconds -1", "--seconds must be 0 or more, got -1.0"),
    ("generate dense", "required: -p/--prompt"),
    ("generate nowhere -p x", "not a directory"),
    ("generate encoder -p x", "not a causal language model"),
    ("generate quantized -p x --bits 3", "quantized already: --bits is for a dense DIR"),
    ("generate dense -p x --bits 9", "nbits must be"),
    ("generate dense -p x --max-tokens 0", "must be at least 1, got 0"),
    ("generate dense -p x --temperature -1", "must be 0 or more, got -1"),
    ("generate dense -p x --chat", "has no chat template"),
    ("chat dense", "has no chat template"),
    ("chat gptq", "quantized with 'gptq'"),
    ("bench encoder", "not a causal language model"),
    ("bench dense", "--prompt-tokens 128 and --new-tokens 64 are more than the 64 positions of dense"),
    ("card dense", "not quantized"),
    ("report dense", "not quantized"),
    ("report quantized -o latin.txt", "latin.txt exists and is no .html file"),
    ("report quantized -o nowhere/r.html", "there is no directory"),
    ("report quantized TEXT", "give --original too"),
    ("report quantized --original wide", "not the original"),
    ("report quantized --sensitivity short.txt", "no sensitivity file of hqqtensor"),
    ("completion ksh", "invalid choice: 'ksh'"),
    ("env --everything", "unrecognized arguments"),
    ("prune dense out", "invalid choice: 'prune'"),
    ("", "required: COMMAND"),
]
FAILED = [
    ("quantize nan out", "model.layers.1.mlp.up_proj.weight: holds NaN"),
    ("quantize no-json out", "is not valid JSON"),
    ("quantize no-weights out", "model.safetensors"),
    ("convert a.gguf out", "a.gguf"),
    ("convert cut out", "not a whole safetensors file"),
    ("inspect cut", "not a whole safetensors file"),
    ("eval cut TEXT --original dense", "not a whole safetensors file"),
    ("eval nan TEXT", "holds NaN"),
    ("generate cut -p x", "not a whole safetensors file"),
    ("compare dense cut TEXT", "not a whole safetensors file"),
    ("card cut", "not a whole safetensors file"),
    ("report cut", "not a whole safetensors file"),
]


@pytest.mark.parametrize(("line", "message", "code"), [(*w, 2) for w in WRONG] + [(*f, 1) for f in FAILED])
def test_a_kind_of_mistake_has_one_code(line: str, message: str, code: int, place: Path, capsys) -> None:
    before = sorted(os.listdir())
    args = [part for word in line.split() for part in (TEXT if word == "TEXT" else [word])]
    capsys.readouterr()
    assert main(args) == code
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err
    assert captured.err.splitlines()[-1].startswith(f"hqqtensor {args[0]}: " if args[:1] and code == 1 else "hqqtensor")
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupt_exits_with_130_and_an_unforeseen_error_with_1(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def stop(args: object) -> int:
        raise KeyboardInterrupt

    def fail(args: object) -> int:
        raise MemoryError

    for run, code, message in ((stop, 130, "interrupted"), (fail, 1, "MemoryError")):
        monkeypatch.setattr(COMMANDS[command], "run", run)
        assert main([command, *ARGUMENTS.get(command, ["a"])]) == code
        assert capsys.readouterr().err == f"hqqtensor {command}: {message}\n"


@pytest.mark.parametrize("line", ["quantize dense out", "eval dense TEXT"])
def test_a_missing_package_is_named_with_what_installs_it(line: str, place: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main([part for word in line.split() for part in (TEXT if word == "TEXT" else [word])]) == 1
    assert "pip install 'hqqtensor[cli]'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["quantize", "convert"])
def test_a_full_disk_is_an_error_that_names_the_output(command: str, place: Path, monkeypatch, capsys) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    owner, name = {"quantize": (os, "pwrite"), "convert": (convert, "save_state")}[command]
    monkeypatch.setattr(owner, name, full)
    assert main([command, {"quantize": "dense", "convert": "quantized"}[command], "out"]) == 1
    assert "out: [Errno 28] No space left on device" in (err := capsys.readouterr().err) and "cannot write" in err
    assert not (place / "out").exists()


def test_an_output_that_cannot_be_made_is_found_before_the_work(place: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(model_dir, "open_dense", None)
    monkeypatch.setattr(convert, "read_checkpoint", None)
    for args in (["quantize", "dense", "a/b"], ["convert", "quantized", "a/b"]):
        assert main(args) == 2
        assert f"a/b cannot be created: {place} is not writable" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["--target-bpw 0.5", "--target-size 1KB"])
def test_a_target_that_cannot_be_met_is_told_before_the_model_is_read(
    target: str, place: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(model_dir, "open_dense", None)
    assert main(["quantize", "dense", "out", *target.split()]) == 2
    assert "budget is too small: the smallest settings take" in capsys.readouterr().err


def test_a_reader_that_closes_the_pipe_early_is_no_error(place: Path, monkeypatch, capsys) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["inspect", "quantized"]) == 0
    assert capsys.readouterr().err == ""


def test_help_offers_what_the_reader_of_gptq_files_takes() -> None:
    for choice in ACT_ORDER:
        assert main(["convert", "nowhere", "out", "--act-order", choice]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: "[" * 100_000, "no sensitivity file of hqqtensor"),
        (lambda d: {**d, "version": 2}, "version must be 1, got 2"),
        (lambda d: {**d, "layers": {"lm_head.x": d["layers"].popitem()[1]}}, "s.json is of another model: 'lm_head.x'"),
    ],
)
def test_a_sensitivity_file_that_does_not_serve_is_named_before_the_model_is_read(
    change, message: str, place: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    layer = {"key": "k", "bytes": [10], "loss": [0.5]}
    data = {"version": 1, "method": "outputs", "candidates": [{"nbits": 4}], "layers": {"lm_head": layer}}
    file, changed = tmp_path / "s.json", change(data)
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    monkeypatch.setattr(model_dir, "open_dense", None)
    assert main(["quantize", "dense", "out", "--target-bpw", "4", "--sensitivity", str(file)]) == 2
    assert message in (err := capsys.readouterr().err) and str(file) in err


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_ends_with_an_example_or_the_codes(command: list[str], capsys) -> None:
    assert main([*command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(" ".join(["usage: hqqtensor", *command]))
    if command:
        example = text.rpartition("example:\n")[2].splitlines()
        assert example and all(line.startswith(f"  hqqtensor {command[0]} ") for line in example)
    else:
        assert "exit codes:" in text and all(f"    {name}" in text for name in COMMANDS)
