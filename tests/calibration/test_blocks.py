import copy
import warnings

import pytest
import torch
from torch import nn

from hqqtensor import HqqConfig, HQQTensor, dequantize_, quantize_
from hqqtensor.calibration import apply, calibrate, chain, train
from hqqtensor.calibration.blocks import block_lists, trace

CONFIG = HqqConfig(3, 32)


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 96), nn.Linear(96, width)

    def forward(self, hidden_states, scale=1.0):
        return (hidden_states + scale * self.down(torch.relu(self.up(self.norm(hidden_states)))),)


class PlainBlock(Block):
    """A block that gives hidden states and nothing else."""

    def forward(self, hidden_states, scale=1.0):
        return super().forward(hidden_states, scale)[0]


class Stack(nn.Module):
    """Blocks in a list between two layers; ``skips`` adds the first hidden states again, which breaks the chain."""

    def __init__(self, depth: int = 3, skips: bool = False, block: type = Block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(32, 64), nn.Linear(64, 16)
        self.layers = nn.ModuleList(block() for _ in range(depth))
        self.skips = skips

    def forward(self, x):
        h = start = self.first(x)
        for i, layer in enumerate(self.layers):
            h = layer(hidden_states=h, scale=1.0) if i % 2 else layer(h, 1.0)
            h = h if isinstance(h, torch.Tensor) else h[0]
            h = h + start if self.skips and i == 0 else h
        return self.head(h)


def batches(count: int = 3) -> list[torch.Tensor]:
    return [torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def error(model: nn.Module, other: nn.Module) -> float:
    x = torch.randn(8, 24, 32, generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        return ((other(x) - model(x)).square().sum() / model(x).square().sum()).item()


def test_outermost_lists_of_blocks_are_found():
    model = nn.ModuleDict({"a": Stack(3), "b": nn.ModuleList([nn.ReLU(), Block()]), "c": nn.ModuleList([Block()])})
    assert block_lists(model) == [[f"a.layers.{i}" for i in range(3)]]
    nested = nn.ModuleList(nn.ModuleList(Block() for _ in range(2)) for _ in range(2))
    assert block_lists(nested) == [["0", "1"]]


def test_blocks_that_hand_hidden_states_on_are_a_chain():
    model, inputs = Stack(), batches()
    (found,) = trace(model, inputs, block_lists(model))
    assert found.names == ["layers.0", "layers.1", "layers.2"]
    assert [c[0].hidden_by_name for c in found.calls] == [False, True, False]
    hidden = found.hidden[1]
    for name, calls in zip(found.names, found.calls, strict=True):
        hidden = calls[1](model.get_submodule(name), hidden)
    assert torch.equal(model.head(hidden), model(inputs[1]))


def test_blocks_of_one_list_let_batches_after_the_first_pass():
    runs = {}
    for block in (Block, PlainBlock):
        model, inputs = Stack(block=block), batches()
        counts: list[int] = []
        model.layers[0].up.register_forward_pre_hook(lambda *_, counts=counts: counts.append(1))
        (found,) = trace(model, inputs, block_lists(model))
        runs[block] = len(counts)
        assert len(found.hidden) == len(found.calls[0]) == 3
        assert all(torch.equal(h, model.first(x)) for h, x in zip(found.hidden, inputs, strict=True))
        assert "forward" not in vars(model.layers[0])
    assert runs == {Block: 3, PlainBlock: 1}


class Scaled(PlainBlock):
    """Its output is not what it adds up: the last layer's output is scaled."""

    def forward(self, hidden_states, scale=1.0):
        return 0.5 * super().forward(hidden_states, scale)


@pytest.mark.parametrize("mode", ["full", "trained"])
@pytest.mark.parametrize("block", [Block, PlainBlock, Scaled])
def test_the_stream_is_what_the_quantized_blocks_give(monkeypatch, block, mode):
    streams = []
    run_block = chain.ChainRun.run_block

    def spy(self, *args):
        run_block(self, *args)
        streams.append((self.added, [t.clone() for t in self.quantized.tensors]))

    monkeypatch.setattr(chain.ChainRun, "run_block", spy)
    config = HqqConfig(3, 32, skip_modules=["first"])
    model, inputs = Stack(block=block), batches()
    (found,) = trace(model, inputs, block_lists(model))
    quantize_(model, config, calibration=calibrate(model, inputs, mode))
    hidden = list(found.hidden)
    for name, calls, (added, stream) in zip(found.names, found.calls, streams, strict=True):
        assert list(added.values()) == [block is not Scaled]
        with torch.no_grad():
            hidden = [call(model.get_submodule(name), h) for call, h in zip(calls, hidden, strict=True)]
        for got, want in zip(stream, hidden, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"solver": "column_scaled"}, {"rotation": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_changes_codes_alone_and_only_where_the_block_gets_better(monkeypatch, options, dtype):
    seen = []

    def spy(roundings, *args):
        before = [r.module.weight for r in roundings]
        errors = train.train_rounding(roundings, *args)
        seen.append((errors, before, [r.module.weight for r in roundings]))
        return errors

    monkeypatch.setattr(chain, "train_rounding", spy)
    monkeypatch.setattr(train, "REACH", 0.05)
    model = Stack().to(dtype)
    inputs = [x.to(dtype) for x in batches(8)]
    config = HqqConfig(2, 32, skip_modules=["first", "head"], **options)
    quantize_(model, config, calibration=calibrate(model, inputs, "trained"))
    assert len(seen) == 3 and any(after < before for (before, after), _, _ in seen)
    for (before, after), old, new in seen:
        for a, b in zip(old, new, strict=True):
            assert torch.equal(a.scale, b.scale) and torch.equal(a.zero_point, b.zero_point)
            assert torch.equal(a.qdata, b.qdata) == (not after < before)
    assert torch.equal(model.layers[2].up.weight, seen[2][2][0])


def test_blocks_with_something_between_them_are_no_chain():
    model = Stack(skips=True)
    assert trace(model, batches(), block_lists(model)) == []


@pytest.mark.parametrize("skips", [False, True])
def test_calibration_brings_the_outputs_nearer_with_and_without_a_chain(skips):
    model = Stack(skips=skips)
    plain, calibrated = copy.deepcopy(model), copy.deepcopy(model)
    quantize_(plain, CONFIG)
    quantize_(calibrated, CONFIG, calibration=calibrate(calibrated, batches(8)))
    assert all(isinstance(m.weight, HQQTensor) for m in calibrated.modules() if isinstance(m, nn.Linear))
    assert error(model, calibrated) < 0.75 * error(model, plain)


def test_the_work_of_a_chain_is_linear_in_its_depth():
    def block_calls(depth: int) -> int:
        model, calls = Stack(depth), []
        for layer in model.layers:
            layer.register_forward_pre_hook(lambda *_: calls.append(1))
        quantize_(model, CONFIG, calibration=calibrate(model, batches()))
        return len(calls)

    counts = {depth: block_calls(depth) for depth in (2, 4, 8)}
    assert counts[8] - counts[4] == 2 * (counts[4] - counts[2])


def test_a_chain_is_traced_anew_where_layers_before_it_are_quantized(monkeypatch):
    traced = []
    monkeypatch.setattr(apply, "trace", lambda *args: traced.append(1) or trace(*args))
    model = Stack()
    quantize_(model, CONFIG, calibration=calibrate(model, batches()))
    assert len(traced) == 2  # "first" lies before the chain
    traced.clear()
    model = Stack()
    quantize_(model, HqqConfig(3, 32, skip_modules=["first"]), calibration=calibrate(model, batches()))
    assert len(traced) == 1


def test_hidden_states_in_files_give_the_same_weights(monkeypatch):
    models = []
    for limit in (chain.IN_MEMORY, 0):
        monkeypatch.setattr(chain, "IN_MEMORY", limit)
        model = Stack()
        quantize_(model, CONFIG, calibration=calibrate(model, batches()))
        models.append(model)
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(one, other)


def test_many_passes_through_the_whole_model_are_announced():
    deep = nn.Sequential(*(nn.Linear(16, 16) for _ in range(apply.MANY_STAGES + 1)))
    with pytest.warns(UserWarning, match="ran the whole model anew for each of 13 sets of layers"):
        quantize_(deep, HqqConfig(4, 16), calibration=calibrate(deep, [torch.randn(32, 16)]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(model := Stack(), CONFIG, calibration=calibrate(model, batches()))


def test_an_interrupt_within_a_chain_leaves_the_model_dense():
    model = Stack()
    before = copy.deepcopy(model.state_dict())

    def stop(done, total, name):
        if name == "layers.1.up.weight":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_(model, CONFIG, calibration=calibrate(model, batches()), progress=stop)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_what_is_quantized_is_what_runs():
    model = Stack()
    quantize_(model, CONFIG, calibration=calibrate(model, batches()))
    dense = copy.deepcopy(model)
    dequantize_(dense)
    torch.testing.assert_close(model(batches()[0]), dense(batches()[0]), rtol=1e-3, atol=1e-4)
