/* nk_smooth_l1 on the GPU: a thread a cell, over all its rows; a partial sum a tile of cells, summed in order. */
#include "partial_sums.cuh"
#include "smooth_l1.h"

namespace {

struct Strides {
  int64_t n, r, p;
};

template <class T, class C>
__global__ void smooth_l1_kernel(
    nk::SmoothL1<C> loss, const T* delta, T* grad, int64_t N, int64_t R, int64_t P, Strides at, Strides grad_at,
    const C* target, const C* weight, Strides target_at, const double* scale, double* partial) {
  const int64_t tiles = nk::ceil_div(P, nk::kBlock);
  for (int64_t block = blockIdx.x; block < N * tiles; block += gridDim.x) {
    const int64_t n = block / tiles, p = block % tiles * nk::kBlock + threadIdx.x;
    const C factor = static_cast<C>(scale[n]);
    double sum = 0;
    for (int64_t r = 0; p < P && r < R; ++r) {
      const int64_t i = n * target_at.n + r * target_at.r + p;
      C slope;
      const C value = loss(nk::widen(delta[n * at.n + r * at.r + p * at.p]) - target[i], slope);
      sum += static_cast<double>(weight[i] * value);
      if (grad) nk::narrow(factor * weight[i] * slope, grad[n * grad_at.n + r * grad_at.r + p * grad_at.p]);
    }
    sum = nk::block_sum(sum * static_cast<double>(factor));
    if (threadIdx.x == 0) partial[block] = sum;
  }
}

}  // namespace

int64_t nk_smooth_l1_workspace(int64_t N, int64_t R, int64_t P) {
  return N * (R > 0) * nk::ceil_div(P, nk::kBlock) * static_cast<int64_t>(sizeof(double));
}

int32_t nk_smooth_l1(
    const void* delta, void* grad, int32_t dtype, int64_t N, int64_t R, int64_t P, const int64_t* stride,
    const int64_t* grad_stride, const void* target, const void* weight, const int64_t* target_stride,
    const double* scale, double beta, double* loss, void* workspace, intptr_t where) {
  if (N == 0 || R == 0 || P == 0) return 0;
  double* partial = static_cast<double*>(workspace);
  const int64_t tiles = N * nk::ceil_div(P, nk::kBlock);
  const Strides at{stride[0], stride[1], stride[2]}, target_at{target_stride[0], target_stride[1], 1};
  const Strides grad_at = grad ? Strides{grad_stride[0], grad_stride[1], grad_stride[2]} : at;
  return nk::with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using C = typename nk::Compute<T>::type;
    NK_LAUNCH(
        (smooth_l1_kernel<T, C>), nk::grid_of(tiles), nk::kBlock, 0, nk::stream_of(where),
        nk::SmoothL1<C>{static_cast<C>(beta)}, static_cast<const T*>(delta), static_cast<T*>(grad), N, R, P, at,
        grad_at, static_cast<const C*>(target), static_cast<const C*>(weight), target_at, scale, partial);
    NK_LAUNCH(nk::add_partial_sums, 1, nk::kBlock, 0, nk::stream_of(where), partial, tiles, loss);
    return nk::launch_status();
  });
}
