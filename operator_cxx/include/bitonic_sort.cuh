/* Sorting by one block: in place, in the same order whatever the number of threads. */
#pragma once

#include "launch.cuh"

namespace nk {

/* The least power of two that is at least `least`: what a bitonic sort can sort. */
NK_HD int64_t power_of_two(int64_t least) {
  int64_t size = 1;
  while (size < least) size *= 2;
  return size;
}

/* Sorts keys, of which there are a power of two, so that none stands behind one that it comes before (Batcher 1968). All
 * threads of the block come here together, the keys written, and go on when it is done. */
template <class Before>
__device__ inline void bitonic_sort(uint64_t* key, int64_t size, Before before) {
  __syncthreads();
  for (int64_t run = 2; run <= size; run *= 2) {
    for (int64_t apart = run / 2; apart > 0; apart /= 2) {
      for (int64_t pair = threadIdx.x; pair < size / 2; pair += blockDim.x) {
        const int64_t i = 2 * pair - (pair & (apart - 1)), j = i + apart;
        const uint64_t a = key[i], b = key[j];
        if ((i & run) == 0 ? before(b, a) : before(a, b)) {
          key[i] = b;
          key[j] = a;
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace nk
