"""Tests of the helper itself: errors in a process must be reported."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.two_processes import run_in_processes


def sum_of_ranks(rank, start):
    total = start + rank
    dist.all_reduce(total)
    return rank, total


def fails_alone(rank):
    if rank == 1:
        raise ValueError("the reason")
    dist.barrier()


def dies(rank):
    if rank == 1:
        os._exit(3)
    dist.barrier()


def stalls(rank):
    if rank == 1:
        time.sleep(1000)


def environment(rank):
    return os.environ.get("TRIED")


def test_a_process_has_the_current_environment(monkeypatch):
    for value in ("1", "2"):
        monkeypatch.setenv("TRIED", value)
        assert run_in_processes(environment) == [value, value]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_results_are_ordered_by_rank(size):
    found = run_in_processes(sum_of_ranks, torch.tensor([10.0]), size=size)
    assert found == [(rank, torch.tensor([10.0 * size + sum(range(size))])) for rank in range(size)]


def test_an_error_is_shown_with_its_rank_though_others_wait():
    with pytest.raises(AssertionError, match=r"(?s)rank \d of 2:.*Error"):
        run_in_processes(fails_alone)


def test_a_dead_process_is_named():
    with pytest.raises(AssertionError, match=r"rank 1 died|rank 0 of 2"):
        run_in_processes(dies)


def test_a_stalled_process_is_named():
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] did not end in time"):
        run_in_processes(stalls, timeout=3)
    assert time.monotonic() - start < 500  # not the 1000 of the process that stalls
