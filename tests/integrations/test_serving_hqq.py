"""``quant_method`` "hqq" is transformers' own, unless the hqq package is missing or the user asks for ours."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from doclm_models import DOCLM, PLAIN, load, quantized
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_hqq import HqqHfQuantizer

from hqqtensor.cli import main
from hqqtensor.integrations.transformers import quantizer, register

CALL = r"call hqqtensor\.integrations\.transformers\.register\(hqq=True\) first"
CONFIG = transformers.HqqConfig(nbits=4, group_size=64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of the hqq library."""
    folder = tmp_path_factory.mktemp("hqq")
    assert main(["quantize", DOCLM, str(folder / "ours"), *PLAIN, "--json"]) == 0
    assert main(["convert", str(folder / "ours"), str(folder / "theirs"), "--to", "hqq", "--json"]) == 0
    return folder / "theirs"


def test_a_checkpoint_that_transformers_would_fill_with_random_weights_is_warned_of(checkpoint: Path) -> None:
    assert AUTO_QUANTIZER_MAPPING["hqq"] is HqqHfQuantizer
    with pytest.warns(UserWarning, match=rf"fills a checkpoint of hqq with random weights\. .*{CALL}"):
        model = load(checkpoint)
    assert quantized(model) == []


@pytest.mark.usefixtures("serves_hqq")
def test_the_call_that_the_warning_names_loads_it(checkpoint: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*random weights")
        model = load(checkpoint)
    assert len(quantized(model)) == 35
    want = load(checkpoint.parent / "ours")
    assert all(torch.equal(p, want.get_parameter(name)) for name, p in model.named_parameters())


def test_quantizing_with_transformers_own_quantizer_says_what_to_do() -> None:
    with pytest.warns(UserWarning, match=rf"cannot quantize with hqq\. .*{CALL}"), pytest.raises(NotImplementedError):
        load(quantization_config=CONFIG)


def test_a_transformers_that_can_do_it_is_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def loads(self: Any) -> list[Any]:
        return []

    for name, pre_quantized in (("get_weight_conversions", True), ("get_quantize_ops", False)):
        with monkeypatch.context() as patch, warnings.catch_warnings():
            patch.setattr(HqqHfQuantizer, name, loads)
            warnings.simplefilter("error")
            HqqHfQuantizer(CONFIG, pre_quantized=pre_quantized)
        with pytest.warns(UserWarning, match=CALL):
            HqqHfQuantizer(CONFIG, pre_quantized=pre_quantized)


def test_without_the_hqq_package_ours_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "hqq", HqqHfQuantizer)  # put back at the end
    register()
    assert AUTO_QUANTIZER_MAPPING["hqq"] is HqqHfQuantizer
    monkeypatch.setattr(quantizer, "is_hqq_available", lambda: False)
    register()
    assert AUTO_QUANTIZER_MAPPING["hqq"] is quantizer.HQQTensorHfQuantizer
