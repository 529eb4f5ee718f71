import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from expecttest import assert_expected_inline
from safetensors.torch import load_file, save_file

from hqqtensor import HqqConfig, HQQTensor, quantize_
from hqqtensor.cli import main, model_dir
from hqqtensor.integrations import patches

DOCLM = Path(__file__).parent.parent / "assets" / "doclm"


PLAIN = ("--group-size", 64, "--embeddings", "none")


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


def test_quantize_writes_what_quantize_in_a_process_gives(tiny: Path, tmp_path: Path, capsys) -> None:
    layers = ["self_attn.q_proj=3/32", "mlp.down_proj=none"]
    assert run("quantize", tiny, tmp_path / "out", "--bits", 4, "--layers", *layers, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    want = transformers.LlamaForCausalLM.from_pretrained(tiny)
    tags = {"self_attn.q_proj": {"nbits": 3, "group_size": 32}, "mlp.down_proj": None}
    quantize_(want, HqqConfig(4, dynamic_config=tags, embedding_nbits=8))
    got = model_dir.open_quantized(tmp_path / "out")
    assert type(got) is transformers.LlamaForCausalLM
    for (name, a), (_, b) in zip(want.state_dict().items(), got.state_dict().items(), strict=True):
        assert type(a) is type(b) and torch.equal(a, b), name
    assert got.model.layers[0].self_attn.q_proj.weight.nbits == 3
    assert not isinstance(got.model.layers[0].mlp.down_proj.weight, HQQTensor)
    assert summary["bytes_after"] < summary["bytes_before"] and summary["config"]["nbits"] == 4
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_the_dtype_of_a_model_whose_config_names_none(tiny: Path, tmp_path: Path, dtype) -> None:
    source = tmp_path / "source"
    transformers.LlamaForCausalLM.from_pretrained(tiny, dtype=dtype).save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    assert run("quantize", source, tmp_path / "quantized") == 0
    assert run("convert", tmp_path / "quantized", tmp_path / "converted") == 0
    for directory in (source, tmp_path / "quantized", tmp_path / "converted"):
        for asked in (None, "auto"):  # scales are float16, and the first tensors of the file
            model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=asked)
            assert model.dtype == model.lm_head.weight.dtype == dtype


def test_skip_replaces_the_modules_left_alone(tiny: Path, tmp_path: Path) -> None:
    assert run("quantize", tiny, tmp_path / "out", "--skip", "mlp", "--quant-metadata", "--json") == 0
    model = model_dir.open_quantized(tmp_path / "out")
    assert isinstance(model.lm_head.weight, HQQTensor)
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight.scale, HQQTensor)
    assert not isinstance(model.model.layers[0].mlp.up_proj.weight, HQQTensor)


@pytest.mark.parametrize(("args", "bits"), [([], None), (["--quant-metadata"], 8), (["--quant-metadata", 4], 4)])
def test_scales_and_zero_points_are_kept_in_the_bits_asked_for(tiny: Path, tmp_path: Path, args, bits) -> None:
    assert run("quantize", tiny, tmp_path / "out", "--group-size", 8, *args, "--json") == 0
    weight = model_dir.open_quantized(tmp_path / "out").model.layers[0].mlp.up_proj.weight
    assert all(getattr(part, "nbits", None) == bits for part in (weight.scale, weight.zero_point))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--bits", 9], "nbits must be"),
        (["--bits", "four"], "invalid int"),
        (["--group-size", 0], "group_size must be"),
        (["--quant-metadata", 3], "meta_nbits must be"),
        (["--layers", "mlp"], "TAG=BITS/GROUP"),
        (["--layers", "mlp=4", "mlp=3"], "each tag once"),
        (["--solver", "magic"], "solver must be one of"),
        (["--speed", "fast"], "unrecognized"),
    ],
)
def test_wrong_arguments_exit_with_2_and_write_nothing(tiny: Path, tmp_path: Path, capsys, args, message) -> None:
    assert run("quantize", tiny, tmp_path / "out", *args) == 2
    assert message in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_failed_work_exits_with_1_and_leaves_nothing(tiny: Path, tmp_path: Path, capsys) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert run("quantize", broken, tmp_path / "out") == 1
    assert "layers.1.mlp.up_proj.weight: holds NaN" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_an_output_that_is_there_is_kept_unless_told(tiny: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert run("quantize", tiny, out, "--json") == 0
    assert run("quantize", tiny, out) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("quantize", tiny, out, "--bits", 2, "--overwrite", "--json") == 0
    assert model_dir.open_quantized(out).model.layers[0].mlp.up_proj.weight.nbits == 2
    assert run("quantize", out, tmp_path / "again") == 2
    assert "already quantized" in capsys.readouterr().err
    assert run("quantize", tiny, tiny, "--overwrite") == 2


def test_inspect_lists_tensors_and_real_bits(tiny: Path, tmp_path: Path, capsys) -> None:
    run("quantize", tiny, tmp_path / "out", "--bits", 3, *PLAIN, "--json")
    capsys.readouterr()
    assert run("inspect", tmp_path / "out") == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("model.layers.0.mlp.up_proj.weight"))
    assert_expected_inline(
        " ".join(row.split()), """model.layers.0.mlp.up_proj.weight hqq 128x64 float32 3 64 1 int 3584"""
    )
    assert lines[-1] == "3.500 bits a quantized weight, metadata counted"
    assert run("inspect", tmp_path / "out", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bits_per_weight"] == 3.5 and len(report["tensors"]) == len(lines) - 3


def test_eval_compares_a_quantized_directory_with_its_original(tiny: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(tiny, tmp_path / "tiny")
    run("quantize", tmp_path / "tiny", tmp_path / "out", "--bits", 8, "--json")
    capsys.readouterr()
    options = ("--text", DOCLM / "valid.txt", "--context", 32, "--max-tokens", 320)
    assert run("eval", tmp_path / "out", *options, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == 310 and result["original"] == str(tmp_path / "tiny")
    assert result["perplexity_after"] == pytest.approx(result["perplexity_before"], rel=0.01)
    assert run("eval", tmp_path / "out", *options, "--original", tiny, "--json") == 0
    assert json.loads(capsys.readouterr().out)["perplexity_after"] == result["perplexity_after"]
    assert run("eval", tiny, *options, "--bits", 2, *PLAIN) == 0
    text = capsys.readouterr().out
    assert "perplexity" in text and "bits a weight    2.500" in text


def test_config_records_the_originals_name_and_no_place_of_this_machine(tiny: Path, tmp_path: Path, capsys) -> None:
    options = ("--text", DOCLM / "valid.txt", "--context", 32, "--max-tokens", 64)
    assert run("quantize", tiny, tmp_path / "out", "--json") == 0
    text = (tmp_path / "out" / "config.json").read_text()
    assert str(tmp_path.parent) not in text and str(tiny.parent) not in text
    entry = json.loads(text)["quantization_config"]
    assert entry["source"] == tiny.name
    capsys.readouterr()
    assert run("eval", tmp_path / "out", *options) == 2
    assert f"was {tiny.name!r}" in (err := capsys.readouterr().err) and "--original" in err
    # What earlier versions recorded still serves.
    config = json.loads(text)
    config["quantization_config"]["source"] = str(tiny)
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert run("eval", tmp_path / "out", *options, "--json") == 0
    assert json.loads(capsys.readouterr().out)["original"] == str(tiny)


def test_env_reports_versions_and_backends(capsys) -> None:
    assert run("env", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert {b["name"] for b in found["backends"]} >= {"reference", "cpu"}
    libraries = {patch["library"] for patch in found["patches"]}
    assert {"torchao", "transformers"} <= libraries and all(patch["problem"] is None for patch in found["patches"])
    assert {"library", "version", "tested_with", "target", "reason", "problem"} == set(found["patches"][0])
    assert run("env") == 0
    text = capsys.readouterr().out
    assert "cpu kernels" in text and "transformers  5." in text and "in place" in text


def test_env_names_a_change_that_could_not_be_made(monkeypatch, capsys) -> None:
    gone = patches.Patch("torchao", "torchao.gone", "saving", "0.1", "torchao has no attribute 'gone'")
    monkeypatch.setitem(patches._patches, ("torchao", "gone", "saving"), gone)
    assert run("env", "--json") == 0
    assert "torchao has no attribute 'gone'" in [p["problem"] for p in json.loads(capsys.readouterr().out)["patches"]]
    assert run("env") == 0
    line = "    torchao.gone: torchao has no attribute 'gone'; without it saving does not work"
    assert line in capsys.readouterr().out.splitlines()


def test_help_and_no_command(capsys) -> None:
    assert run("--help") == 0
    assert "quantize" in capsys.readouterr().out
    assert run() == 2


def test_quantize_meets_a_target_and_keeps_the_sensitivities(tiny, tmp_path, capsys):
    file, out = tmp_path / "s.json", tmp_path / "out"
    args = ["quantize", str(tiny), str(out), "--target-bpw", "4.25", "--embeddings", "none"]
    args += ["--sensitivity", str(file), "--json"]
    assert main(args) == 0
    summary = json.loads(capsys.readouterr().out)
    assert 3.75 < summary["bits_per_weight"] <= 4.25
    assert len(json.loads(file.read_text())["layers"]) == 14
    size = summary["bytes_after"]
    args = [
        "quantize",
        str(tiny),
        str(tmp_path / "b"),
        "--target-size",
        f"{size}B",
        "--embeddings",
        "none",
        "--sensitivity",
        str(file),
        "--json",
    ]
    assert main(args) == 0
    assert json.loads(capsys.readouterr().out)["bytes_after"] <= size


@pytest.mark.parametrize("target", [("--target-bpw", 1.5), ("--target-size", "10KB")])
def test_an_impossible_target_is_told_before_anything_is_measured(tiny, tmp_path, capsys, monkeypatch, target):
    monkeypatch.setattr(HQQTensor, "from_hp", None)
    file = tmp_path / "s.json"
    assert run("quantize", tiny, tmp_path / "out", *target, "--sensitivity", file) == 2
    said = capsys.readouterr().err
    assert "the budget is too small: the smallest settings take 2." in said and "the largest 8." in said
    assert not file.exists() and not (tmp_path / "out").exists()


def test_targets_that_do_not_go_together_are_usage_errors(tmp_path, capsys):
    for extra in (
        ["--target-bpw", "3", "--target-size", "1GB"],
        ["--target-bpw", "3", "--layers", "mlp=4/64"],
        ["--target-size", "much"],
        ["--sensitivity", "s.json"],
    ):
        assert main(["quantize", str(DOCLM), str(tmp_path / "out"), *extra]) == 2
        assert "--" in capsys.readouterr().err


def test_convert_names_the_settings_that_most_weights_have(tiny: Path, tmp_path: Path) -> None:
    """Also where the first weight has others."""
    layers = ["layers.0.self_attn.q_proj=8/32", "layers.0.self_attn.k_proj=8/32"]
    assert run("quantize", tiny, tmp_path / "ours", "--bits", 4, *PLAIN, "--layers", *layers, "--json") == 0
    assert run("convert", tmp_path / "ours", tmp_path / "hqq", "--to", "hqq", "--json") == 0
    entry = json.loads((tmp_path / "hqq" / "config.json").read_text())["quantization_config"]
    params = entry["quant_config"]["weight_quant_params"]
    assert (params["nbits"], params["group_size"]) == (4, 64)
    assert run("convert", tmp_path / "hqq", tmp_path / "back", "--json") == 0
    entry = json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    assert (entry["nbits"], entry["group_size"]) == (4, 64)


def weights_of(out: Path) -> dict[str, tuple[int, int, bool]]:
    """(bits, group size, whether scales are quantized) of each quantized weight of the layers seen first."""
    named = model_dir.open_quantized(out).named_parameters(remove_duplicate=False)
    quantized = {name: weight for name, weight in named if isinstance(weight, HQQTensor)}
    return {name: (w.nbits, w.group_size, w.nested) for name, w in quantized.items()}


@pytest.mark.parametrize(
    ("args", "up_proj", "q_proj"),
    [
        (["--bits", 3], (3, 20, True), (3, 20, True)),
        (["--bits", 6], (6, 64, False), (6, 64, False)),
        (["--bits", 3, "--group-size", "auto"], (3, 20, True), (3, 20, True)),
        (["--bits", 3, "--group-size", 32], (3, 32, False), (3, 32, False)),
        (["--bits", 3, "--quant-metadata"], (3, 64, True), (3, 64, True)),
        (["--bits", 4, "--solver", "rtn"], (4, 20, True), (4, 20, True)),
        (["--bits", 3, "--layers", "q_proj=8"], (3, 20, True), (8, 64, False)),
        (["--bits", 8, "--layers", "q_proj=2"], (8, 64, False), (2, 20, True)),
        (["--bits", 3, "--layers", "q_proj=4/32"], (3, 20, True), (4, 32, False)),
        (["--bits", 3, "--group-size", 32, "--layers", "q_proj=8"], (3, 32, False), (8, 32, False)),
    ],
    ids=str,
)
def test_groups_are_the_best_for_the_bits_unless_they_are_given(tiny: Path, tmp_path: Path, args, up_proj, q_proj):
    assert run("quantize", tiny, tmp_path / "out", *args, "--json") == 0
    found = weights_of(tmp_path / "out")
    assert found["model.layers.0.mlp.up_proj.weight"] == up_proj
    assert found["model.layers.1.self_attn.q_proj.weight"] == q_proj
    assert found["model.embed_tokens.weight"] == found["lm_head.weight"] == (8, 64, False)


@pytest.mark.parametrize(
    ("args", "embed", "head"),
    [
        (["--embeddings", 6], 6, 6),
        (["--embeddings", "none"], None, None),
        (["--skip", "lm_head"], 8, None),
        (["--skip", "lm_head", "--target-bpw", 4, "--embeddings", 8], 8, None),
        (["--skip", "embed_tokens"], None, 8),
        (["--layers", "lm_head=5", "embed_tokens=none"], None, 5),
    ],
    ids=str,
)
def test_the_ends_of_a_model_have_bits_of_their_own(tiny: Path, tmp_path: Path, capsys, args, embed, head) -> None:
    assert run("quantize", tiny, tmp_path / "out", *args, "--json") == 0
    found = weights_of(tmp_path / "out")
    assert found.get("model.embed_tokens.weight", [None])[0] == embed
    assert found.get("lm_head.weight", [None])[0] == head
    left = json.loads(capsys.readouterr().out)["left_dense"]
    names = {"model.embed_tokens.weight": embed, "lm_head.weight": head}
    assert [group["names"] for group in left[:-1]] == [[name] for name, bits in names.items() if bits is None]
    bits = 6 if 6 in args else 8
    for group in left[:-1]:
        assert group["nbytes"] == 4 * 64 * 4096 and group["saving"] == 64 * 4096 * (32 - bits - 0.5) / 8
    assert left[-1]["names"] == ["others"] and left[-1]["saving"] == 0


@pytest.fixture(scope="module")
def tied(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tied")
    shutil.copytree(tiny, path, dirs_exist_ok=True)
    model = transformers.LlamaForCausalLM.from_pretrained(tiny)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    model.save_pretrained(path)
    return path


def test_a_tied_embedding_is_kept_dense_with_the_output_layer(tied: Path, tmp_path: Path, capsys) -> None:
    assert run("quantize", tied, tmp_path / "both") == 0
    assert weights_of(tmp_path / "both")["lm_head.weight"] == (8, 64, False)
    assert "model.embed_tokens" not in capsys.readouterr().out
    assert run("quantize", tied, tmp_path / "none", "--skip", "lm_head") == 0
    assert "lm_head.weight" not in (found := weights_of(tmp_path / "none")) and len(found) == 14
    said = capsys.readouterr()
    assert "--skip lm_head leaves model.embed_tokens.weight dense too: it is tied to the output layer" in said.err
    line = "  model.embed_tokens.weight = lm_head.weight: 1.05 MB, quantizing would save 0.77 MB"
    assert line in said.out.splitlines()


def test_the_summary_groups_layers_that_stayed_dense(tiny: Path, tmp_path: Path, capsys) -> None:
    assert run("quantize", tiny, tmp_path / "out", *PLAIN, "--skip", "lm_head", "down_proj") == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("left dense: "))
    assert lines[first] == "left dense: 2.16 MB"
    assert lines[first + 3] == "  model.layers.*.mlp.down_proj.weight (2): 0.07 MB, quantizing would save 0.06 MB"
    assert lines[first + 4] == "  others (5): 0.00 MB"


def test_eval_tries_what_quantize_would_do(tiny: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(tiny, tmp_path / "tiny")
    options = ("--text", DOCLM / "valid.txt", "--context", 32, "--max-tokens", 64, "--json")
    for number, args in enumerate((["--bits", 3], ["--bits", 3, "--embeddings", "none"], ["--group-size", 32])):
        out = tmp_path / str(number)
        assert run("quantize", tmp_path / "tiny", out, *args, "--json") == 0
        capsys.readouterr()
        results = []
        for command in ([out], [tmp_path / "tiny", *args]):
            assert run("eval", *command, *options) == 0
            results.append(json.loads(capsys.readouterr().out))
        assert results[0] == results[1]
    for args in (["--embeddings", 8], ["--group-size", "auto"]):
        assert run("eval", out, *options, *args) == 2
        assert "--bits, --group-size and --embeddings are for a dense DIR" in capsys.readouterr().err
