"""What ``import hqqtensor`` and the command's help import, print and register; each in a fresh process."""

import ast
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_python import run_fresh

import hqqtensor
from hqqtensor.registration import without_torchao_notes

ROOT = Path(hqqtensor.__file__).parent.parent
LAZY = ("calibration", "compile", "diagnostics", "presets", "search", "serialization", "cli")


def python(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_import_registers_all_prints_nothing_and_imports_the_rest_when_used() -> None:
    code = """if True:
        import json, sys
        import hqqtensor
        loaded = sorted(sys.modules)
        print("imported", file=sys.stderr, flush=True)
        import torch
        from torchao.core.config import config_from_dict, config_to_dict
        from torchao.quantization import quantize_
        from torchao.quantization.transform_module import _QUANTIZE_CONFIG_HANDLER as handlers
        print(json.dumps({
            "loaded": loaded,
            "linear": str(torch.ops.hqqtensor.linear.default),
            "safe": [t.__name__ for t in torch.serialization.get_safe_globals()],
            "hooks": [type(f).__module__ for f in sys.meta_path],
            "handlers": [t.__module__ for t in handlers],
            "round_trip": config_from_dict(config_to_dict(hqqtensor.HqqConfig(3))).nbits,
            "public": [getattr(hqqtensor, name).__class__.__name__ for name in hqqtensor.__all__],
            "dir": dir(hqqtensor),
            "lazy": hqqtensor.serialization.load_model is hqqtensor.load_model,
        }))
    """
    done = python("-c", code)
    # What torchao prints later, when its functions are called, is theirs.
    assert done.returncode == 0 and done.stderr.startswith("imported\n"), done.stderr
    facts = json.loads(done.stdout)
    loaded = set(facts["loaded"])
    assert {"torch", "torchao", "hqqtensor.tensor", "hqqtensor.quantize"} <= loaded
    others = ("transformers", "accelerate", "peft", "safetensors", "rich", "matplotlib")
    assert not loaded & {*others, *(f"hqqtensor.{name}" for name in LAZY)}
    assert facts["linear"] == "hqqtensor.linear.default" and "HQQTensor" in facts["safe"]
    assert "hqqtensor.import_hook" in facts["hooks"] and "hqqtensor.config" in facts["handlers"]
    assert facts["round_trip"] == 3 and facts["lazy"]
    assert len(facts["public"]) == len(hqqtensor.__all__) and set(hqqtensor.__all__) <= set(facts["dir"])


def test_import_adds_little_to_torch_and_torchao() -> None:
    code = """if True:
        import time
        times = [time.perf_counter()]
        import torch, torchao
        times.append(time.perf_counter())
        import hqqtensor
        times.append(time.perf_counter())
        print(*times)
    """
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    start, between, end = map(float, done.stdout.split())
    # 3 to 5 % on an idle machine. A diagnostics or transformers import at the top would pass this bound.
    assert end - between < 0.25 * (between - start)


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["quantize", "--help"], ["nonsense"]])
def test_help_and_errors_of_arguments_need_no_other_package(args: list[str]) -> None:
    done = python("-S", "-X", "importtime", "-m", "hqqtensor", *args)  # -S: without site-packages
    lines = done.stderr.splitlines()
    modules = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    printed = [line for line in lines if not line.startswith("import time:")]
    assert "hqqtensor.cli.arguments" in modules and not modules & {"torch", "torchao", "numpy"}
    assert {name for name in modules if name.startswith("hqqtensor")} <= {
        "hqqtensor", "hqqtensor.registration", "hqqtensor.cli", "hqqtensor.cli.arguments", "hqqtensor.cli.errors",
        "hqqtensor.cli.argument_types", "hqqtensor.cli.use_arguments",
    }  # fmt: skip
    if args == ["nonsense"]:
        assert done.returncode == 2 and len(printed) == 1 and "invalid choice: 'nonsense'" in printed[0]
    else:
        assert (done.returncode, printed) == (0, [])
        assert ("hqqtensor 0." if args == ["--version"] else "usage: hqqtensor") in done.stdout


def test_the_script_that_pip_writes_imports_no_torch(tmp_path: Path) -> None:
    script = tmp_path / "hqqtensor"
    script.write_text("import sys\nfrom hqqtensor.cli import main\nsys.exit(main())\n")
    done = python("-S", str(script), "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"hqqtensor {hqqtensor.__version__}\n", "")


def test_a_program_of_the_commands_name_registers_with_the_first_name_it_uses(tmp_path: Path) -> None:
    script = tmp_path / "hqqtensor"
    script.write_text(
        "import sys, hqqtensor\n"
        "assert 'torch' not in sys.modules\n"
        "hqqtensor.HqqConfig\n"
        "import torch\n"
        "print(torch.ops.hqqtensor.linear.default)\n"
    )
    done = python(str(script))
    assert (done.returncode, done.stdout, done.stderr) == (0, "hqqtensor.linear.default\n", "")


def test_type_checkers_see_the_names_that_there_are() -> None:
    tree = ast.parse((ROOT / "hqqtensor" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(seen) == sorted(hqqtensor.__all__)
    for name, module in seen.items():
        assert getattr(hqqtensor, name) is getattr(sys.modules[str(module)], name)
    with pytest.raises(AttributeError, match="no attribute 'quantise_'"):
        hqqtensor.quantise_  # noqa: B018


def test_the_version_stands_in_one_place() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert hqqtensor.__version__ not in text and re.search(r'^dynamic = \[.*"version"', text, re.M)


class _Kind:
    """Stands for a class of torchao that a message is about."""


_Kind.__module__ = "torchao.somewhere"
ENUM = "%s is an Enum subclass and is now natively supported by torch.compile as an opaque value type."


@pytest.mark.parametrize(
    ("logger", "message", "about", "shown"),
    [
        ("torchao", "Failed to load /x/_C_mxfp8.so: no", (), False),
        ("torchao", "Skipping import of cpp extensions", (), True),
        ("torch.utils._pytree", ENUM, (_Kind,), False),
        ("torch.utils._pytree", ENUM, (Path,), True),
        ("torch.utils._pytree", "%s is odd", (_Kind,), True),
        ("elsewhere", "Failed to load x", (), True),
    ],
)
def test_only_torchaos_notes_are_held_back_and_only_while_it_is_imported(
    logger: str, message: str, about: tuple, shown: bool, caplog: pytest.LogCaptureFixture, monkeypatch
) -> None:
    source = logging.getLogger(logger)
    monkeypatch.setattr(source, "propagate", True)
    monkeypatch.setattr(source, "level", logging.INFO)
    with without_torchao_notes():
        source.warning(message, *about)
    assert len(caplog.records) == shown
    monkeypatch.setattr(source, "level", logging.DEBUG)
    source.manager._clear_cache()  # type: ignore[attr-defined]
    with without_torchao_notes():
        source.warning(message, *about)
    assert caplog.records[-1].levelname == ("WARNING" if shown else "DEBUG") and len(caplog.records) == shown + 1
    source.warning(message, *about)
    assert caplog.records[-1].levelname == "WARNING" and not source.filters
    source.manager._clear_cache()  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", ["quantizer", "config", "model", "experts", "offload"])
def test_our_part_of_transformers_may_be_imported_before_theirs(module) -> None:
    code = f"""if True:
        import warnings
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        import hqqtensor.integrations.transformers.{module}
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
        from hqqtensor.integrations.patches import patches
        assert "hqqtensor" in AUTO_QUANTIZER_MAPPING
        print([p.target for p in patches() if p.problem])
    """
    done = run_fresh(code)
    assert done.returncode == 0 and done.stdout == "[]\n", done.stderr
