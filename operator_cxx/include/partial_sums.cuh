/* Sums on the GPU in a fixed order. */
#pragma once

#include "launch.cuh"

namespace nk {

/* Return the sum of the values of all threads, on every thread of a block of kBlock threads. */
__device__ inline double block_sum(double value) {
  __shared__ double partial[kBlock];
  partial[threadIdx.x] = value;
  __syncthreads();
  for (int half = kBlock / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    __syncthreads();
  }
  const double total = partial[0];
  __syncthreads();
  return total;
}

/* Add the partial sums to loss; one block of kBlock threads. */
static __global__ void add_partial_sums(const double* partial, int64_t count, double* loss) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kBlock) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *loss += sum;
}

}  // namespace nk
