"""AOTInductor packages of quantized models, run by a Python without hqqtensor and by a C++ program."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fresh_python import run_fresh
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

from hqqtensor import HqqConfig, quantize_
from hqqtensor.compile import JoinLinears
from hqqtensor.kernels import cpu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable())),
]
DOCS = Path(__file__).parents[2] / "docs"
NEW, CACHE = 8, 32
FAST_TO_COMPILE = {"aot_inductor.compile_wrapper_opt_level": "O0"}


@pytest.fixture(scope="module")
def language_model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    quantize_(model, HqqConfig(4, 32, embedding_nbits=8))
    model.generation_config.cache_implementation = "static"
    return model


@pytest.fixture(scope="module")
def language_package(language_model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of one sequence, any number of tokens at a time, and a cache of ``CACHE`` tokens."""
    module = TorchExportableModuleWithStaticCache(language_model, batch_size=1, max_cache_len=CACHE)
    example = {"input_ids": torch.zeros(1, 5, dtype=torch.int64), "cache_position": torch.arange(5)}
    count = torch.export.Dim("tokens", min=1, max=CACHE)
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    settings = {**FAST_TO_COMPILE, "post_grad_custom_pre_pass": JoinLinears()}
    with torch.no_grad():
        shapes = {"input_ids": {1: count}, "cache_position": {0: count}}
        program = torch.export.export(module, (), example, dynamic_shapes=shapes, strict=True)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
    return path


def answer_to(model: LlamaForCausalLM, prompt: Tensor) -> list[int]:
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return out[0, prompt.shape[1] :].tolist()


def test_a_packages_logits_and_tokens_are_those_of_the_model(
    language_model: LlamaForCausalLM, language_package: Path
) -> None:
    prompt = torch.randint(3, 96, (1, 11), generator=torch.manual_seed(3))
    package = torch._inductor.aoti_load_package(str(language_package))
    with torch.no_grad():
        for length in (1, 4, 11):
            got = package(input_ids=prompt[:, :length], cache_position=torch.arange(length))
            torch.testing.assert_close(got, language_model(prompt[:, :length]).logits)
        ids, position, tokens = prompt, 0, []
        for _ in range(NEW):
            logits = package(input_ids=ids, cache_position=torch.arange(position, position + ids.shape[1]))
            position += ids.shape[1]
            ids = logits[:, -1:].argmax(-1)
            tokens.append(int(ids))
    assert tokens == answer_to(language_model, prompt)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_the_program_in_cpp_that_the_page_builds_decodes_the_same_tokens(
    language_model: LlamaForCausalLM, language_package: Path, tmp_path: Path
) -> None:
    (tmp_path / "docs").symlink_to(DOCS)
    (tmp_path / "llama.pt2").symlink_to(language_package)
    (block,) = re.findall(r"^```sh\n(.*?)^```", (DOCS / "export.md").read_text(), re.S | re.M)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(DOCS.parent)

    def run(script: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-ec", script]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = run(block)
    assert done.returncode == 0, done.stderr
    assert list(map(int, done.stdout.split())) == answer_to(language_model, torch.tensor([[5, 8, 13]]))
    missing = run("./decode missing.pt2 1 1")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert len(missing.stderr.splitlines()) == 1 and "file open failed" in missing.stderr


def test_a_package_with_dynamic_batch_and_length_runs_without_hqqtensor(tmp_path: Path) -> None:
    """Plain and quantized scales: torch's executor hands an empty list of tensors over as None."""
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16, bias=False))
    quantize_(m, HqqConfig(4, 32, dynamic_config={"2": {"quant_scale": True, "quant_zero": True}}))
    assert [bool(layer.weight.operand().meta) for layer in (m[0], m[2])] == [False, True]
    shapes = ({0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=1, max=512)},)
    path = str(tmp_path / "model.pt2")
    inputs = [torch.randn(batch, length, 64) for batch, length in ((3, 5), (1, 1), (2, 40), (64, 1))]
    with torch.no_grad():
        program = torch.export.export(m, (inputs[0],), dynamic_shapes=shapes)
        torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=FAST_TO_COMPILE)
        torch.save([(x, m(x)) for x in inputs], tmp_path / "pairs.pt")
        package = torch._inductor.aoti_load_package(path)
        assert all(torch.equal(package(x), m(x)) for x in inputs)
    code = """
    import ctypes, sys
    import torch
    assert ctypes.CDLL(sys.argv[1]).hqqtensor_define_operators() == 0
    package = torch._inductor.aoti_load_package(sys.argv[2])
    assert all(torch.equal(package(x), want) for x, want in torch.load(sys.argv[3]))
    assert "hqqtensor" not in sys.modules
    """
    done = run_fresh(code, cpu.LIBRARY, path, tmp_path / "pairs.pt")
    assert done.returncode == 0, done.stderr
