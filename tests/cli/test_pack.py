"""``hqqtensor pack`` and ``unpack``: exit codes, pipes, and outputs that are whole or not there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hqqtensor.cli import main


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    (path / "config.json").write_text("{}" * 5000)
    (path / "tokens.bin").write_bytes(bytes(range(256)) * 500)
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_directory_packs_and_unpacks(source: Path, tmp_path: Path, capsys) -> None:
    packed, out = tmp_path / "a.hqqpack", tmp_path / "out"
    assert run("pack", source, packed, "--compression", "deflate") == 0
    assert "2 files, 0.14 MB in " in capsys.readouterr().out
    assert run("unpack", packed, out, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["files"] == ["config.json", "tokens.bin"] and summary["bytes"] == 138_000
    assert contents(out) == contents(source)
    assert oct(packed.stat().st_mode & 0o777) == oct((source / "config.json").stat().st_mode & 0o777)
    assert run("pack", source, packed) == 2 and "--overwrite replaces it" in capsys.readouterr().err
    assert run("unpack", packed, out) == 2 and "not empty" in capsys.readouterr().err
    assert run("pack", source, packed, "--overwrite", "--json", "--compression", "deflate") == 0
    assert json.loads(capsys.readouterr().out)["raw_bytes"] == 138_000
    assert run("unpack", packed, out, "--overwrite") == 0 and contents(out) == contents(source)


def test_through_a_pipe(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hqqtensor"]
    pack = subprocess.Popen(
        [*command, "pack", source, "-", "--compression", "deflate", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    done = subprocess.run(
        [*command, "unpack", "-", tmp_path / "out"], stdin=pack.stdout, capture_output=True, text=True
    )
    assert done.returncode == 0 and "2 files" in done.stdout, done.stderr
    assert json.loads(pack.communicate()[1])["raw_bytes"] == 138_000 and pack.returncode == 0
    assert contents(tmp_path / "out") == contents(source)


@pytest.mark.parametrize("damage", ["cut", "altered", "longer"])
def test_a_damaged_file_leaves_the_old_model(source: Path, tmp_path: Path, capsys, damage: str) -> None:
    packed, out = tmp_path / "a.hqqpack", tmp_path / "out"
    assert run("pack", source, packed, "--compression", "deflate") == 0
    assert run("unpack", packed, out) == 0
    before = contents(out)
    data = bytearray(packed.read_bytes())
    if damage == "altered":
        data[len(data) // 2] ^= 1
    packed.write_bytes({"cut": data[:-10], "altered": data, "longer": data + b"x"}[damage])
    capsys.readouterr()
    assert run("unpack", packed, out, "--overwrite") == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 or error[-1].startswith("hqqtensor unpack:")
    assert str(packed) in error[-1] and "stream" in error[-1]
    assert contents(out) == before and sorted(p.name for p in tmp_path.iterdir()) == ["a.hqqpack", "out", "source"]


def test_what_cannot_run_as_written_has_exit_code_2(source: Path, tmp_path: Path, capsys) -> None:
    for arguments, match in [
        (("pack", tmp_path / "nowhere", tmp_path / "a"), "is not a directory"),
        (("pack", source, source / "a"), "packed into itself"),
        (("pack", source, tmp_path), "is a directory"),
        (("pack", source, tmp_path / "nowhere" / "a"), "is not a directory"),
        (("unpack", tmp_path / "nowhere", tmp_path / "out"), "cannot read"),
    ]:
        assert run(*arguments) == 2
        assert match in capsys.readouterr().err
    (tmp_path / "text").write_text("no stream at all")
    assert run("unpack", tmp_path / "text", tmp_path / "out") == 1
    assert "no stream of hqqtensor pack" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_reader_that_stops_is_an_error(source: Path) -> None:
    (source / "large.bin").write_bytes(bytes(range(256)) * 40_000)
    pack = subprocess.Popen(
        [sys.executable, "-m", "hqqtensor", "pack", source, "-", "--compression", "deflate", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert pack.stdout is not None and pack.stderr is not None
    pack.stdout.close()
    assert "reader stopped" in pack.stderr.read() and pack.wait() == 1
