"""How hqqtensor changes other libraries: one mechanism, for whoever else changes them too."""

import functools
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_python import run_fresh
from torch import nn

from hqqtensor import HqqConfig, quantize_
from hqqtensor.integrations import patches


def double(function: Callable) -> Callable:
    """What the tests put around a function: its results become twice as large."""
    return lambda *args, **kwargs: 2 * function(*args, **kwargs)


def times_ten(function: Callable) -> Callable:
    """What somebody else puts around a function, as most do."""

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return 10 * function(*args)

    return wrapper


@pytest.fixture
def library() -> Iterator[types.ModuleType]:
    """A library of two modules: one defines ``f``, a class and tables, the other has imported ``f``."""
    module, user = types.ModuleType("fakelib.core"), types.ModuleType("fakelib.user")
    exec(
        "def f(x):\n    'Adds one.'\n    return x + 1\n"
        "class C:\n    def method(self, x): return x - 1\n"
        "table, names, allowed, number = {'a': 1}, ['a'], {'a'}, 3\n",
        module.__dict__,
    )
    user.f = module.f  # type: ignore[attr-defined]
    others = types.ModuleType("otherlib")
    others.f = module.f  # type: ignore[attr-defined]
    added = {"fakelib": types.ModuleType("fakelib"), "fakelib.core": module, "fakelib.user": user, "otherlib": others}
    sys.modules.update(added)
    count = len(patches.patches())
    yield module
    for name in added:
        del sys.modules[name]
    for patch in patches.patches()[count:]:
        patch.problem = None


def wrap(name: str = "f", **more: Any) -> None:
    patches.wrap("fakelib.core", name, double, "the test", "1.0", **more)


def test_a_function_is_wrapped_once_also_where_its_library_has_imported_it(library: Any) -> None:
    for _ in range(3):
        wrap()
    assert library.f(1) == 4 and sys.modules["fakelib.user"].f is library.f  # type: ignore[attr-defined]
    assert library.f.__doc__ == "Adds one." and library.f.__name__ == "f"
    assert sys.modules["otherlib"].f(1) == 2  # type: ignore[attr-defined]
    patch = patches.patches()[-1]
    assert (patch.library, patch.target, patch.reason, patch.tested_with, patch.problem) == (
        "fakelib", "fakelib.core.f", "the test", "1.0", None,
    )  # fmt: skip
    assert patch.version == "unknown" and patches.problems() == []


def test_other_libraries_that_import_the_function_are_named(library: Any) -> None:
    wrap(also=["otherlib"])
    assert sys.modules["otherlib"].f is library.f  # type: ignore[attr-defined]


def test_a_function_that_somebody_else_wrapped_before_us_is_wrapped(library: Any) -> None:
    library.f = times_ten(library.f)
    wrap()
    wrap()
    assert library.f(1) == 2 * 10 * 2
    # This module has the function without their wrapper, and gets ours alone.
    assert sys.modules["fakelib.user"].f(1) == 2 * 2  # type: ignore[attr-defined]


def test_a_function_that_somebody_else_wraps_after_us_is_left_alone(library: Any) -> None:
    wrap()
    library.f = times_ten(library.f)
    theirs = library.f
    wrap()
    assert library.f is theirs and library.f(1) == 10 * 2 * 2


def test_a_function_that_came_back_is_wrapped_again(library: Any) -> None:
    original = library.f
    wrap()
    library.f = original  # as importlib.reload does
    wrap()
    assert library.f(1) == 4


def test_methods_are_wrapped_once(library: Any) -> None:
    for _ in range(2):
        wrap("C.method")
    assert library.C().method(4) == 6


def test_entries_are_put_into_tables_of_each_kind(library: Any) -> None:
    for _ in range(2):
        patches.register("fakelib.core", "table", {"b": 2}, "the test", "1.0")
        patches.register("fakelib.core", "names", ["b"], "the test", "1.0")
        patches.register("fakelib.core", "allowed", ["b"], "the test", "1.0")
    assert (library.table, library.names, library.allowed) == ({"a": 1, "b": 2}, ["a", "b"], {"a", "b"})
    with pytest.warns(patches.PatchWarning, match=r"fakelib.core.number is no dict, list or set but a int"):
        patches.register("fakelib.core", "number", ["b"], "the test", "1.0")


@pytest.mark.parametrize("name", ["gone", "C.gone", "Gone.method"])
def test_a_target_that_is_gone_is_a_warning_first_and_an_error_on_use(library: Any, name: str) -> None:
    missing = name.rpartition(".")[2] if name.startswith(("gone", "C.")) else "Gone"
    text = (
        rf"hqqtensor cannot change fakelib unknown: .* has no attribute '{missing}'\. Without that, the test does not "
        r"work\. hqqtensor was tested with fakelib 1\.0\."
    )
    with pytest.warns(patches.PatchWarning, match=text):
        wrap(name)
    with pytest.raises(patches.PatchError, match=text):
        patches.require("fakelib.")
    with pytest.raises(patches.PatchError, match=text):
        patches.require("another.", f"fakelib.core.{name}")
    patches.require("fakelib.other", "another.")
    assert patches.patches()[-1].problem and len(patches.problems()) == 1
    setattr(library, name.partition(".")[0], types.SimpleNamespace(gone=len, method=len) if "." in name else len)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(name)
    patches.require("fakelib.")


def test_an_operator_that_is_gone_is_found_missing(library: Any) -> None:
    assert patches.find("fakelib.core", "C.method", "the test", "1.0") is library.C.method
    with pytest.warns(patches.PatchWarning, match=r"cannot change somelib unknown: .*'no_such'"):
        assert patches.find("torch", "ops.no_such.op.default", "the test", "1.0", library="somelib") is None


# Real libraries


def test_peft_that_somebody_else_wrapped_first_knows_quantized_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    integrations = pytest.importorskip("peft.utils.integrations")
    from peft.tuners.lora import dora

    from hqqtensor.integrations.peft import dequantize

    original = integrations.dequantize_module_weight.__wrapped__
    calls = []

    @functools.wraps(original)
    def theirs(module: nn.Module) -> Any:
        calls.append(module)
        return original(module)

    monkeypatch.setattr(integrations, "dequantize_module_weight", theirs)
    monkeypatch.setattr(dora, "dequantize_module_weight", original)
    dequantize.install()
    layer = nn.Linear(64, 64)
    for module in (integrations, dora):
        assert torch.equal(module.dequantize_module_weight(layer), layer.weight)
    assert calls == [layer]
    quantize_(nn.Sequential(layer), HqqConfig(8, 64))
    for module in (integrations, dora):
        assert torch.equal(module.dequantize_module_weight(layer), layer.weight.dequantize())


def test_peft_that_somebody_else_wraps_afterwards_is_not_wrapped_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    lora_model = pytest.importorskip("peft.tuners.lora.model")
    from hqqtensor.integrations.peft import register

    ours = lora_model.dispatch_torchao

    @functools.wraps(ours)
    def theirs(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    monkeypatch.setattr(lora_model, "dispatch_torchao", theirs)
    register()
    register()
    assert lora_model.dispatch_torchao is theirs


LIBRARIES_OF_OTHER_VERSIONS = {
    "accelerate/__init__.py": "",
    "accelerate/utils/__init__.py": "",
    "accelerate/utils/offload.py": "def offload_weight(weight, name, folder, index=None): return weight.numpy()\n",
    "peft/__init__.py": "",
    "peft/tuners/__init__.py": "",
    "peft/tuners/lora/__init__.py": "",
    "peft/tuners/lora/model.py": "def dispatch_torchao(): return 'theirs'\n",
}


def test_versions_that_cannot_be_changed_are_imported_with_a_warning_and_refused_on_use(tmp_path: Path) -> None:
    for name, text in LIBRARIES_OF_OTHER_VERSIONS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    done = run_fresh(
        """
        import sys, warnings
        sys.path.insert(0, sys.argv[1])
        import torch, hqqtensor
        from hqqtensor.integrations import patches

        def error_of(function, *args):
            try:
                function(*args)
            except (patches.PatchError, NotImplementedError) as error:
                return type(error).__name__, str(error)

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import accelerate.utils.offload as offload
            from peft.tuners.lora.model import dispatch_torchao
        first, second = [str(w.message) for w in caught if issubclass(w.category, patches.PatchWarning)]
        assert "has no attribute 'load_offloaded_weight'" in first and "tested with accelerate 1.15" in first
        assert "offloading quantized weights to the disk does not work" in first
        assert "cannot change peft" in second and "peft.lora" in second and "Error: " in second, second
        # What is not quantized goes on.
        assert offload.offload_weight(torch.ones(2), "w", None).tolist() == [1, 1] and dispatch_torchao() == "theirs"
        weight = hqqtensor.HQQTensor.from_hp(torch.ones(8, 8), hqqtensor.HqqConfig(4, 8))
        assert error_of(offload.offload_weight, weight, "w", sys.argv[1]) == ("PatchError", first)
        assert error_of(patches.require, "peft.") == ("PatchError", second)
        # A library that never calls us comes to an operation that is not offered.
        kind, text = error_of(lambda: weight + 1)
        assert kind == "UnsupportedOperation" and first in text and second in text
        """,
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr


def test_installed_libraries_are_changed_when_imported_quickly_and_silently() -> None:
    done = run_fresh(
        """
        import sys, time, warnings, torch, torchao
        warnings.simplefilter("error")
        import hqqtensor
        from hqqtensor.integrations import patches
        assert {p.library for p in patches.patches()} <= {"torch", "torchao"}
        assert not {"transformers", "peft", "accelerate"} & set(sys.modules)

        for name in [n for n in sys.modules if n.startswith("hqqtensor.integrations")]:
            del sys.modules[name]
        before = time.perf_counter()
        from hqqtensor.integrations import patches, register_when_imported
        register_when_imported()
        print(time.perf_counter() - before)

        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", category=patches.PatchWarning)
        import importlib.util
        if importlib.util.find_spec("peft"):
            import peft
        import accelerate, transformers.modeling_utils, transformers.integrations.moe
        import torchao.prototype.safetensors.safetensors_support
        for patch in patches.patches():
            assert patch.problem is None and patch.version != "unknown", patch
            print(patch.library, patch.target.rpartition(".")[2])
        """
    )
    assert done.returncode == 0, done.stderr
    seconds, *names = done.stdout.splitlines()
    assert float(seconds) < 0.1  # 3 ms on an idle machine; this one may be busy
    if importlib.util.find_spec("peft"):
        assert {"peft dequantize_module_weight", "peft dispatch_torchao"} <= set(names)
    assert {
        "torch export", "torchao ALLOWED_AO_MODULES", "torchao ALLOWED_CLASSES", "torchao ALLOWED_TENSORS_SUBCLASSES",
        "torchao flatten_tensor_state_dict", "accelerate offload_weight", "accelerate load_offloaded_weight",
        "transformers AUTO_QUANTIZATION_CONFIG_MAPPING",
        "transformers AUTO_QUANTIZER_MAPPING", "transformers offload_and_maybe_resave_param",
        "transformers accelerate_dispatch", "transformers save_pretrained", "transformers get_memory_footprint",
        "transformers post_init", "transformers default",
    } <= set(names)  # fmt: skip
