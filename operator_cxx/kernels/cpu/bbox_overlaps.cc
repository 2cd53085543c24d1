/* nk_bbox_overlaps on the CPU. Work is cut into tiles, of at most kTile boxes either way. The coordinates of one side
 * are laid out column by column, so that a box of the other side meets many at once: G's, or M's if G is too small. */
#include "box.h"
#include "parallel.h"

namespace {

constexpr int64_t kTile = 256;
constexpr int64_t kEnough = 8;  // boxes, to be worth laying out

template <class T>
struct Columns {
  int64_t count;
  T x1[kTile], y1[kTile], x2[kTile], y2[kTile], area[kTile];

  void load(const T* box, int64_t size) {
    count = size;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const nk::Box<T> one = nk::load_box(box + 4 * i);
      x1[i] = one.x1, y1[i] = one.y1, x2[i] = one.x2, y2[i] = one.y2;
      area[i] = nk::area(one);
    }
  }

  /* The IoUs of all with one box. */
  void overlap(const T* box, T* iou) const {
    const nk::Box<T> one = nk::load_box(box);
    const T one_area = nk::area(one);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const nk::Box<T> other{x1[i], y1[i], x2[i], y2[i]};
      iou[i] = nk::iou(one, one_area, other, area[i]);
    }
  }
};

/* The IoUs (M, G) of a tile, at most kTile either way, whose rows are `stride` apart. */
template <class T>
void overlap_tile(const T* box, int64_t M, const T* other, int64_t G, T* iou, int64_t stride) {
  Columns<T> columns;
  if (G >= kEnough) {
    columns.load(other, G);
    for (int64_t m = 0; m < M; ++m) columns.overlap(box + 4 * m, iou + m * stride);
    return;
  }
  columns.load(box, M);
  T column[kTile];
  for (int64_t g = 0; g < G; ++g) {
    columns.overlap(other + 4 * g, column);
    for (int64_t m = 0; m < M; ++m) iou[m * stride + g] = column[m];
  }
}

template <class T>
void overlap_all(const T* box, const T* other, int64_t M, int64_t G, T* iou, intptr_t threads) {
  const int64_t across = nk::ceil_div(G, kTile);
  nk::parallel_for(nk::ceil_div(M, kTile) * across, threads, [&](int64_t block, int64_t) {
    const int64_t m = block / across * kTile, g = block % across * kTile;
    overlap_tile(
        box + 4 * m, std::min(kTile, M - m), other + 4 * g, std::min(kTile, G - g), iou + m * G + g, G);
  });
}

}  // namespace

int32_t nk_bbox_overlaps(
    const void* box, const void* other, int32_t dtype, int64_t M, int64_t G, void* iou, intptr_t where) {
  const auto overlap = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    overlap_all(static_cast<const T*>(box), static_cast<const T*>(other), M, G, static_cast<T*>(iou), where);
  };
  dtype == NK_FLOAT64 ? overlap(static_cast<double*>(nullptr)) : overlap(static_cast<float*>(nullptr));
  return 0;
}
