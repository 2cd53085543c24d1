/* How the CUDA library launches kernels. */
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "common.h"

#ifndef NK_LAUNCH  // the tests' emulation of CUDA on a CPU brings its own
#define NK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define NK_DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* name = reinterpret_cast<type*>(name##_bytes)
#endif

namespace nk {

constexpr int kBlock = 256;  // threads of a block, where a kernel has no reason for another number
constexpr int64_t kMaxBlocks = 1 << 30;  // of a launch, along x; kernels stride over what is beyond

/* The blocks to launch for `count` of work, one each as far as a launch allows. */
inline unsigned int grid_of(int64_t count) { return static_cast<unsigned int>(std::min(count, kMaxBlocks)); }

inline cudaStream_t stream_of(intptr_t where) { return reinterpret_cast<cudaStream_t>(where); }

inline int32_t launch_status() { return static_cast<int32_t>(cudaGetLastError()); }

}  // namespace nk
