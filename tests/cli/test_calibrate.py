import json
import re
from pathlib import Path

import pytest
import torch
import transformers

from hqqtensor import HqqConfig, HQQTensor, quantize_
from hqqtensor.calibration import collect, data
from hqqtensor.cli import main, model_dir

NAME = "model.layers.1.mlp.down_proj.weight"


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.batches_of, "__defaults__", (None, 512, 0, 4, None))
    monkeypatch.setattr(collect, "MANY_TOKENS", 512)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"Line {i} tells of the number {i * i}." for i in range(400)))
    return file


@pytest.mark.parametrize(
    ("args", "source", "quality"),
    [
        (["--calibrate", "self"], "self", "good"),
        (["--calibrate", "random", "--quality", "fast"], "random", "fast"),
        (["--quality", "good"], "self", "good"),
        (["--calibrate", "TEXT", "--quality", "best"], "TEXT", "best"),
    ],
)
def test_the_command_gives_what_quantize_gives(tiny: Path, tmp_path: Path, text: Path, args, source, quality) -> None:
    put = lambda a: str(text) if a == "TEXT" else a  # noqa: E731
    assert run("quantize", tiny, tmp_path / "out", "--bits", 3, "--json", *map(put, args)) == 0
    want = transformers.LlamaForCausalLM.from_pretrained(tiny).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    plain = transformers.LlamaForCausalLM.from_pretrained(tiny)
    config = HqqConfig(3, embedding_nbits=8)
    quantize_(want, config, calibration=put(source), quality=quality, tokenizer=tokenizer)
    quantize_(plain, config)
    got = model_dir.open_quantized(tmp_path / "out")
    for (name, a), (_, b) in zip(want.state_dict().items(), got.state_dict().items(), strict=True):
        assert type(a) is type(b) and torch.equal(a, b), name
    assert isinstance(got.lm_head.weight, HQQTensor) and got.lm_head.weight.nbits == 8
    assert not torch.equal(got.get_parameter(NAME).dequantize(), plain.get_parameter(NAME).dequantize())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--calibrate", "nothing.txt"], "nothing.txt"),
        (["--quality", "great"], "invalid choice"),
        (["--calibrate", "self", "--axis", 0, "--group-size", 32], "calibration serves format 'int' and axis 1"),
        (["--quality", "good", "--solver", "rtn"], "calibration serves hqq_joint and column_scaled"),
    ],
)
def test_what_cannot_be_calibrated_exits_with_2_before_any_work(tiny, tmp_path, capsys, args, message) -> None:
    assert run("quantize", tiny, tmp_path / "out", *args) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_encoder_cannot_write_and_takes_random_tokens(tmp_path: Path, capsys) -> None:
    config = transformers.BertConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    assert run("quantize", tmp_path / "bert", tmp_path / "out", "--calibrate", "self") == 2
    assert "BertModel cannot write text" in capsys.readouterr().err
    assert run("quantize", tmp_path / "bert", tmp_path / "out", "--bits", 3, "--quality", "good") == 0
    assert "random tokens" in capsys.readouterr().err
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["nbits"] == 3


def test_the_same_command_goes_on_after_an_interrupt(tiny: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    command = ["quantize", tiny, tmp_path / "out", "--bits", 3, "--calibrate", "self"]
    kept = tmp_path / "out.unfinished"

    def stop(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hqqtensor.streaming.run.Worker", stop)
        assert run(*command) == 130
    assert (kept / "run.json").is_file() and not (tmp_path / "out").exists()
    printed = capsys.readouterr().err
    assert f"what is finished is kept in {kept}: the same command goes on from there" in printed
    assert "writing text: 100%" in printed and "calibrating: 100%" in printed
    assert run(*command[:4], 4, *command[5:]) == 2
    assert "holds an interrupted run of another call: nbits was 3 and is 4" in capsys.readouterr().err
    assert run(*command) == 0
    printed = capsys.readouterr().err
    assert f"going on with what an interrupted run left in {kept}" in printed and "writing text" not in printed
    assert not kept.exists()
    assert run("quantize", tiny, tmp_path / "other", *command[3:]) == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "other")]
    assert len(files[0]) == len(files[1])
    got, want = (model_dir.open_quantized(tmp_path / name).state_dict() for name in ("out", "other"))
    assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_a_text_file_is_read_once(tiny: Path, tmp_path: Path, text: Path, monkeypatch) -> None:
    reads, real = [], Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: reads.append(self) or real(self, *a, **k))
    assert run("quantize", tiny, tmp_path / "out", "--calibrate", text, "--quality", "fast", "--json") == 0
    assert reads.count(text) == 1


def test_progress_and_summary_tell_the_error_of_the_weights(tiny: Path, tmp_path: Path, capsys) -> None:
    assert run("quantize", tiny, tmp_path / "out", "--calibrate", "random", "--bits", 3) == 0
    printed = capsys.readouterr()
    assert re.search(r"quantizing model\.layers\.\S+: \d+%, [\d.]+ M weights/s, error so far [\d.]+ %", printed.err)
    assert re.search(r"calibrating: 100%$", printed.err, re.M)
    shown = re.search(r"error of the weights: ([\d.]+) %", printed.out)
    assert shown
    assert run("quantize", tiny, tmp_path / "again", "--calibrate", "random", "--bits", 3, "--json") == 0
    error = json.loads(capsys.readouterr().out)["weight_error"]
    assert 0 < error < 0.3 and f"{100 * error:.2f}" == shown[1]
