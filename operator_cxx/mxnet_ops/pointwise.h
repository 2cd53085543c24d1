/* What the binding computes by itself, element by element: everything that is no kernel of necklace.h.
 *
 * A body is called with every index from 0. On the CPU for_each is a loop; pointwise.cu has the GPU's.
 * N images, A anchors per cell, K anchors of all levels, C foreground classes, H x W cells.
 */
#pragma once

#include <cstdint>

#include "focal_loss.h"

namespace nkmx {

/* Where an operator works: on the CPU, or on a stream of the current GPU. */
struct Place {
  bool gpu;
  void* stream;
};

/* The terms of the focal loss: out [n, k, c]. The same arithmetic as nk_focal_loss, which has their sum. */
template <class T, bool squared>
struct FocalTerms {
  const T* logit;
  const float* label;
  const double* scale;  // of every image
  T* out;
  int64_t K, C;
  double alpha;
  nk::FocalTerm<T, squared> term;

  NK_HD void operator()(int64_t i) const {
    const float own = label[i / C], positive = static_cast<float>(i % C + 1);
    const T z = nk::wrong_side(logit[i], own, positive);
    T slope;
    const T value = term(z, nk::exp_minus(z < 0 ? -z : z), slope);
    const double weight = scale[i / (K * C)] * (own == positive ? alpha : 1 - alpha);
    out[i] = static_cast<T>(weight * static_cast<double>(value));
  }
};

/* data *= factor. */
template <class T>
struct Multiply {
  const T* factor;
  T* data;

  NK_HD void operator()(int64_t i) const { data[i] *= factor[i]; }
};

/* out = data times one number. */
template <class T>
struct Scale {
  const T* data;
  const double* factor;
  T* out;

  NK_HD void operator()(int64_t i) const { out[i] = static_cast<T>(static_cast<double>(data[i]) * *factor); }
};

template <class T>
struct Copy {
  const T* data;
  T* out;

  NK_HD void operator()(int64_t i) const { out[i] = data[i]; }
};

template <class T>
struct Zero {
  T* out;

  NK_HD void operator()(int64_t i) const { out[i] = 0; }
};

/* The anchors of a map, rows of xyxy: the base anchors moved to each cell, in float64 and rounded once. */
constexpr int64_t kMaxAnchors = 64;
struct GridAnchors {
  double base[kMaxAnchors][4];
  int64_t A, W, stride;
  float* out;

  NK_HD void operator()(int64_t i) const {
    const int64_t side = i % 4, a = i / 4 % A, cell = i / 4 / A;
    const int64_t shift = stride * (side % 2 ? cell / W : cell % W);
    out[i] = static_cast<float>(static_cast<double>(shift) + base[a][side]);
  }
};

/* Scores (N * T, classes), zero but for the class of the row; class 0 has none. */
struct OneHot {
  const float* score;
  const int64_t* cls;
  int64_t classes;
  float* out;

  NK_HD void operator()(int64_t i) const {
    const int64_t row = i / classes;
    out[i] = cls[row] == i % classes ? score[row] : 0.0f;
  }
};

/* scale[n] = factor / (*count + 1) or, without count, factor. */
struct ImageScale {
  const double* count;
  double factor;
  double* scale;

  NK_HD void operator()(int64_t n) const { scale[n] = count ? factor / (*count + 1) : factor; }
};

#ifdef NK_WITH_CUDA
template <class Body>
void launch(int64_t size, const Body& body, void* stream);
void launch_count(const float* label, int64_t size, double* count, void* stream);
#endif

template <class Body>
void for_each(const Place& place, int64_t size, const Body& body) {
#ifdef NK_WITH_CUDA
  if (place.gpu) return launch(size, body, place.stream);
#endif
  (void)place;
  for (int64_t i = 0; i < size; ++i) body(i);
}

/* The number of labels >= 1, which float64 holds exactly. */
inline void count_foreground(const Place& place, const float* label, int64_t size, double* count) {
#ifdef NK_WITH_CUDA
  if (place.gpu) return launch_count(label, size, count, place.stream);
#endif
  (void)place;
  int64_t found = 0;
  for (int64_t i = 0; i < size; ++i) found += label[i] >= 1;
  *count = static_cast<double>(found);
}

}  // namespace nkmx
