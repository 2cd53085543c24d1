"""The CUDA emulator detects errors: kernels that are wrong on a GPU are wrong there too."""

import ctypes
import subprocess
from pathlib import Path

import pytest

from operator_cxx import build

EMULATOR = Path(__file__).parent / "cuda_emulator"

KERNELS = """
#include "launch.cuh"

__global__ void reverse(int* value, bool with_barrier) {
  __shared__ int shared[64];
  shared[threadIdx.x] = value[threadIdx.x];
  if (with_barrier) __syncthreads();
  const int mirrored = shared[63 - threadIdx.x];
  __syncthreads();
  value[threadIdx.x] = mirrored;
}

__global__ void leave_before_a_barrier(int* value) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  value[threadIdx.x] = 1;
}

__global__ void add_place(unsigned long long* sum) {
  atomicAdd(sum, static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x);
}

extern "C" {
NK_EXPORT int run_reverse(int* value, int with_barrier) {
  NK_LAUNCH(reverse, 1, 64, 0, nullptr, value, with_barrier != 0);
  return nk::launch_status();
}
NK_EXPORT int run_leave(int* value) {
  NK_LAUNCH(leave_before_a_barrier, 1, 64, 0, nullptr, value);
  return nk::launch_status();
}
NK_EXPORT int run_add(unsigned long long* sum, int blocks, int threads) {
  NK_LAUNCH(add_place, blocks, threads, 0, nullptr, sum);
  return nk::launch_status();
}
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulator")
    (folder / "kernels.cu").write_text(KERNELS)
    include = [f"-I{EMULATOR}", *build.include_flags(), "-U_FORTIFY_SOURCE"]
    command = [
        *build.compiler(),
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-shared",
        *include,
        "-x",
        "c++",
        "kernels.cu",
        "-o",
        "k.so",
    ]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "k.so"))


def reversed_by(library, with_barrier):
    value = (ctypes.c_int * 64)(*range(64))
    assert library.run_reverse(value, with_barrier) == 0
    return list(value)


def test_threads_meet_at_a_barrier(library):
    assert all(reversed_by(library, True) == list(range(63, -1, -1)) for _ in range(5))


def test_a_missing_barrier_shows(library):
    assert any(reversed_by(library, False) != list(range(63, -1, -1)) for _ in range(5))


def test_a_barrier_that_a_thread_misses_fails_the_launch(library):
    assert library.run_leave((ctypes.c_int * 64)()) == 719
    assert reversed_by(library, True) == list(range(63, -1, -1))  # and the next launch works


def test_every_thread_of_every_block_runs_once(library):
    total = ctypes.c_ulonglong(0)
    assert library.run_add(ctypes.byref(total), 7, 96) == 0
    assert total.value == sum(range(7 * 96))


def test_an_invalid_launch_configuration_fails(library):
    assert library.run_add(ctypes.byref(ctypes.c_ulonglong(0)), 1, 2048) == 9
    assert library.run_add(ctypes.byref(ctypes.c_ulonglong(0)), 0, 32) == 9
