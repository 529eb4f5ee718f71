"""A model that is calibrated block by block from its files gets the bits of one that is calibrated in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fresh_python import run_fresh
from streaming_files import assert_equal, files, quantize

from hqqtensor import quantize_, save_model
from hqqtensor.calibration import collect, data
from hqqtensor.cli import main, model_dir
from hqqtensor.cli.arguments import make_parser
from hqqtensor.cli.quantize import make_config, skip_output_layer
from hqqtensor.offload import OffloadedBlocks
from hqqtensor.streaming import Source, calibrated, folder_of, offloaded

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 32, "max_position_embeddings": 32, "bos_token_id": 1,
}  # fmt: skip


def llama(path: Path) -> Path:
    """Tied, in bfloat16, in several files."""
    config = transformers.LlamaConfig(**SIZES, intermediate_size=96, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path, max_shard_size="60KB")
    return path


def qwen_moe(path: Path) -> Path:
    """Its files have a tensor for each expert, which are merged on loading; the output layer is not tied."""
    config = transformers.Qwen3MoeConfig(
        **{**SIZES, "num_hidden_layers": 2}, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(path)
    return path


def bert(path: Path) -> Path:
    config = transformers.BertConfig(
        vocab_size=1100, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(path)
    return path


def no_list(path: Path) -> Path:
    """One block is no list: the model is in memory as a whole."""
    config = transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 1}, intermediate_size=96)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(data.batches_of, "__defaults__", (None, 128, 0, 4, None))
    monkeypatch.setattr(collect, "MANY_TOKENS", 128)


def in_memory(source: Path, out: Path, calibration: str, quality: str, *options: object) -> None:
    """What ``hqqtensor quantize`` writes, by ``quantize_`` and ``save_model`` on the model opened whole."""
    args = make_parser().parse_args(["quantize", str(source), str(out), *map(str, options)])
    config = skip_output_layer(model_dir.empty_model_of(source), make_config(args), args)
    model = model_dir.open_dense(source)
    quantize_(model, config, calibration=calibration, quality=quality)
    save_model(model, out, max_shard_size=args.max_shard_size, non_persistent_buffers=False)
    settings = model_dir.read_dense_config(source)
    model_dir.complete(out, source, settings, config, next(model.parameters()).dtype)


@pytest.mark.parametrize(
    ("make", "calibration", "quality", "options"),
    [
        (llama, "self", "good", ["--bits", 3, "--max-shard-size", "20KB"]),
        (llama, "random", "best", ["--bits", 4, "--group-size", 64]),
        (qwen_moe, "random", "good", ["--bits", 4]),
        (qwen_moe, "self", "fast", ["--bits", 3, "--group-size", 32, "--layers", "q_proj=none"]),
        (bert, "random", "good", ["--bits", 3]),
        (no_list, "random", "good", ["--bits", 3]),
    ],
)
def test_the_files_equal_those_of_the_model_opened_whole(
    tmp_path: Path, make: Callable[[Path], Path], calibration: str, quality: str, options: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("hqqtensor.calibration.apply.STEPS", 5)
    dense = make(tmp_path / "dense")
    in_memory(dense, tmp_path / "want", calibration, quality, *options)
    with monkeypatch.context() as patch:
        patch.setattr(model_dir, "open_dense", None)
        arguments = ["--calibrate", calibration, "--quality", quality, "--json"]
        assert quantize(dense, tmp_path / "got", *options, *arguments) == 0
    assert_equal(tmp_path / "got", tmp_path / "want")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "got", "want"]


def test_one_dense_block_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, most, real = llama(tmp_path / "dense"), 0, OffloadedBlocks._load

    def load(self: OffloadedBlocks, block: str) -> None:
        nonlocal most
        real(self, block)
        most = max(most, len(self._loaded.keys() - {""}))

    monkeypatch.setattr(OffloadedBlocks, "_load", load)
    assert quantize(dense, tmp_path / "out", "--calibrate", "random", "--json") == 0
    assert most == 1


MEMORY = """
    import ctypes, sys, threading, time
    from hqqtensor.calibration import data
    from hqqtensor.cli import main

    # By default glibc keeps more and more freed memory for later, by chance up to half of what is measured here.
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    for threshold in M_TRIM_THRESHOLD, M_MMAP_THRESHOLD:
        ctypes.CDLL(None).mallopt(threshold, 1 << 16)

    data.batches_of.__defaults__ = (None, 128, 0, 4, None)
    most = 0

    def watch():
        global most
        while True:
            lines = open("/proc/self/status").read().splitlines()
            most = max(most, next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")))
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    for dense in sys.argv[1:]:
        assert main(["quantize", dense, dense + "-out", "--calibrate", "random", "--embeddings", "none", "--json"]) == 0
        print(most)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say how memory is used")
def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path: Path) -> None:
    def dense(layers: int) -> tuple[Path, int]:
        size = {**SIZES, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": layers}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size))
        model.save_pretrained(tmp_path / f"of-{layers}")
        return tmp_path / f"of-{layers}", sum(p.nbytes for p in model.parameters())

    (first, _), (few, bytes_of_few), (many, bytes_of_many) = dense(1), dense(2), dense(10)
    result = run_fresh(MEMORY, first, few, many)
    assert result.returncode == 0, result.stderr
    _, before, after = (int(line) for line in result.stdout.splitlines() if line.isdecimal())
    grown, dense_grown = after - before, bytes_of_many - bytes_of_few
    assert grown < 0.25 * dense_grown, f"{grown / 1e6:.0f} MB more for {dense_grown / 1e6:.0f} MB more of dense weights"


@pytest.mark.parametrize("calibration", ["self", "random"])
def test_a_run_that_was_stopped_at_any_call_gives_the_same_bytes(
    tmp_path: Path, calibration: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, out = llama(tmp_path / "dense"), tmp_path / "out"
    command = [dense, out, "--bits", 3, "--calibrate", calibration, "--json"]
    assert quantize(dense, tmp_path / "want", *command[2:]) == 0
    real, stop_at, calls = Source.read, 0, 0

    def read(self: Source, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Source, "read", read)
    runs = 0
    while True:
        runs, calls, stop_at = runs + 1, 0, 45 + 6 * runs
        if quantize(*command) == 0:
            break
        assert folder_of(out).is_dir() and not out.exists()
    assert runs >= 3
    assert files(out) == files(tmp_path / "want")
    assert_equal(out, tmp_path / "want")


KILLED = """
    import os, sys, torch
    from pathlib import Path
    import hqqtensor.cli.quantize
    from hqqtensor.calibration import data, resume
    from hqqtensor.cli import model_dir
    from killing import kill_at
    import transformers.models.llama.modeling_llama

    data.batches_of.__defaults__ = (None, 64, 0, 4, None)
    dense, parent = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    out = parent / "out"
    command = ["quantize", dense, str(out), "--bits", "3", "--calibrate", "random", "--overwrite", "--json"]

    def run(step, *functions):
        pid = os.fork()
        if pid == 0:
            sys.stdout = sys.stderr = open(parent.parent / "child.txt", "w")
            kill_at(step, *functions)
            os._exit(hqqtensor.cli.main(command))
        status = os.waitpid(pid, 0)[1]
        return os.WTERMSIG(status) or os.WEXITSTATUS(status)

    def content():
        return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}

    model_dir.empty_model_of(Path(dense), torch.bfloat16)
    assert run(0) == 0
    want = content()
    points = [(os, "preadv"), (os, "pwrite"), (os, "replace"), (os, "rename"), (torch, "save")]
    killed = 0
    for step in (33, 60, 71, 100, 121, 160):
        status = run(step, *points)
        killed += status == 9
        assert status in (0, 9), (step, status)
        assert run(0) == 0, step
        assert content() == want, step
        assert sorted(p.name for p in parent.iterdir()) == ["out"], step
    assert killed >= 4, killed
"""


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "parent").mkdir()
    result = run_fresh(KILLED, llama(tmp_path / "dense"), tmp_path / "parent")
    assert result.returncode == 0, result.stderr + (tmp_path / "child.txt").read_text()


def test_another_call_is_refused_and_loses_nothing(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    dense, out = llama(tmp_path / "dense"), tmp_path / "out"

    def stop(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hqqtensor.streaming.run.Worker", stop)
        assert quantize(dense, out, "--calibrate", "random") == 130
    weights = files(folder_of(out) / "calibration")
    assert sum(name.startswith("weights-") for name in weights) >= 3
    capsys.readouterr()
    for options in ([], ["--calibrate", "self"], ["--calibrate", "random", "--quality", "fast"]):
        assert quantize(dense, out, *options) == 2
        assert "another call" in capsys.readouterr().err
    assert files(folder_of(out) / "calibration") == weights
    assert quantize(dense, out, "--calibrate", "random") == 0
    assert not folder_of(out).exists()


def test_a_model_writes_the_same_text_whether_its_blocks_stay_in_memory_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = llama(tmp_path / "dense")
    written = []
    for memory in (0, 60_000, 2**40):
        monkeypatch.setattr(calibrated, "memory_to_use", lambda memory=memory: memory)
        assert main(["quantize", str(dense), str(tmp_path / str(memory)), "--calibrate", "self", "--json"]) == 0
        written.append(files(tmp_path / str(memory)))
    assert written[0] == written[1] == written[2]


def test_the_model_is_what_it_was_after_its_blocks_were_in_memory(tmp_path: Path) -> None:
    dense = llama(tmp_path / "dense")
    empty = model_dir.empty_model_of(dense, torch.bfloat16)
    before = {name: id(p) for name, p in empty.named_parameters()}
    source = Source(dense)
    ids = torch.randint(0, 128, (1, 8))
    want = model_dir.open_dense(dense)(ids).logits
    for limit in (0, 2**30):
        with offloaded(empty, source) as blocks, blocks.keeping(limit), torch.no_grad():
            assert torch.equal(empty(ids).logits, want)
            assert torch.equal(empty(ids).logits, want)
            assert empty.model.layers[0].mlp.up_proj.weight.is_meta == (limit == 0)
        assert {name: id(p) for name, p in empty.named_parameters()} == before
        assert all(p.is_meta for p in empty.parameters())
        assert "forward" not in vars(empty.model.layers[0])
    source.close()
