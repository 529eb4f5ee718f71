"""The C reader, written after docs/format.md with no library: it reads what we do and survives any file."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from every_setting import VECTORS, weights_of_every_setting
from safetensors.torch import load_file
from torch import Tensor

from fuzz import reader
from hqqtensor import HqqConfig, HQQTensor, backend, save_model

SOURCE = Path(__file__).parents[1] / "readers" / "read_c" / "read.c"
REFUSED = 3
FLAGS = ["-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# A program that ends leaves its memory to the system; addresses that are asked for may be refused, as malloc does.
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:exitcode=99:allocator_may_return_null=1"}
SEEDS = [path for path in VECTORS if path.name != "sharded_bfloat16"]

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc here")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reader") / "read"
    subprocess.run(["gcc", "-std=gnu11", "-O1", "-ffp-contract=off", *FLAGS, str(SOURCE), "-o", str(out)], check=True)
    return out


def read(program: Path, files: list[Path], out: Path) -> dict[str, Tensor] | str:
    """The weights, or the one line that says why the file is refused."""
    result = subprocess.run([program, out, *files], env=ENVIRONMENT, capture_output=True, text=True, errors="replace")
    if result.returncode == REFUSED and result.stderr.count("\n") == 1:
        return result.stderr
    assert result.returncode == 0, (result.returncode, result.stderr)
    return load_file(out)


def dense(tensor: HQQTensor) -> Tensor:
    """As the reader writes weights: all but float64 as float32."""
    with backend("dequantize"):
        values = tensor.detach().dequantize()
    return values if values.dtype == torch.float64 else values.float()


@pytest.mark.parametrize("folder", VECTORS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_it_reads_the_test_vectors(program: Path, folder: Path, tmp_path: Path) -> None:
    weights = read(program, sorted(folder.glob("model*.safetensors")), tmp_path / "out")
    assert isinstance(weights, dict) and weights, weights
    expected = load_file(folder / "expected.safetensors")
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name].float()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_it_reads_every_width_format_axis_and_quantized_metadata(
    program: Path, dtype: torch.dtype, tmp_path: Path
) -> None:
    weights = weights_of_every_setting(dtype)
    nested = HqqConfig(4, 8, quant_scale=True, quant_zero=True, meta_nbits=4)
    weights["experts"] = HQQTensor.from_hp(torch.randn(3, 7, 40).to(dtype), nested)
    weights["transposed"] = HQQTensor.from_hp(torch.randn(9, 24).to(dtype), HqqConfig(5, 8)).t()
    weights["transposed_experts"] = weights["experts"].detach().mT
    weights["no_rows"] = HQQTensor.from_hp(torch.randn(9, 24).to(dtype), HqqConfig(5, 8))[:0]
    column_scaled = HqqConfig(4, 8, solver="column_scaled")
    weights["float64"] = HQQTensor.from_hp(torch.randn(9, 24).to(dtype), column_scaled).to(torch.float64)
    save_model(weights, tmp_path)
    values = read(program, [tmp_path / "model.safetensors"], tmp_path / "out")
    assert isinstance(values, dict), values
    quantized = {name: tensor for name, tensor in weights.items() if isinstance(tensor, HQQTensor)}
    assert values.keys() == quantized.keys()
    for name, tensor in quantized.items():
        assert torch.equal(values[name], dense(tensor)), f"{name} {tensor!r}"


def test_damaged_files_are_refused_or_read_as_numpy_and_hqqtensor_do() -> None:
    result = reader.run(0, seconds=60, count=4)
    assert result.findings == {}
    assert result.inputs == 4 * reader.VARIANTS and result.taken > 100


def test_a_damaged_file_is_never_longer_than_the_program_takes() -> None:
    numbers = (196589825190, 196589825651, 444630593497)  # these were: a shape of 4096 rows with their bytes
    assert all(len(file) <= reader.MOST_BYTES for number in numbers for file in reader.case(number)[1])
    assert reader.run(numbers[0], seconds=60, count=1).findings == {}


def test_a_later_version_and_an_unknown_attribute_are_refused(program: Path, tmp_path: Path) -> None:
    raw = (SEEDS[0] / "model.safetensors").read_bytes()
    for old, new, said in (
        (rb"\"version\": 1", rb"\"version\": 2", "format version"),
        (rb"\"axis\": ", rb"\"axes\": ", "a key that is not known"),
    ):
        assert raw.count(old)
        file = tmp_path / "model.safetensors"
        file.write_bytes(raw.replace(old, new))
        assert said in str(read(program, [file], tmp_path / "out"))
