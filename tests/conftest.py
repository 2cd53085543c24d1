"""The number of threads of every test: one, for tensors that are tiny, unless `make portable` asks for more."""

import os

import torch

THREADS = int(os.environ.get("NECKLACE_TEST_THREADS", "1"))


def pytest_configure() -> None:
    torch.set_num_threads(THREADS)


def pytest_runtest_teardown() -> None:
    """A test may change the number."""
    torch.set_num_threads(THREADS)
