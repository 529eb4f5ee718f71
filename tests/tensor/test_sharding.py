"""DDP, FSDP2, DTensor and distributed checkpoints on 2 and 4 processes give what one process gives."""

import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from ranks import run_checks

ON_TWO = [
    "ddp_trains_adapters_beside_quantized_weights",
    "fsdp_trains_like_one_process",
    "fsdp_shards_rows_unevenly",
    "fsdp_follows_its_policies",
    "fsdp_sends_the_packed_bytes_and_no_more",
    "what_cannot_be_sharded_is_refused",
    "fsdp1_trains_adapters_with_quantized_weights_left_whole",
    "tensor_parallel_layers_give_the_result_of_one_process",
    "weights_are_distributed_and_gathered_again",
    "whole_state_dicts_are_gathered_and_spread",
]
ON_FOUR = [
    "fsdp_shards_rows_unevenly",
    "what_cannot_be_sharded_is_refused",
    "checkpoints_go_from_all_processes_to_two_and_to_one",
    "fsdp_over_tensor_parallel_layers",
]
ON_ONE = ["fsdp_shards_rows_unevenly", "fsdp_follows_its_policies", "whole_state_dicts_are_gathered_and_spread"]
KILLED, HANGS = "a_killed_process_is_an_error_on_the_others", "a_process_that_hangs_is_an_error_after_the_timeout"


@cache
def problems(processes: int, names: tuple[str, ...]) -> dict[str, list[str]]:
    """What went wrong in one start of ``processes`` that run these checks."""
    with TemporaryDirectory() as folder:
        os.environ["CHECKS"] = folder
        return run_checks("sharding_checks", Path(__file__).parent, names, processes, Path(folder))


@pytest.mark.parametrize("name", ON_ONE)
def test_on_one_process(name: str) -> None:
    assert problems(1, tuple(ON_ONE))[name] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_TWO)
def test_on_two_processes(name: str) -> None:
    assert problems(2, tuple(ON_TWO))[name] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_FOUR)
def test_on_four_processes(name: str) -> None:
    assert problems(4, tuple(ON_FOUR))[name] == []


@pytest.mark.parametrize("name", [KILLED, HANGS])
def test_a_lost_process_ends_in_an_error(name: str) -> None:
    assert problems(2, (name,))[name] == []
