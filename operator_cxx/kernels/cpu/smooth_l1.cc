/* nk_smooth_l1 on the CPU. Work is cut into tiles of cells; every tile has its own partial sum, summed in order. */
#include "smooth_l1.h"

#include "parallel.h"

namespace {

constexpr int64_t kTile = 256;  // cells: a tile's rows stay in the cache while channels-last deltas are walked

template <class T, class C>
double tile_loss(
    const nk::SmoothL1<C>& loss, const T* delta, T* grad, int64_t cells, int64_t stride, int64_t grad_stride,
    const C* target, const C* weight, C scale) {
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t p = 0; p < cells; ++p) {
    C slope;
    const C value = loss(nk::widen(delta[p * stride]) - target[p], slope);
    sum += weight[p] * value;
    if (grad) nk::narrow(scale * weight[p] * slope, grad[p * grad_stride]);
  }
  return static_cast<double>(sum) * static_cast<double>(scale);
}

}  // namespace

int64_t nk_smooth_l1_workspace(int64_t N, int64_t R, int64_t P) {
  return N * (R > 0) * nk::ceil_div(P, kTile) * static_cast<int64_t>(sizeof(double));
}

int32_t nk_smooth_l1(
    const void* delta, void* grad, int32_t dtype, int64_t N, int64_t R, int64_t P, const int64_t* stride,
    const int64_t* grad_stride, const void* target, const void* weight, const int64_t* target_stride,
    const double* scale, double beta, double* loss, void* workspace, intptr_t where) {
  if (N == 0 || R == 0 || P == 0) return 0;
  double* partial = static_cast<double*>(workspace);
  const int64_t tiles = nk::ceil_div(P, kTile);
  if (!grad) grad_stride = stride;
  nk::with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using C = typename nk::Compute<T>::type;
    const nk::SmoothL1<C> smooth_l1{static_cast<C>(beta)};
    nk::parallel_for(N * tiles, where, [&](int64_t block, int64_t) {
      const int64_t n = block / tiles, first = block % tiles * kTile, cells = std::min(kTile, P - first);
      double sum = 0;
      for (int64_t r = 0; r < R; ++r) {
        const int64_t at = n * target_stride[0] + r * target_stride[1] + first;
        const T* row = static_cast<const T*>(delta) + n * stride[0] + r * stride[1] + first * stride[2];
        T* grad_row =
            grad ? static_cast<T*>(grad) + n * grad_stride[0] + r * grad_stride[1] + first * grad_stride[2] : nullptr;
        sum += tile_loss<T, C>(
            smooth_l1, row, grad_row, cells, stride[2], grad_stride[2], static_cast<const C*>(target) + at,
            static_cast<const C*>(weight) + at, static_cast<C>(scale[n]));
      }
      partial[block] = sum;
    });
    return 0;
  });
  for (int64_t block = 0; block < N * tiles; ++block) *loss += partial[block];
  return 0;
}
