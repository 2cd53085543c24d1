/* nk_smooth_l1 on the CPU. N images, R rows of deltas, P cells.
 *
 * Work is cut into tiles of cells. A tile leaves a partial sum, and the partial sums are added in order.
 */
#include "smooth_l1.h"

#include "parallel.h"
#include "strides.h"

namespace {

constexpr int64_t kTile = 256;  // cells, so that the rows of a tile stay in the cache if the layout is channels last

/* Return the loss of `cells` cells of a row and write their gradient unless grad is null. C: type of the arithmetic. */
template <class T, class C>
double row_loss(
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
  const nk::Strides at = nk::Strides::of_channels(stride);
  const nk::Strides grad_at = grad ? nk::Strides::of_channels(grad_stride) : at;
  const nk::Strides target_at{target_stride[0], 0, target_stride[1], 1};
  nk::with_dtype<float, double, nk::float16, nk::bfloat16>(dtype, [&]<class T>() {
    using C = typename nk::Compute<T>::type;
    const nk::SmoothL1<C> smooth_l1{static_cast<C>(beta)};
    nk::parallel_for(N * tiles, where, [&](int64_t block) {
      const int64_t n = block / tiles;
      const int64_t p = block % tiles * kTile;
      double sum = 0;
      for (int64_t r = 0; r < R; ++r) {
        const T* row = static_cast<const T*>(delta) + at.offset(n, 0, r, p);
        T* grad_row = grad ? static_cast<T*>(grad) + grad_at.offset(n, 0, r, p) : nullptr;
        const int64_t target_offset = target_at.offset(n, 0, r, p);
        sum += row_loss<T, C>(
            smooth_l1, row, grad_row, std::min(kTile, P - p), at.p, grad_at.p,
            static_cast<const C*>(target) + target_offset, static_cast<const C*>(weight) + target_offset,
            static_cast<C>(scale[n]));
      }
      partial[block] = sum;
    });
  });
  for (int64_t block = 0; block < N * tiles; ++block) *loss += partial[block];
  return 0;
}
