/* nk_focal_loss on the GPU. N images, A anchors per cell, P cells, C classes.
 *
 * The threads of a block are rows of `lanes` threads: a row takes a cell of an anchor, its lanes take the classes in
 * turn. One lane where the cells of a class lie side by side (maps), so that neighbouring threads read neighbours; more
 * where the classes of a cell do. Every block leaves a partial sum, and those are summed in order.
 */
#include "focal_loss.h"
#include "partial_sums.cuh"

namespace {

constexpr int64_t kMaxLanes = 16;
constexpr int64_t kPerThread = 16;  // logits of a thread, about

struct Strides {
  int64_t n, a, c, p;
};

/* How the logits of an image are cut into blocks: tiles of cells times chunks of classes. */
struct Cut {
  int64_t lanes, rows, class_steps, cell_steps, chunks, tiles;

  Cut(int64_t A, int64_t P, int64_t C, bool by_cells) : lanes(1) {
    while (!by_cells && lanes < kMaxLanes && lanes < C) lanes *= 2;
    rows = nk::kBlock / lanes;
    const int64_t steps = nk::ceil_div(C, lanes);  // of a row, to take all classes
    class_steps = std::min(steps, kPerThread);
    cell_steps = kPerThread / class_steps;
    chunks = nk::ceil_div(steps, class_steps);
    tiles = nk::ceil_div(A * P, rows * cell_steps);
  }
};

template <class Number, bool squared>
struct Level {
  int64_t N, A, P, C, label_stride;
  Strides at, grad_at;
  bool by_cells;  // cells are counted as a * P + p, else p * A + a
  Cut cut;
  nk::FocalTerm<Number, squared> term;
  double alpha;
};

template <class T, class Number, bool squared>
__global__ void focal_loss_kernel(
    Level<Number, squared> level, const T* __restrict__ logit, T* __restrict__ grad, const float* __restrict__ label,
    const double* __restrict__ scale, double* __restrict__ partial) {
  const Cut& cut = level.cut;
  const int64_t A = level.A, P = level.P, C = level.C, of_image = cut.tiles * cut.chunks;
  const int lanes = static_cast<int>(cut.lanes), lane = threadIdx.x % lanes, row = threadIdx.x / lanes;
  const Number weight = static_cast<Number>(level.alpha), other_weight = static_cast<Number>(1 - level.alpha);
  for (int64_t block = blockIdx.x; block < level.N * of_image; block += gridDim.x) {
    const int64_t n = block / of_image, tile = block % of_image / cut.chunks, chunk = block % cut.chunks;
    const Number up = static_cast<Number>(-level.alpha * scale[n]);
    const Number down = static_cast<Number>((1 - level.alpha) * scale[n]);
    const int64_t begin = chunk * cut.class_steps * lanes + lane;
    const int64_t beyond = (chunk + 1) * cut.class_steps * lanes, end = beyond < C ? beyond : C;
    Number sum = 0;
    for (int64_t step = 0; step < cut.cell_steps; ++step) {
      const int64_t q = (tile * cut.cell_steps + step) * cut.rows + row;
      if (q >= A * P) break;
      const int64_t a = A == 1 ? 0 : level.by_cells ? q / P : q % A;
      const int64_t p = A == 1 ? q : level.by_cells ? q - a * P : q / A;
      const float own = label[n * level.label_stride + a * P + p];
      const T* x = logit + n * level.at.n + a * level.at.a + p * level.at.p;
      T* g = grad + n * level.grad_at.n + a * level.grad_at.a + p * level.grad_at.p;
      for (int64_t c = begin; c < end; c += lanes) {
        const float positive = static_cast<float>(c + 1);
        const Number z = nk::wrong_side<Number>(nk::widen(x[c * level.at.c]), own, positive);
        Number slope;
        const Number value = level.term(z, nk::exp_minus(std::fabs(z)), slope);
        sum += (own == positive ? weight : other_weight) * value;
        if (grad) nk::narrow((own == positive ? up : down) * slope, g[c * level.grad_at.c]);
      }
    }
    const double total = nk::block_sum(static_cast<double>(sum));
    if (threadIdx.x == 0) partial[block] = total * scale[n];
  }
}

}  // namespace

int64_t nk_focal_loss_workspace(int64_t N, int64_t A, int64_t P, int64_t C) {
  if (N == 0 || A == 0 || P == 0 || C == 0) return 0;
  const Cut one(A, P, C, true), other(A, P, C, false);
  return N * std::max(one.tiles * one.chunks, other.tiles * other.chunks) * static_cast<int64_t>(sizeof(double));
}

int32_t nk_focal_loss(
    const void* logit, void* grad, int32_t dtype, int64_t N, int64_t A, int64_t P, int64_t C, const int64_t* stride,
    const int64_t* grad_stride, const float* label, int64_t label_stride, const double* scale, double alpha,
    double gamma, double* loss, void* workspace, intptr_t where) {
  if (N == 0 || A == 0 || P == 0 || C == 0) return 0;
  double* partial = static_cast<double*>(workspace);
  const Strides at{stride[0], stride[1], stride[2], stride[3]};
  const Strides grad_at = grad ? Strides{grad_stride[0], grad_stride[1], grad_stride[2], grad_stride[3]} : at;
  const bool by_cells = at.p == 1;
  const Cut cut(A, P, C, by_cells);
  const int64_t blocks = N * cut.tiles * cut.chunks;
  const auto launch = [&](auto* type, auto squared) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Number = typename nk::Compute<T>::type;
    constexpr bool kSquared = decltype(squared)::value;
    const Level<Number, kSquared> level{
        N, A, P, C, label_stride, at, grad_at, by_cells, cut, nk::focal_term<Number, kSquared>(gamma), alpha};
    NK_LAUNCH(
        (focal_loss_kernel<T, Number, kSquared>), nk::grid_of(blocks), nk::kBlock, 0, nk::stream_of(where), level,
        static_cast<const T*>(logit), static_cast<T*>(grad), label, scale, partial);
  };
  return nk::with_dtype(dtype, [&](auto* type) {
    if (gamma == 2) {
      launch(type, std::true_type{});
    } else {
      launch(type, std::false_type{});
    }
    NK_LAUNCH(nk::add_partial_sums, 1, nk::kBlock, 0, nk::stream_of(where), partial, blocks, loss);
    return nk::launch_status();
  });
}
