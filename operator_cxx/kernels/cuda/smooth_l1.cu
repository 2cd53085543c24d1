/* nk_smooth_l1 on the GPU. N images, R rows of deltas, P cells.
 *
 * A thread takes a cell with all its rows. A block leaves a partial sum, and the partial sums are added in order.
 */
#include "partial_sums.cuh"
#include "smooth_l1.h"
#include "strides.h"

namespace {

template <class T, class C>
__global__ void smooth_l1_kernel(
    nk::SmoothL1<C> loss, const T* delta, T* grad, int64_t N, int64_t R, int64_t P, nk::Strides at, nk::Strides grad_at,
    const C* target, const C* weight, nk::Strides target_at, const double* scale, double* partial) {
  const int64_t tiles = nk::ceil_div(P, nk::kBlock);
  for (int64_t block = blockIdx.x; block < N * tiles; block += gridDim.x) {
    const int64_t n = block / tiles;
    const int64_t p = block % tiles * nk::kBlock + threadIdx.x;
    const C factor = static_cast<C>(scale[n]);
    double sum = 0;
    for (int64_t r = 0; p < P && r < R; ++r) {
      const int64_t i = target_at.offset(n, 0, r, p);
      C slope;
      const C value = loss(nk::widen(delta[at.offset(n, 0, r, p)]) - target[i], slope);
      sum += static_cast<double>(weight[i] * value);
      if (grad) nk::narrow(factor * weight[i] * slope, grad[grad_at.offset(n, 0, r, p)]);
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
  const cudaStream_t stream = nk::stream_of(where);
  const int64_t tiles = N * nk::ceil_div(P, nk::kBlock);
  const nk::Strides at = nk::Strides::of_channels(stride);
  const nk::Strides grad_at = grad ? nk::Strides::of_channels(grad_stride) : at;
  const nk::Strides target_at{target_stride[0], 0, target_stride[1], 1};
  nk::with_dtype<float, double, nk::float16, nk::bfloat16>(dtype, [&]<class T>() {
    using C = typename nk::Compute<T>::type;
    NK_LAUNCH(
        (smooth_l1_kernel<T, C>), nk::grid_of(tiles), nk::kBlock, 0, stream, nk::SmoothL1<C>{static_cast<C>(beta)},
        static_cast<const T*>(delta), static_cast<T*>(grad), N, R, P, at, grad_at, static_cast<const C*>(target),
        static_cast<const C*>(weight), target_at, scale, partial);
  });
  NK_LAUNCH(nk::add_partial_sums, 1, nk::kBlock, 0, stream, partial, tiles, loss);
  return nk::launch_status();
}
