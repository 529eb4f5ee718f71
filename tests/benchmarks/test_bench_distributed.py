"""The benchmark of distributed weights counts what FSDP sends."""

import json

from benchmarks import distributed


def test_the_bytes_that_are_sent_are_those_of_the_packed_weights(capsys) -> None:
    distributed.main(["--width", "256", "--json"])
    rows = {row["setting"]: row for row in json.loads(capsys.readouterr().out)["settings"]}
    assert set(rows) == set(distributed.SETTINGS)
    for name, row in rows.items():
        assert 0.75 < row["sent"] / row["packed"] < 1.05, name
