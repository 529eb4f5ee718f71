"""A calibration that was interrupted or killed goes on where it stopped, and gives the same weights bit for bit."""

import copy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_python import run_fresh
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from hqqtensor import HqqConfig, HQQTensor, quantize_
from hqqtensor.calibration import apply, calibrate, chain, collect, data
from hqqtensor.calibration.resume import ResumeError, ResumeFolder, digest, write_archive
from hqqtensor.quantize import PHASES

CONFIG = HqqConfig(3, 32)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Blocks in a list between two layers."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.head = nn.Linear(32, 64), nn.Linear(64, 16)
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


BATCHES = [torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)]
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 32, "bos_token_id": 1,
}  # fmt: skip


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def qwen3_moe() -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
    return Qwen3MoeForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.batches_of, "__defaults__", (None, 128, 0, 4, None))
    monkeypatch.setattr(collect, "MANY_TOKENS", 128)


def same(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert type(tensor) is type(second[name]) and torch.equal(tensor, second[name]), name


class Calls(list[tuple[int, int, str]]):
    """A progress callback that notes its calls and raises KeyboardInterrupt at the one numbered ``stop``."""

    def __init__(self, stop: int | None = None) -> None:
        super().__init__()
        self.stop = stop

    def __call__(self, *call: Any) -> None:
        self.append(call)
        if len(self) == self.stop:
            raise KeyboardInterrupt

    def names(self) -> list[str]:
        return [name for _, _, name in self]


def interrupted_everywhere(make: Callable[[], nn.Module], folder: Path, every: int = 1, **options: Any) -> list[Calls]:
    """Interrupt at every ``every``-th call of progress, go on, and compare; the calls of the runs that went on."""
    want, undisturbed, went_on = make(), Calls(), []
    quantize_(want, CONFIG, progress=undisturbed, **options)
    for stop in range(1, len(undisturbed) + 1, every):
        model, calls = make(), Calls()
        dense = copy.deepcopy(model.state_dict())
        with pytest.raises(KeyboardInterrupt):
            quantize_(model, CONFIG, progress=Calls(stop), resume=folder, **options)
        assert all(torch.equal(v, dense[k]) for k, v in model.state_dict().items())
        quantize_(model, CONFIG, progress=calls, resume=folder, **options)
        same(model, want)
        assert list(folder.iterdir()) == []
        assert calls[-1][:2] == undisturbed[-1][:2]
        went_on.append(calls)
    return went_on


@pytest.mark.parametrize("quality", ["fast", "good", "best"])
def test_a_run_that_was_interrupted_at_any_moment_gives_the_same_weights(
    tmp_path: Path, quality: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply, "STEPS", 6)
    went_on = interrupted_everywhere(Stack, tmp_path, calibration=BATCHES, quality=quality)
    last = went_on[-1].names()  # interrupted at the head, behind all blocks
    assert "finished before" in last and "calibrating" not in last
    assert not any(name.startswith("layers.") for name in last) and "head.weight" in last


@pytest.mark.parametrize("make", [llama, qwen3_moe])
def test_text_that_the_model_wrote_is_kept(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    went_on = interrupted_everywhere(make, tmp_path, every=9, calibration="self")
    assert "writing text" in went_on[0].names() and "writing text" not in went_on[-1].names()


def test_hidden_states_in_files_are_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "IN_MEMORY", 0)
    interrupted_everywhere(Stack, tmp_path, every=3, calibration=BATCHES)


def test_a_run_that_is_interrupted_again_and_again_comes_to_its_end(tmp_path: Path) -> None:
    want, model, runs = Stack(), Stack(), 0
    quantize_(want, CONFIG, calibration=BATCHES)
    while not isinstance(model.head.weight, HQQTensor):
        runs += 1
        try:
            quantize_(model, CONFIG, calibration=BATCHES, resume=tmp_path, progress=Calls(4))
        except KeyboardInterrupt:
            assert runs < 9
    same(model, want)
    assert runs > 3


def test_blocks_that_stay_dense_are_steps_too(tmp_path: Path) -> None:
    config = HqqConfig(3, 32, skip_modules=["layers.0", "layers.2"])
    want, model = Stack(), Stack()
    quantize_(want, config, calibration=BATCHES)
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, config, calibration=BATCHES, resume=tmp_path, progress=Calls(len(BATCHES) + 2))
    quantize_(model, config, calibration=BATCHES, resume=tmp_path)
    same(model, want)


def test_a_calibration_made_before_can_be_resumed(tmp_path: Path) -> None:
    want, model = Stack(), Stack()
    calibration = calibrate(model, BATCHES)
    quantize_(want, CONFIG, calibration=calibration)
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, CONFIG, calibration=calibration, resume=tmp_path, progress=Calls(5))
    with pytest.raises(ResumeError, match="calibrated on differs"):
        quantize_(model, CONFIG, calibration=calibrate(model, BATCHES[:2]), resume=tmp_path)
    quantize_(model, CONFIG, calibration=calibration, resume=tmp_path)
    same(model, want)


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        quantize_(Stack(), CONFIG, calibration=BATCHES, resume=tmp_path / "kept", progress=Calls(8))
    return tmp_path / "kept"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": HqqConfig(4, 32)}, "another call: nbits was 3 and is 4"),
        ({"model": Stack(1)}, "another call: model differs"),
        ({"calibration": BATCHES[:2]}, "another call: calibrated on differs"),
        ({"quality": "best"}, "another call: mode was 'full' and is 'trained'"),
        ({"filter_fn": lambda module, name: name == "head"}, "another call: names of the weights differs"),
        ({"quality": "fast", "config": HqqConfig(2, 32)}, "nbits was 3 and is 2; mode was 'full' and is 'diagonal'"),
    ],
    ids=["config", "model", "batches", "quality", "filter", "two"],
)
def test_a_folder_of_another_call_is_refused_and_left_alone(begun: Path, change: Any, message: str) -> None:
    files = {file.name: file.read_bytes() for file in begun.iterdir()}
    call = {"model": Stack(), "config": CONFIG, "calibration": BATCHES, **change}
    with pytest.raises(ResumeError, match=message):
        quantize_(resume=begun, **call)
    assert not any(isinstance(p, HQQTensor) for p in call["model"].parameters())
    assert {file.name: file.read_bytes() for file in begun.iterdir()} == files


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "weights-00000.pt").write_text("mine")
    with pytest.raises(ResumeError, match="is not empty and holds no interrupted run"):
        quantize_(Stack(), CONFIG, calibration=BATCHES, resume=tmp_path)
    assert (tmp_path / "weights-00000.pt").read_text() == "mine"


def test_only_what_a_run_has_written_is_removed(begun: Path) -> None:
    (begun / "notes.txt").write_text("mine")
    quantize_(Stack(), CONFIG, calibration=BATCHES, resume=begun)
    assert [file.name for file in begun.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("removed", [0, 2])
def test_emptying_that_fails_leaves_a_quantized_model_and_the_next_call_goes_on_with_it(
    begun: Path, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    left, real = iter(range(removed)), Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.parent == begun and path.name.startswith("weights") and next(left, None) is None:
            raise OSError(5, "Input/output error", str(path))
        real(path, missing_ok)

    model = Stack()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.warns(
            UserWarning, match="the model is quantized, but .* could not be emptied: .*Input/output error"
        ):
            quantize_(model, CONFIG, calibration=BATCHES, resume=begun)
    again = Stack()
    quantize_(again, CONFIG, calibration=BATCHES, resume=begun)
    same(model, again)
    assert not list(begun.iterdir())


def test_an_error_of_writing_is_not_hidden_by_torchs_own(tmp_path: Path) -> None:
    class Full:
        written = 0

        def write(self, data: bytes) -> int:
            self.written += len(data)
            if self.written > 6000:
                raise OSError(28, "No space left on device")
            return len(data)

    with pytest.raises(OSError, match="No space left"):
        write_archive([torch.zeros(1000) for _ in range(9)], Full())


def test_a_caller_may_keep_the_folder_until_the_weights_are_saved(tmp_path: Path) -> None:
    folder, again = ResumeFolder(tmp_path), Calls()
    quantize_(Stack(), CONFIG, calibration=BATCHES, resume=folder)
    assert folder.is_begun
    quantize_(Stack(), CONFIG, calibration=BATCHES, resume=ResumeFolder(tmp_path), progress=again)
    assert again.names() == ["finished before"] and again[0][0] == again[0][1]


def test_resume_without_a_calibration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resume is for calibration"):
        quantize_(Stack(), CONFIG, resume=tmp_path)


def test_the_phases_before_quantizing_are_reported() -> None:
    calls = Calls()
    quantize_(llama(), CONFIG, calibration="self", progress=calls)
    assert [n for n in dict.fromkeys(calls.names()) if n in PHASES] == list(PHASES)
    for phase in PHASES:
        done, total, _ = zip(*(call for call in calls if call[2] == phase), strict=True)
        assert done == tuple(range(1, total[0] + 1)) and len(set(total)) == 1


def test_a_digest_sees_values_shapes_and_types() -> None:
    zeros = torch.zeros(2, 3)
    values = [
        zeros, zeros.T, zeros.half(), zeros + 1, [zeros], [zeros, zeros], {"a": zeros}, {"b": zeros}, None, 0, "0",
        False,
    ]  # fmt: skip
    assert len({digest(value) for value in values}) == len(values)
    assert digest({"a": [zeros, (1, "x")]}) == digest({"a": [zeros.clone(), (1, "x")]})


KILLED = """
    import os, sys, torch
    import hqqtensor
    from hqqtensor.calibration import data
    from killing import kill_at
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, sizes, threads = sys.argv[1], eval(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    data.batches_of.__defaults__ = (None, 128, 0, 4, None)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    kill_at(6, (os, "replace"))
    hqqtensor.quantize_(model, hqqtensor.HqqConfig(3, 32), calibration="self", resume=folder)
"""


def test_a_run_that_was_killed_goes_on_in_another_process(tmp_path: Path) -> None:
    """Killed before the weights of the second block are in their place."""
    killed = run_fresh(KILLED, tmp_path, SIZES, torch.get_num_threads())
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == [
        "batches.pt", "calibration.pt", "run.json", "streams-00000.pt", "weights-00000.pt", "weights-00001.pt.part",
    ]  # fmt: skip
    want, model, calls = llama(), llama(), Calls()
    quantize_(want, CONFIG, calibration="self")
    quantize_(model, CONFIG, calibration="self", resume=tmp_path, progress=calls)
    assert calls.names()[0] == "finished before" and "model.layers.0.mlp.down_proj.weight" not in calls.names()
    same(model, want)
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_of_a_run_are_named(tmp_path: Path) -> None:
    def folder() -> ResumeFolder:
        run = ResumeFolder(tmp_path)
        run.describe(nn.Linear(2, 2), {"nbits": 4}, ["0.weight"], "a model")
        return run

    run = folder()
    run.open("mode", "text")
    run.save("batches", [torch.arange(3)])
    run.finish("step", {"0.weight": torch.ones(2)})
    file = tmp_path / "weights-00000.pt"
    whole = file.read_bytes()
    torch.save({"step": "step"}, tmp_path / "other.pt")
    for content in (whole[:100], b"", b"x" * 500, (tmp_path / "other.pt").read_bytes()):
        file.write_bytes(content)
        with pytest.raises(ResumeError, match=r"weights-00000\.pt is damaged; remove the folder"):
            folder().open("mode", "text")
    (tmp_path / "batches.pt").write_bytes(b"x")
    with pytest.raises(ResumeError, match=r"batches\.pt is damaged"):
        folder().load("batches", torch.device("cpu"))
    for text in ("{", "[]", "5", '{"model": ' + "[" * 100_000):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ResumeError, match=r"run\.json is damaged"):
            folder().open("mode", "text")
