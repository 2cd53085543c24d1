/* A sort by one thread block. */
#pragma once

#include "launch.cuh"

namespace nk {

/* Return the smallest power of two that is at least `least`. */
NK_HD int64_t power_of_two(int64_t least) {
  int64_t size = 1;
  while (size < least) size *= 2;
  return size;
}

/* Sort `size` keys, a power of two, in place by the strict order `before` (Batcher 1968). All threads of the block call
 * it together. The result does not depend on their number. */
template <class Before>
__device__ inline void bitonic_sort(uint64_t* key, int64_t size, Before before) {
  __syncthreads();
  for (int64_t run = 2; run <= size; run *= 2) {
    for (int64_t apart = run / 2; apart > 0; apart /= 2) {
      for (int64_t pair = threadIdx.x; pair < size / 2; pair += blockDim.x) {
        const int64_t i = 2 * pair - (pair & (apart - 1));
        const int64_t j = i + apart;
        const uint64_t a = key[i];
        const uint64_t b = key[j];
        const bool ascending = (i & run) == 0;
        if (ascending ? before(b, a) : before(a, b)) {
          key[i] = b;
          key[j] = a;
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace nk
