"""``hqqtensor quantize`` from a GGUF file and from a name on the hub."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hqqtensor.calibration import data
from hqqtensor.cli import main, model_dir

pytest.importorskip("gguf")

from test_gguf import make

TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [*"abcdefgh", "ab", *(f"<{i}>" for i in range(55))],
    "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.eos_token_id": 63,
}  # fmt: skip


def quantize(*args: object) -> int:
    return main(["quantize", *map(str, args)])


def assert_same_model(got: Path, want: Path) -> None:
    a, b = (model_dir.open_quantized(path).state_dict() for path in (got, want))
    assert list(a) == list(b)
    for name, tensor in a.items():
        assert type(tensor) is type(b[name]) and torch.equal(tensor, b[name]), name


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.batches_of, "__defaults__", (None, 128, 0, 4, None))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [["--bits", 4], ["--bits", 3, "--calibrate", "random"]])
def test_a_gguf_file_is_quantized_as_the_dense_model_that_it_stands_for(
    tied: bool, options: list[object], tmp_path: Path, capsys: Any
) -> None:
    file, dense = make(tmp_path, {"down": "Q8_0", "embed": "Q5_0", "v_proj": "F16"}, tied)  # exact ones
    transformers.AutoModelForCausalLM.from_pretrained(dense).to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    assert quantize(file, tmp_path / "got", *options) == 0
    assert f"{file} holds no tokenizer" in capsys.readouterr().err
    assert quantize(tmp_path / "bf16", tmp_path / "want", *options) == 0
    assert_same_model(tmp_path / "got", tmp_path / "want")
    entry = json.loads((tmp_path / "got" / "config.json").read_text())["quantization_config"]
    assert entry["source"] == "model.gguf"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16", "dense", "got", "model.gguf", "want"]


def test_the_tokenizer_of_the_file_is_written(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = make(tmp_path, {}, **TOKENIZER)
    assert quantize(file, tmp_path / "out", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["bytes_before"] > 0
    assert quantize(file, tmp_path / "out", "--json") == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("abc")["input_ids"][-2:] == [8, 2]

    def no_gguf(*_args: object, **_options: object) -> None:
        raise ImportError("no module named gguf")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", no_gguf)
    assert quantize(file, tmp_path / "other") == 1
    assert "pip install 'hqqtensor[gguf]'" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_files_that_do_not_serve_are_refused_in_one_line(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, or not")
    for name, code, message in (("broken.gguf", 1, "broken.gguf"), ("absent.gguf", 2, "is not a file")):
        assert quantize(tmp_path / name, tmp_path / "out") == code
        printed = capsys.readouterr().err
        assert message in printed and len(printed.splitlines()) == 1
    file, _ = make(tmp_path, {}, **{"llama.rope.scaling.type": "yarn"})
    assert quantize(file, tmp_path / "out") == 2
    assert "scales rotary frequencies" in capsys.readouterr().err
    assert quantize(file, tmp_path) == 2
    assert not (tmp_path / "out").exists()


def test_a_name_on_the_hub_is_fetched(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, dense = make(tmp_path, {})
    cached = tmp_path / "0123abcd"
    shutil.copytree(dense, cached)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_options: str(cached))
    assert quantize("someone/model", "out", "--json") == 0
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert entry["source"] == "someone/model"

    def offline(*_args: object, **_options: object) -> None:
        raise OSError("no network\nis here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    capsys.readouterr()
    assert quantize("someone/model", "out2") == 2
    want = "someone/model is no directory here, and could not be fetched from the Hugging Face Hub: no network is here"
    assert capsys.readouterr().err == f"hqqtensor quantize: {want}\n"
