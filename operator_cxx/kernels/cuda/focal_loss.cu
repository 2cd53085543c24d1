/* nk_focal_loss on the GPU. N images, A anchors per cell, P cells, C classes.
 *
 * The kBlock threads of a block are `rows` rows of `lanes` threads. A row takes one cell of one anchor at a time, and
 * its lanes take the classes in turn, such that neighbouring threads read neighbouring logits in both layouts:
 *
 *     NCHW: cells side by side              channels last: classes side by side
 *     rows = kBlock, lanes = 1              rows = kBlock / 16, lanes = 16 (fewer if C is smaller)
 *     thread    0    1    2   ...           thread    0    1   ...  15    16    17  ...
 *     cell      q   q+1  q+2  ...           cell      q    q   ...   q   q+1   q+1  ...
 *     class     c    c    c   ...           class     c   c+1  ... c+15   c    c+1  ...
 *
 * A block leaves a partial sum, and the partial sums are added in order.
 */
#include "focal_loss.h"
#include "partial_sums.cuh"
#include "strides.h"

namespace {

constexpr int64_t kMaxLanes = 16;
constexpr int64_t kPerThread = 16;  // logits per thread, approximately

/* The partition of an image into blocks: tiles of cells times chunks of classes. */
struct Partition {
  int64_t lanes, rows;
  int64_t class_steps;  // classes per thread and cell
  int64_t cell_steps;   // cells per thread
  int64_t chunks, tiles;

  Partition(int64_t A, int64_t P, int64_t C, bool cells_adjoin) : lanes(1) {
    while (!cells_adjoin && lanes < kMaxLanes && lanes < C) lanes *= 2;
    rows = nk::kBlock / lanes;
    const int64_t steps = nk::ceil_div(C, lanes);  // of a row over all classes
    class_steps = std::min(steps, kPerThread);
    cell_steps = kPerThread / class_steps;
    chunks = nk::ceil_div(steps, class_steps);
    tiles = nk::ceil_div(A * P, rows * cell_steps);
  }

  NK_HD int64_t blocks() const { return tiles * chunks; }
};

template <class Number, bool squared>
struct Level {
  int64_t N, A, P, C, label_stride;
  nk::Strides at, grad_at;
  bool cells_adjoin;  // cells are counted as q = a * P + p, else q = p * A + a
  Partition partition;
  nk::FocalTerm<Number, squared> term;
  double alpha;
};

template <class T, class Number, bool squared>
__global__ void focal_loss_kernel(
    Level<Number, squared> level, const T* __restrict__ logit, T* __restrict__ grad, const float* __restrict__ label,
    const double* __restrict__ scale, double* __restrict__ partial) {
  const Partition& partition = level.partition;
  const int64_t A = level.A, P = level.P, C = level.C;
  const int64_t image_blocks = partition.blocks();
  const int lanes = static_cast<int>(partition.lanes);
  const int lane = threadIdx.x % lanes;
  const int row = threadIdx.x / lanes;
  const Number weight = static_cast<Number>(level.alpha);
  const Number other_weight = static_cast<Number>(1 - level.alpha);
  for (int64_t block = blockIdx.x; block < level.N * image_blocks; block += gridDim.x) {
    const int64_t n = block / image_blocks;
    const int64_t tile = block % image_blocks / partition.chunks;
    const int64_t chunk = block % partition.chunks;
    const Number grad_weight = static_cast<Number>(-level.alpha * scale[n]);
    const Number other_grad_weight = static_cast<Number>((1 - level.alpha) * scale[n]);
    const int64_t first_class = chunk * partition.class_steps * lanes + lane;
    const int64_t chunk_end = (chunk + 1) * partition.class_steps * lanes;
    const int64_t last_class = chunk_end < C ? chunk_end : C;
    Number sum = 0;
    for (int64_t step = 0; step < partition.cell_steps; ++step) {
      const int64_t q = (tile * partition.cell_steps + step) * partition.rows + row;
      if (q >= A * P) break;
      const int64_t a = A == 1 ? 0 : level.cells_adjoin ? q / P : q % A;
      const int64_t p = A == 1 ? q : level.cells_adjoin ? q - a * P : q / A;
      const float own = label[n * level.label_stride + a * P + p];
      const T* x = logit + level.at.offset(n, a, 0, p);
      T* g = grad + level.grad_at.offset(n, a, 0, p);
      for (int64_t c = first_class; c < last_class; c += lanes) {
        const float positive = static_cast<float>(c + 1);
        const Number z = nk::wrong_logit<Number>(nk::widen(x[c * level.at.c]), own, positive);
        Number slope;
        const Number value = level.term(z, nk::exp_minus(std::fabs(z)), slope);
        sum += (own == positive ? weight : other_weight) * value;
        if (grad) nk::narrow((own == positive ? grad_weight : other_grad_weight) * slope, g[c * level.grad_at.c]);
      }
    }
    const double total = nk::block_sum(static_cast<double>(sum));
    if (threadIdx.x == 0) partial[block] = total * scale[n];
  }
}

}  // namespace

int64_t nk_focal_loss_workspace(int64_t N, int64_t A, int64_t P, int64_t C) {
  if (N == 0 || A == 0 || P == 0 || C == 0) return 0;
  const int64_t most = std::max(Partition(A, P, C, true).blocks(), Partition(A, P, C, false).blocks());
  return N * most * static_cast<int64_t>(sizeof(double));
}

int32_t nk_focal_loss(
    const void* logit, void* grad, int32_t dtype, int64_t N, int64_t A, int64_t P, int64_t C, const int64_t* stride,
    const int64_t* grad_stride, const float* label, int64_t label_stride, const double* scale, double alpha,
    double gamma, double* loss, void* workspace, intptr_t where) {
  if (N == 0 || A == 0 || P == 0 || C == 0) return 0;
  double* partial = static_cast<double*>(workspace);
  const cudaStream_t stream = nk::stream_of(where);
  const nk::Strides at = nk::Strides::of_anchors(stride);
  const nk::Strides grad_at = grad ? nk::Strides::of_anchors(grad_stride) : at;
  const bool cells_adjoin = at.p == 1;
  const Partition partition(A, P, C, cells_adjoin);
  const int64_t blocks = N * partition.blocks();
  const auto launch = [&]<class T, bool squared>() {
    using Number = typename nk::Compute<T>::type;
    const auto term = nk::focal_term<Number, squared>(gamma);
    const Level<Number, squared> level{
        N, A, P, C, label_stride, at, grad_at, cells_adjoin, partition, term, alpha};
    NK_LAUNCH(
        (focal_loss_kernel<T, Number, squared>), nk::grid_of(blocks), nk::kBlock, 0, stream, level,
        static_cast<const T*>(logit), static_cast<T*>(grad), label, scale, partial);
  };
  nk::with_dtype<float, double, nk::float16, nk::bfloat16>(dtype, [&]<class T>() {
    nk::with_bool(gamma == 2, [&]<bool squared>() { launch.template operator()<T, squared>(); });
  });
  NK_LAUNCH(nk::add_partial_sums, 1, nk::kBlock, 0, stream, partial, blocks, loss);
  return nk::launch_status();
}
