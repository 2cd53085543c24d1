/* nk_bbox_overlaps on the CPU. M boxes against G boxes.
 *
 * Work is cut into tiles of at most kTile x kTile boxes. The boxes of one side are stored as columns of coordinates, so
 * that a box of the other side is compared with many at once: those of G, or of M if G is small.
 */
#include "box.h"
#include "dtype.h"
#include "parallel.h"

namespace {

constexpr int64_t kTile = 256;
constexpr int64_t kFewBoxes = 8;  // fewer are not stored as columns

template <class T>
struct Columns {
  int64_t count;
  T x1[kTile], y1[kTile], x2[kTile], y2[kTile], area[kTile];

  void load(const T* box, int64_t size) {
    count = size;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const nk::Box<T> one = nk::load_box(box + 4 * i);
      x1[i] = one.x1;
      y1[i] = one.y1;
      x2[i] = one.x2;
      y2[i] = one.y2;
      area[i] = nk::area(one);
    }
  }

  /* Write the IoUs of all columns with one box. */
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

/* Write the IoUs (M, G) of a tile to rows that are `stride` apart. */
template <class T>
void overlap_tile(const T* box, int64_t M, const T* other, int64_t G, T* iou, int64_t stride) {
  Columns<T> columns;
  if (G >= kFewBoxes) {
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

}  // namespace

int32_t nk_bbox_overlaps(
    const void* box, const void* other, int32_t dtype, int64_t M, int64_t G, void* iou, intptr_t where) {
  const int64_t columns = nk::ceil_div(G, kTile);  // of tiles
  nk::with_dtype<float, double>(dtype, [&]<class T>() {
    nk::parallel_for(nk::ceil_div(M, kTile) * columns, where, [&](int64_t tile) {
      const int64_t m = tile / columns * kTile;
      const int64_t g = tile % columns * kTile;
      overlap_tile(
          static_cast<const T*>(box) + 4 * m, std::min(kTile, M - m), static_cast<const T*>(other) + 4 * g,
          std::min(kTile, G - g), static_cast<T*>(iou) + m * G + g, G);
    });
  });
  return 0;
}
