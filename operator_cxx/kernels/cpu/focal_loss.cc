/* nk_focal_loss on the CPU. N images, A anchors per cell, P cells, C classes.
 *
 * The inner loops take a run of logits that lie side by side. Of maps that is a part of a row, the cells of one anchor
 * and class, with the labels as they are. Where the classes of a cell lie side by side, or nothing does, runs go over
 * the classes of cell after cell, and marks take the labels' place: 1 the positive class, 0 the others, -1 ignored.
 */
#include "focal_loss.h"

#include "huge_pages.h"
#include "parallel.h"

namespace {

constexpr int64_t kRun = 1024;         // logits of a run, at most
constexpr int64_t kSum = 256;          // losses that are summed in float32
constexpr int64_t kBlock = 16 * kRun;  // logits that a thread takes at a time, about
constexpr int64_t kShortRow = 16;      // cells: rows below are not worth a run

struct Strides {
  int64_t n, a, c, p;
};

template <class T, bool squared>
struct Level {
  using Number = typename nk::Compute<T>::type;

  const T* logit;
  T* grad;  // or null
  const float* label;
  int64_t label_stride, A, P, C;
  Strides at, grad_at;
  const double* scale;
  nk::FocalTerm<Number, squared> term;
  double alpha;

  int64_t blocks_of_image() const { return by_rows() ? row_blocks(A, P, C) : cell_blocks(A, P, C); }

  double block_loss(int64_t n, int64_t block) const {
    return scale[n] * (by_rows() ? row_block_loss(n, block) : cell_block_loss(n, block));
  }

  /* Blocks of an image: some whole rows, or a part of one. */
  static int64_t rows_of_block(int64_t P) { return std::max<int64_t>(1, kBlock / P); }
  static int64_t row_blocks(int64_t A, int64_t P, int64_t C) {
    return nk::ceil_div(A * C, rows_of_block(P)) * nk::ceil_div(P, kBlock);
  }

  /* Blocks of an image: some cells of all classes. */
  static int64_t cells_of_block(int64_t C) { return std::max<int64_t>(1, kBlock / C); }
  static int64_t cell_blocks(int64_t A, int64_t P, int64_t C) { return nk::ceil_div(A * P, cells_of_block(C)); }

 private:
  bool by_rows() const { return at.p == 1 && (!grad || grad_at.p == 1) && P >= kShortRow; }

  double row_block_loss(int64_t n, int64_t block) const {
    const int64_t parts = nk::ceil_div(P, kBlock), rows = rows_of_block(P);
    const int64_t first = block / parts * rows, last = std::min(first + rows, A * C);
    const int64_t begin = block % parts * kBlock, end = std::min(begin + kBlock, P);
    double sum = 0;
    for (int64_t row = first; row < last; ++row) {
      const int64_t a = row / C, c = row % C;
      const T* x = logit + n * at.n + a * at.a + c * at.c;
      T* g = grad ? grad + n * grad_at.n + a * grad_at.a + c * grad_at.c : nullptr;
      const float* own = label + n * label_stride + a * P;
      for (int64_t p = begin; p < end; p += kRun) {
        sum += run_loss(scale[n], x + p, g ? g + p : g, own + p, static_cast<float>(c + 1), std::min(kRun, end - p));
      }
    }
    return sum;
  }

  double cell_block_loss(int64_t n, int64_t block) const {
    const int64_t cells = cells_of_block(C), first = block * cells, last = std::min(first + cells, A * P);
    const int64_t step = std::max<int64_t>(1, kRun / C);
    float mark[kRun] = {};
    double sum = 0;
    for (int64_t q = first; q < last; q += step) {
      for (int64_t c = 0; c < C; c += kRun) {  // more than once only where a cell has more than kRun classes
        sum += cells_loss(n, q, std::min(step, last - q), c, std::min(kRun, C - c), mark);
      }
    }
    return sum;
  }

  /* The classes from c on, `width` of them, of the cells from q on, counted as q = p * A + a. mark is 0 before and
   * after. */
  double cells_loss(int64_t n, int64_t q, int64_t cells, int64_t c, int64_t width, float* mark) const {
    T gathered[kRun], made[kRun];
    const T* x = logit + n * at.n + c * at.c;
    T* g = grad ? grad + n * grad_at.n + c * grad_at.c : nullptr;
    mark_cells(mark, n, q, cells, c, width, -1, 1);
    const bool in_place = side_by_side(at), out_in_place = side_by_side(grad_at);
    if (!in_place) {
      each_cell(q, cells, width, [&](int64_t i, int64_t a, int64_t p) {
        for (int64_t j = 0; j < width; ++j) gathered[i + j] = x[a * at.a + p * at.p + j * at.c];
      });
    }
    const double sum = run_loss(
        scale[n], in_place ? x + q * C : gathered, !g ? g : out_in_place ? g + q * C : made, mark, 1, cells * width);
    mark_cells(mark, n, q, cells, c, width, 0, 0);
    if (g && !out_in_place) {
      each_cell(q, cells, width, [&](int64_t i, int64_t a, int64_t p) {
        for (int64_t j = 0; j < width; ++j) g[a * grad_at.a + p * grad_at.p + j * grad_at.c] = made[i + j];
      });
    }
    return sum;
  }

  /* Do the classes of a cell lie side by side, and cell follow cell? */
  bool side_by_side(const Strides& s) const {
    return (s.c == 1 || C == 1) && (s.a == C || A == 1) && (s.p == A * C || P == 1);
  }

  /* Calls body(place in the run, a, p) of each cell's first logit. */
  template <class Body>
  void each_cell(int64_t q, int64_t cells, int64_t width, const Body& body) const {
    for (int64_t i = 0, a = q % A, p = q / A; i < cells; ++i) {
      body(i * width, a, p);
      if (++a == A) a = 0, ++p;
    }
  }

  /* Most logits are of neither kind: to mark the others takes less than to write all marks. */
  void mark_cells(
      float* mark, int64_t n, int64_t q, int64_t cells, int64_t c, int64_t width, float ignored, float positive) const {
    each_cell(q, cells, width, [&](int64_t i, int64_t a, int64_t p) {
      const float own = label[n * label_stride + a * P + p];
      if (!(own >= 0)) {
        std::fill(mark + i, mark + i + width, ignored);
      } else if (own > static_cast<float>(c) && own <= static_cast<float>(c + width)) {
        mark[i + static_cast<int64_t>(own) - 1 - c] = positive;
      }
    });
  }

  double run_loss(double factor, const T* x, T* g, const float* own, float positive, int64_t count) const {
    return g ? run_loss<true>(factor, x, g, own, positive, count)
             : run_loss<false>(factor, x, g, own, positive, count);
  }

  /* The loss of a run, before the scale. Two loops: with the steps of both after each other, a processor would have
   * fewer logits in work at a time. */
  template <bool with_grad>
  double run_loss(double factor, const T* x, T* g, const float* own, float positive, int64_t count) const {
    Number z[kRun], e[kRun];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      z[i] = nk::wrong_side<Number>(nk::widen(x[i]), own[i], positive);
      e[i] = nk::exp_minus(std::fabs(z[i]));
    }
    const Number weight = static_cast<Number>(alpha), other_weight = static_cast<Number>(1 - alpha);
    const Number up = static_cast<Number>(-alpha * factor), down = static_cast<Number>((1 - alpha) * factor);
    const nk::FocalTerm<Number, squared> loss = term;
    double sum = 0;
    for (int64_t first = 0; first < count; first += kSum) {
      const int64_t last = std::min(first + kSum, count);
      Number part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t i = first; i < last; ++i) {
        const bool is_positive = own[i] == positive;
        Number slope;
        const Number value = loss(z[i], e[i], slope);
        part += (is_positive ? weight : other_weight) * value;
        if (with_grad) nk::narrow((is_positive ? up : down) * slope, g[i]);
      }
      sum += static_cast<double>(part);
    }
    return sum;
  }
};

/* Does the memory of a tensor hold its elements and nothing else? */
bool dense(int64_t N, int64_t A, int64_t P, int64_t C, const Strides& s) {
  return (N - 1) * s.n + (A - 1) * s.a + (C - 1) * s.c + (P - 1) * s.p + 1 == N * A * C * P;
}

}  // namespace

int64_t nk_focal_loss_workspace(int64_t N, int64_t A, int64_t P, int64_t C) {
  if (N == 0 || A == 0 || P == 0 || C == 0) return 0;
  using Any = Level<float, true>;
  return N * std::max(Any::row_blocks(A, P, C), Any::cell_blocks(A, P, C)) * static_cast<int64_t>(sizeof(double));
}

int32_t nk_focal_loss(
    const void* logit, void* grad, int32_t dtype, int64_t N, int64_t A, int64_t P, int64_t C, const int64_t* stride,
    const int64_t* grad_stride, const float* label, int64_t label_stride, const double* scale, double alpha,
    double gamma, double* loss, void* workspace, intptr_t where) {
  if (N == 0 || A == 0 || P == 0 || C == 0) return 0;
  double* partial = static_cast<double*>(workspace);
  const Strides at{stride[0], stride[1], stride[2], stride[3]};
  const Strides grad_at = grad ? Strides{grad_stride[0], grad_stride[1], grad_stride[2], grad_stride[3]} : at;
  const auto sum = [&](auto* type, auto squared) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Number = typename nk::Compute<T>::type;
    if (grad && dense(N, A, P, C, grad_at)) nk::prefer_huge_pages(grad, N * A * P * C * sizeof(T));
    const Level<T, squared.value> level{
        static_cast<const T*>(logit), static_cast<T*>(grad), label, label_stride, A, P, C, at, grad_at, scale,
        nk::focal_term<Number, squared.value>(gamma), alpha};
    const int64_t blocks = level.blocks_of_image();
    nk::parallel_for(N * blocks, where, [&](int64_t block, int64_t) {
      partial[block] = level.block_loss(block / blocks, block % blocks);
    });
    return N * blocks;
  };
  nk::with_dtype(dtype, [&](auto* type) {
    const int64_t blocks = gamma == 2 ? sum(type, std::true_type{}) : sum(type, std::false_type{});
    for (int64_t block = 0; block < blocks; ++block) *loss += partial[block];
    return 0;
  });
  return 0;
}
