"""The scripts for shells name every command and option; the shells that are here take them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hqqtensor.cli import main

pytest.importorskip("shtab", reason="completion needs shtab")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_has_commands_and_options_and_the_shell_reads_it(shell: str, tmp_path: Path, capsys) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("quantize", "recommend", "max-shard-size", "hqqtensor"):
        assert word in script
    assert main(["completion", shell, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"shell": shell, "script": script.removesuffix("\n")}
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        done = subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_bash_completes_commands_and_options(tmp_path: Path, capsys) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    ask = """
        source "$1"; complete_function=$(complete -p hqqtensor | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        for words in "hqqtensor rec" "hqqtensor quantize --dry"; do
            COMP_WORDS=($words); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); $complete_function; echo "${COMPREPLY[@]}"
        done
    """
    done = subprocess.run(["bash", "-c", ask, "bash", str(tmp_path / "script")], capture_output=True, text=True)
    assert [line.split() for line in done.stdout.splitlines()] == [["recommend"], ["--dry-run"]], done.stderr


def test_completion_needs_no_torch(capsys, monkeypatch) -> None:
    monkeypatch.setattr("hqqtensor.registration.register", None)
    assert main(["completion", "bash"]) == 0
    assert "hqqtensor" in capsys.readouterr().out


def test_a_missing_shtab_is_named_with_what_installs_it(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert "pip install 'hqqtensor[cli]'" in capsys.readouterr().err
