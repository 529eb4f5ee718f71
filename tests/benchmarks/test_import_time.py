import re

import pytest

from benchmarks import import_time


def test_it_prints_a_median_for_each_program_and_what_hqqtensor_adds(capsys: pytest.CaptureFixture[str]) -> None:
    import_time.main(["--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    names = [*import_time.PROGRAMS, "added by hqqtensor"]
    assert [re.split(r"\s{2,}", line)[0] for line in lines] == names
    times = {name: float(re.search(r"(-?[\d.]+) s", line)[1]) for name, line in zip(names, lines, strict=True)}
    assert 0 < times["hqqtensor --help"] < times["import torch, torchao"] / 2
