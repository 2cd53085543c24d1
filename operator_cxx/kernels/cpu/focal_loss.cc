/* nk_focal_loss on the CPU. N images, A anchors per cell, P cells, C classes.
 *
 * The inner loops take a run: at most kRun logits side by side in memory, and for each the label that it is compared
 * with. A level is cut into runs in one of two ways, by rows or by cells, depending on the layout of its logits. A
 * block of runs is the work of one thread at a time; it leaves a partial sum, and the partial sums are added in order.
 */
#include "focal_loss.h"

#include "huge_pages.h"
#include "parallel.h"
#include "strides.h"

namespace {

constexpr int64_t kRun = 1024;         // logits per run, at most
constexpr int64_t kBlock = 16 * kRun;  // logits per block, approximately
constexpr int64_t kSum = 256;          // losses that are summed in float32
constexpr int64_t kShortRow = 16;      // cells; shorter rows are taken by cells

template <class T, bool squared>
struct Level {
  using Number = typename nk::Compute<T>::type;

  int64_t A, P, C;
  const T* logit;
  T* grad;  // or null
  nk::Strides at, grad_at;
  const float* label;
  int64_t label_stride;
  const double* scale;  // (N)
  nk::FocalTerm<Number, squared> term;
  double alpha;

  /* Return the labels (P) of an anchor of image n. */
  const float* labels(int64_t n, int64_t a) const { return label + n * label_stride + a * P; }

  /* Return the loss of a run of image n, before the scale, and write its gradient to g unless it is null. A logit is
   * the positive one where its label equals `positive`. */
  double run_loss(int64_t n, const T* x, T* g, const float* own, float positive, int64_t count) const {
    return g ? run_loss<true>(scale[n], x, g, own, positive, count)
             : run_loss<false>(scale[n], x, g, own, positive, count);
  }

 private:
  /* Two loops: in a single one, the chain of dependent operations would be too long to overlap those of many logits. */
  template <bool with_grad>
  double run_loss(double factor, const T* x, T* g, const float* own, float positive, int64_t count) const {
    Number z[kRun], e[kRun];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      z[i] = nk::wrong_logit<Number>(nk::widen(x[i]), own[i], positive);
      e[i] = nk::exp_minus(std::fabs(z[i]));
    }
    const Number weight = static_cast<Number>(alpha);
    const Number other_weight = static_cast<Number>(1 - alpha);
    const Number grad_weight = static_cast<Number>(-alpha * factor);
    const Number other_grad_weight = static_cast<Number>((1 - alpha) * factor);
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
        if (with_grad) nk::narrow((is_positive ? grad_weight : other_grad_weight) * slope, g[i]);
      }
      sum += static_cast<double>(part);
    }
    return sum;
  }
};

/* By rows, where the cells of an anchor and class lie side by side (NCHW maps). A run is a part of a row [a, c] with
 * the labels of its anchor. A block is several rows, or a part of one if it is longer than kBlock.
 *
 *     logits [0, 0]   p0 p1 p2 ...    labels [0]   p0 p1 p2 ...   positive where 1
 *     logits [0, 1]   p0 p1 p2 ...                 the same       positive where 2
 *      ...
 *     logits [1, 0]   p0 p1 p2 ...    labels [1]   p0 p1 p2 ...   positive where 1
 */
template <class T, bool squared>
bool has_rows(const Level<T, squared>& level) {
  return level.at.p == 1 && (!level.grad || level.grad_at.p == 1) && level.P >= kShortRow;
}

int64_t rows_per_block(int64_t P) { return std::max<int64_t>(1, kBlock / P); }

int64_t row_block_count(int64_t A, int64_t P, int64_t C) {
  return nk::ceil_div(A * C, rows_per_block(P)) * nk::ceil_div(P, kBlock);
}

template <class T, bool squared>
double row_block_loss(const Level<T, squared>& level, int64_t n, int64_t block) {
  const int64_t parts = nk::ceil_div(level.P, kBlock);  // of a row
  const int64_t first_row = block / parts * rows_per_block(level.P);
  const int64_t last_row = std::min(first_row + rows_per_block(level.P), level.A * level.C);
  const int64_t first_cell = block % parts * kBlock;
  const int64_t last_cell = std::min(first_cell + kBlock, level.P);
  double sum = 0;
  for (int64_t row = first_row; row < last_row; ++row) {
    const int64_t a = row / level.C;
    const int64_t c = row % level.C;
    const T* x = level.logit + level.at.offset(n, a, c, 0);
    T* g = level.grad ? level.grad + level.grad_at.offset(n, a, c, 0) : nullptr;
    const float* own = level.labels(n, a);
    for (int64_t p = first_cell; p < last_cell; p += kRun) {
      const int64_t count = std::min(kRun, last_cell - p);
      sum += level.run_loss(n, x + p, g ? g + p : g, own + p, static_cast<float>(c + 1), count);
    }
  }
  return sum;
}

/* By cells, for all other layouts. Cells are counted as q = p * A + a. A run is all classes of several cells, or a part
 * of the classes of one if there are more than kRun. Marks stand for the labels. A block is several runs.
 *
 *     label      2 (of q = 0)            0 (of q = 1)            -1 (of q = 2)
 *     logits   | c0  c1  c2 ... cC-1   | c0  c1  c2 ... cC-1   | c0  c1  c2 ... cC-1 |
 *     marks    |  0   1   0 ...  0     |  0   0   0 ...  0     | -1  -1  -1 ... -1   |   positive where 1
 *
 * Logits that lie in this order (channels last) are read in place, others are gathered; likewise the gradient.
 */
struct CellRun {
  int64_t n, q, cells;  // the cells from q on
  int64_t c, classes;   // the classes from c on
};

int64_t cells_per_block(int64_t C) { return std::max<int64_t>(1, kBlock / C); }

int64_t cell_block_count(int64_t A, int64_t P, int64_t C) { return nk::ceil_div(A * P, cells_per_block(C)); }

/* Return true if [q, c] of an image lies at q * C + c. */
template <class T, bool squared>
bool is_in_cell_order(const Level<T, squared>& level, const nk::Strides& at) {
  const bool classes_follow = at.c == 1 || level.C == 1;
  const bool anchors_follow = at.a == level.C || level.A == 1;
  const bool cells_follow = at.p == level.A * level.C || level.P == 1;
  return classes_follow && anchors_follow && cells_follow;
}

/* Call body(i, a, p) for every cell [a, p] of a run, whose classes start at index i of the run. */
template <class T, bool squared, class Body>
void for_each_cell(const Level<T, squared>& level, const CellRun& run, const Body& body) {
  int64_t a = run.q % level.A;
  int64_t p = run.q / level.A;
  for (int64_t i = 0; i < run.cells; ++i) {
    body(i * run.classes, a, p);
    if (++a == level.A) {
      a = 0;
      ++p;
    }
  }
}

/* Write the marks of a run where they are not 0: few anchors are ignored, and an anchor has one positive class. */
template <class T, bool squared>
void set_marks(const Level<T, squared>& level, const CellRun& run, float ignored, float positive, float* mark) {
  for_each_cell(level, run, [&](int64_t i, int64_t a, int64_t p) {
    const float own = level.labels(run.n, a)[p];
    if (!(own >= 0)) {
      std::fill(mark + i, mark + i + run.classes, ignored);
    } else if (own > static_cast<float>(run.c) && own <= static_cast<float>(run.c + run.classes)) {
      mark[i + static_cast<int64_t>(own) - 1 - run.c] = positive;
    }
  });
}

/* Return the loss of a run and write its gradient. mark (kRun) is 0 before and after. */
template <class T, bool squared>
double cell_run_loss(const Level<T, squared>& level, const CellRun& run, float* mark) {
  T gathered[kRun], computed[kRun];
  const nk::Strides& at = level.at;
  const nk::Strides& grad_at = level.grad_at;
  const T* x = level.logit + at.offset(run.n, 0, run.c, 0);
  T* g = level.grad ? level.grad + grad_at.offset(run.n, 0, run.c, 0) : nullptr;
  const bool gathers = !is_in_cell_order(level, at);
  const bool scatters = g && !is_in_cell_order(level, grad_at);
  if (gathers) {
    for_each_cell(level, run, [&](int64_t i, int64_t a, int64_t p) {
      const T* cell = x + at.offset(0, a, 0, p);
      for (int64_t j = 0; j < run.classes; ++j) gathered[i + j] = cell[j * at.c];
    });
  }
  const T* run_logit = gathers ? gathered : x + run.q * level.C;
  T* run_grad = scatters ? computed : g ? g + run.q * level.C : nullptr;
  set_marks(level, run, -1, 1, mark);
  const double sum = level.run_loss(run.n, run_logit, run_grad, mark, 1, run.cells * run.classes);
  set_marks(level, run, 0, 0, mark);
  if (scatters) {
    for_each_cell(level, run, [&](int64_t i, int64_t a, int64_t p) {
      T* cell = g + grad_at.offset(0, a, 0, p);
      for (int64_t j = 0; j < run.classes; ++j) cell[j * grad_at.c] = computed[i + j];
    });
  }
  return sum;
}

template <class T, bool squared>
double cell_block_loss(const Level<T, squared>& level, int64_t n, int64_t block) {
  const int64_t first = block * cells_per_block(level.C);
  const int64_t last = std::min(first + cells_per_block(level.C), level.A * level.P);
  const int64_t step = std::max<int64_t>(1, kRun / level.C);
  float mark[kRun] = {};
  double sum = 0;
  for (int64_t q = first; q < last; q += step) {
    for (int64_t c = 0; c < level.C; c += kRun) {  // once, unless a cell has more than kRun classes
      sum += cell_run_loss(level, {n, q, std::min(step, last - q), c, std::min(kRun, level.C - c)}, mark);
    }
  }
  return sum;
}

/* Return true if the elements of a tensor fill its memory without gaps. */
bool is_dense(int64_t N, int64_t A, int64_t P, int64_t C, const nk::Strides& at) {
  return at.offset(N - 1, A - 1, C - 1, P - 1) + 1 == N * A * C * P;
}

}  // namespace

int64_t nk_focal_loss_workspace(int64_t N, int64_t A, int64_t P, int64_t C) {
  if (N == 0 || A == 0 || P == 0 || C == 0) return 0;
  return N * std::max(row_block_count(A, P, C), cell_block_count(A, P, C)) * static_cast<int64_t>(sizeof(double));
}

int32_t nk_focal_loss(
    const void* logit, void* grad, int32_t dtype, int64_t N, int64_t A, int64_t P, int64_t C, const int64_t* stride,
    const int64_t* grad_stride, const float* label, int64_t label_stride, const double* scale, double alpha,
    double gamma, double* loss, void* workspace, intptr_t where) {
  if (N == 0 || A == 0 || P == 0 || C == 0) return 0;
  double* partial = static_cast<double*>(workspace);
  const nk::Strides at = nk::Strides::of_anchors(stride);
  const nk::Strides grad_at = grad ? nk::Strides::of_anchors(grad_stride) : at;
  const auto add_level = [&]<class T, bool squared>() {
    if (grad && is_dense(N, A, P, C, grad_at)) nk::prefer_huge_pages(grad, N * A * P * C * sizeof(T));
    const auto term = nk::focal_term<typename nk::Compute<T>::type, squared>(gamma);
    const Level<T, squared> level{
        A, P, C, static_cast<const T*>(logit), static_cast<T*>(grad), at, grad_at, label, label_stride, scale, term,
        alpha};
    const bool by_rows = has_rows(level);
    const int64_t blocks = by_rows ? row_block_count(A, P, C) : cell_block_count(A, P, C);
    nk::parallel_for(N * blocks, where, [&](int64_t i) {
      const int64_t n = i / blocks;
      const int64_t block = i % blocks;
      partial[i] = scale[n] * (by_rows ? row_block_loss(level, n, block) : cell_block_loss(level, n, block));
    });
    for (int64_t i = 0; i < N * blocks; ++i) *loss += partial[i];
  };
  nk::with_dtype<float, double, nk::float16, nk::bfloat16>(dtype, [&]<class T>() {
    nk::with_bool(gamma == 2, [&]<bool squared>() { add_level.template operator()<T, squared>(); });
  });
  return 0;
}
