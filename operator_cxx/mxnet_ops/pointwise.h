/* Elementwise operations of the binding, which are not kernels of necklace.h.
 *
 * A body is called with every index from 0. for_each is a loop on the CPU and a launch of pointwise.cu on the GPU.
 * N images, A anchors per cell, K anchors of all levels, C foreground classes, H x W cells.
 */
#pragma once

#include <cstdint>

#include "focal_loss.h"

namespace nkmx {

/* The device of an operator: the CPU, or a stream of the current GPU. */
struct Place {
  bool gpu;
  void* stream;
};

/* out [n, k, c]: focal loss of every logit, with the arithmetic of nk_focal_loss, which returns the sum. */
template <class T, bool squared>
struct FocalTerms {
  const T* logit;
  const float* label;
  const double* scale;  // (N)
  T* out;
  int64_t K, C;
  double alpha;
  nk::FocalTerm<T, squared> term;

  NK_HD void operator()(int64_t i) const {
    const float own = label[i / C];
    const float positive = static_cast<float>(i % C + 1);
    const T z = nk::wrong_logit(logit[i], own, positive);
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

/* out = data * *factor. */
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

/* The anchors of a map, rows of xyxy: the base anchors shifted to each cell, in float64 and rounded once. */
constexpr int64_t kMaxAnchors = 64;
struct GridAnchors {
  double base[kMaxAnchors][4];
  int64_t A, W, stride;
  float* out;

  NK_HD void operator()(int64_t i) const {
    const int64_t side = i % 4;
    const int64_t a = i / 4 % A;
    const int64_t cell = i / 4 / A;
    const int64_t shift = stride * (side % 2 ? cell / W : cell % W);
    out[i] = static_cast<float>(static_cast<double>(shift) + base[a][side]);
  }
};

/* Scores (N * T, classes): that of the row at its class, zero elsewhere. Rows of class 0 are padding of score 0. */
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

/* scale[n] = factor / (*count + 1), or factor if count is null. */
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

/* Write the number of labels >= 1, exact in float64. */
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
