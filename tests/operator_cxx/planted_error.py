"""Misuse a kernel on purpose, so that sanitize.sh can check that the sanitizers report errors.

read    pass arrays that are one cell shorter than the size passed
race    add to the same sum from two concurrent calls
"""

import sys
from threading import Thread

import torch
from torch import Tensor

from operator_cxx import library

P = 10_000
delta, scale, loss = torch.ones(1, 1, P), torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)


def smooth_l1(cells: Tensor, P: int) -> None:
    kernels = library.loaded["cpu"]
    sizes, stride = (1, 1, P), (P, P, 1)
    arguments = (None, 0, *sizes, stride, None, delta, delta, (P, P), scale, 1.0, loss)
    kernels.run("smooth_l1", cells, cells, *arguments, kernels.workspace("smooth_l1", cells, *sizes))


if sys.argv[1] == "read":
    smooth_l1(delta[:, :, 1:], P)
else:
    threads = [Thread(target=lambda: [smooth_l1(delta, P) for _ in range(20)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
