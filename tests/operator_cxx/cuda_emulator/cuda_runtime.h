/* An emulation of the part of CUDA that the kernels use. The .cu files compile as C++ with this header instead of
 * CUDA's and run on a CPU, so that their logic is tested on machines without a GPU.
 *
 * The threads of a block are fibers, which run one after another between barriers, in a random order that changes at
 * every barrier: a missing __syncthreads leads to a wrong result. Blocks also run one after another, starting at a
 * random one. A launch fails if a thread ends while others wait at a barrier, which is undefined on a GPU. Launches are
 * synchronous, one at a time.
 */
#pragma once

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local  // every block runs on a new system thread
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };

namespace cuda_emulator {

constexpr int kMaxThreads = 1024;           // of a block
constexpr size_t kMaxShared = 48 << 10;     // bytes of dynamic shared memory
constexpr size_t kStack = 128 << 10;        // bytes of a fiber

struct Fiber {
  std::vector<char> stack;
  ucontext_t start;
  std::jmp_buf here;
  bool started = false, done = true;
};

struct Machine {
  std::mutex busy;
  std::vector<Fiber> fibers;
  std::jmp_buf scheduler;
  std::function<void()> body;
  int current = 0;
  cudaError_t error = cudaSuccess;
  uint64_t random = 1;
  alignas(16) unsigned char shared[kMaxShared];
};

inline Machine machine;
inline dim3 threadIdx_, blockIdx_, blockDim_, gridDim_;

inline uint64_t next_random() {
  machine.random = machine.random * 6364136223846793005u + 1442695040888963407u;
  return machine.random >> 33;
}

/* Switch to the scheduler; returns when it resumes this fiber. */
inline void yield() {
  if (!_setjmp(machine.fibers[machine.current].here)) _longjmp(machine.scheduler, 1);
}

inline void fiber_main() {
  for (;;) {
    machine.body();
    machine.fibers[machine.current].done = true;
    yield();
  }
}

inline void resume(int thread) {
  Fiber& fiber = machine.fibers[thread];
  machine.current = thread;
  threadIdx_ = dim3(thread % blockDim_.x, thread / blockDim_.x % blockDim_.y, thread / (blockDim_.x * blockDim_.y));
  if (_setjmp(machine.scheduler)) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  fiber.stack.resize(kStack);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.data();
  fiber.start.uc_stack.ss_size = kStack;
  makecontext(&fiber.start, fiber_main, 0);
  setcontext(&fiber.start);
}

/* Run a block from barrier to barrier. Return false if some threads ended while others wait. */
inline bool run_block(int threads) {
  for (int i = 0; i < threads; ++i) machine.fibers[i].done = false;
  std::memset(machine.shared, 0xa5, sizeof machine.shared);  // uninitialised, as on a GPU
  for (int running = threads; running > 0;) {
    const int first = static_cast<int>(next_random() % threads);
    const bool backwards = next_random() % 2;
    for (int i = 0; i < threads; ++i) resume((first + (backwards ? threads - i : i)) % threads);
    running = 0;
    for (int i = 0; i < threads; ++i) running += !machine.fibers[i].done;
    if (running != 0 && running != threads) return false;
  }
  return true;
}

inline void launch(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body) {
  const std::lock_guard<std::mutex> lock(machine.busy);
  const int threads = static_cast<int>(block.x * block.y * block.z);
  const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  if (threads < 1 || threads > kMaxThreads || blocks < 1 || grid.y > 65535 || grid.z > 65535 || shared_bytes > kMaxShared) {
    machine.error = cudaErrorInvalidConfiguration;
    return;
  }
  if (machine.fibers.empty()) machine.fibers.resize(kMaxThreads);
  machine.body = std::move(body);
  gridDim_ = grid;
  blockDim_ = block;
  const int64_t first = static_cast<int64_t>(next_random() % blocks);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t at = (first + i) % blocks;
    blockIdx_ = dim3(at % grid.x, at / grid.x % grid.y, at / (static_cast<int64_t>(grid.x) * grid.y));
    bool ended = false;
    std::thread([&] { ended = run_block(threads); }).join();
    if (!ended) {
      // Fibers that still wait inside the kernel are discarded: the next launch creates new ones.
      machine.fibers.clear();
      machine.error = cudaErrorLaunchFailure;
      return;
    }
  }
}

}  // namespace cuda_emulator

#define threadIdx cuda_emulator::threadIdx_
#define blockIdx cuda_emulator::blockIdx_
#define blockDim cuda_emulator::blockDim_
#define gridDim cuda_emulator::gridDim_

#define NK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), cuda_emulator::launch((grid), (block), (shared_bytes), [&] { (kernel)(__VA_ARGS__); }))
#define NK_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(cuda_emulator::machine.shared)

inline void __syncthreads() { cuda_emulator::yield(); }

template <class T, class U>
T atomicAdd(T* at, U value) {
  const T old = *at;
  *at = static_cast<T>(old + value);
  return old;
}
template <class T, class U>
T atomicOr(T* at, U value) {
  const T old = *at;
  *at = static_cast<T>(old | value);
  return old;
}
template <class T, class U>
T atomicMax(T* at, U value) {
  const T old = *at;
  if (static_cast<T>(value) > old) *at = static_cast<T>(value);
  return old;
}
template <class T, class U>
T atomicMin(T* at, U value) {
  const T old = *at;
  if (static_cast<T>(value) < old) *at = static_cast<T>(value);
  return old;
}

inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_emulator::machine.error;
  cuda_emulator::machine.error = cudaSuccess;
  return error;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    default:
      return "unspecified launch failure";
  }
}
