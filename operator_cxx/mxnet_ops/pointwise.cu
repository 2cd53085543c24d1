/* The GPU loops of pointwise.h. Includes no header of MXNet, so that any nvcc compiles it. */
#define NK_WITH_CUDA
#include "pointwise.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace nkmx {

namespace {

constexpr int64_t kThreads = 256;

template <class Body>
__global__ void each(int64_t size, const Body body) {
  const int64_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i < size) body(i);
}

/* Integer sums are exact, and so do not depend on the order. */
__global__ void count_labels(const float* label, int64_t size, unsigned long long* count) {
  const int64_t i = blockIdx.x * kThreads + threadIdx.x;
  const int found = __syncthreads_count(i < size && label[i] >= 1);
  if (threadIdx.x == 0 && found) atomicAdd(count, static_cast<unsigned long long>(found));
}

__global__ void as_double(double* count) {
  *count = static_cast<double>(*reinterpret_cast<unsigned long long*>(count));
}

void require(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

unsigned blocks_of(int64_t size) { return static_cast<unsigned>(nk::ceil_div(size, kThreads)); }

}  // namespace

template <class Body>
void launch(int64_t size, const Body& body, void* stream) {
  if (!size) return;
  each<<<blocks_of(size), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(size, body);
  require(cudaGetLastError());
}

#define NK_FOR(T)                                                   \
  template void launch(int64_t, const FocalTerms<T, true>&, void*);  \
  template void launch(int64_t, const FocalTerms<T, false>&, void*); \
  template void launch(int64_t, const Multiply<T>&, void*);          \
  template void launch(int64_t, const Scale<T>&, void*);             \
  template void launch(int64_t, const Copy<T>&, void*);              \
  template void launch(int64_t, const Zero<T>&, void*);
NK_FOR(float)
NK_FOR(double)
#undef NK_FOR
template void launch(int64_t, const GridAnchors&, void*);
template void launch(int64_t, const OneHot&, void*);
template void launch(int64_t, const ImageScale&, void*);

void launch_count(const float* label, int64_t size, double* count, void* stream) {
  static_assert(sizeof(double) == sizeof(unsigned long long), "the integer count is converted in place");
  const auto on = static_cast<cudaStream_t>(stream);
  require(cudaMemsetAsync(count, 0, sizeof(double), on));
  if (size) {
    count_labels<<<blocks_of(size), kThreads, 0, on>>>(label, size, reinterpret_cast<unsigned long long*>(count));
  }
  as_double<<<1, 1, 0, on>>>(count);
  require(cudaGetLastError());
}

}  // namespace nkmx
