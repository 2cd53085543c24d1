/* Kernel launches of the CUDA library. */
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "common.h"

#ifndef NK_LAUNCH  // the tests' CUDA emulator defines its own
#define NK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define NK_DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* name = reinterpret_cast<type*>(name##_bytes)
#endif

namespace nk {

constexpr int kBlock = 256;              // threads per block, unless a kernel needs another number
constexpr int64_t kMaxBlocks = 1 << 30;  // per launch, along x; kernels loop over the rest

/* Return the number of blocks to launch for `count` blocks of work. */
inline unsigned int grid_of(int64_t count) { return static_cast<unsigned int>(std::min(count, kMaxBlocks)); }

/* Return the stream that the C interface passes as an integer. */
inline cudaStream_t stream_of(intptr_t where) { return reinterpret_cast<cudaStream_t>(where); }

inline int32_t launch_status() { return static_cast<int32_t>(cudaGetLastError()); }

}  // namespace nk
