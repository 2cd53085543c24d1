/* nk_nms on the CPU, one image per block of work.
 *
 * Boxes are stored as columns of coordinates, class after class: a box is compared only with those of its own class,
 * and with many of them at once.
 */
#include "nms.h"

#include <numeric>

#include "parallel.h"

namespace {

constexpr int64_t kLanes = 32;  // kept boxes that a box is compared with before the result is tested

struct Columns {
  float *x1, *y1, *x2, *y2, *area;

  /* Return the columns from index i on. */
  Columns from(int64_t i) const { return {x1 + i, y1 + i, x2 + i, y2 + i, area + i}; }

  void set(int64_t i, const nk::Box<float>& box, float box_area) const {
    x1[i] = box.x1;
    y1[i] = box.y1;
    x2[i] = box.x2;
    y2[i] = box.y2;
    area[i] = box_area;
  }

  /* Zero the columns: lanes beyond the boxes are computed too, and uninitialised memory may hold slow subnormals. */
  void clear(int64_t size) const {
    for (float* column : {x1, y1, x2, y2, area}) std::fill_n(column, size, 0.0f);
  }
};

/* The workspace of one image with M boxes, K of them candidates. Classes are numbered from 0 as they are found.
 *
 *     class number    0             1             2
 *     columns         b b b . .   | b b b b .   | b . .     one per candidate; those in use are the first of each class
 *     first           0             5             10        first column of each class
 *     count           3             4             1         columns in use
 */
struct Scratch {
  uint64_t* key;    // (M) the K candidates
  uint64_t* spare;  // (M) target of a sorting pass
  int32_t* table;   // (slots) hash table of class numbers + 1; 0 is free
  int64_t slots;
  int64_t* cls_of;  // (M) class by number
  int32_t* first;   // (M) by class number
  int32_t* count;   // (M) by class number
  int32_t* number;  // (M) class number by candidate
  Columns column;   // (M + kLanes)
  float* score;     // (M) by column
  uint32_t* index;  // (M) index of the box, by column
  int32_t* best;    // (M) column of the best score, by class number
  int64_t bytes;

  Scratch(void* workspace, int64_t M) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(workspace);
    uintptr_t next = start;
    const auto take = [&next]<class T>(T*& array, int64_t size) {
      array = reinterpret_cast<T*>(next);
      next += static_cast<uintptr_t>(nk::ceil_div(size * static_cast<int64_t>(sizeof(T)), 16) * 16);
    };
    slots = 1;
    while (slots < 2 * M) slots *= 2;
    take(key, M);
    take(spare, M);
    take(table, slots);
    take(cls_of, M);
    for (int32_t** array : {&first, &count, &number, &best}) take(*array, M);
    for (float** array : {&column.x1, &column.y1, &column.x2, &column.y2, &column.area}) take(*array, M + kLanes);
    take(score, M);
    take(index, M);
    bytes = static_cast<int64_t>(next - start);
  }
};

/* The inputs, settings and outputs of one image. */
struct Image {
  const float* bbox;   // (M, 4)
  const float* score;  // (M)
  const int64_t* cls;  // (M)
  int64_t M;
  float offset, min_score;
  int64_t D;
  int64_t* index;     // (D)
  float* kept_score;  // (D)

  nk::Box<float> box(uint32_t i) const { return nk::load_box(bbox + 4 * static_cast<int64_t>(i)); }
};

/* Write the keys of the boxes with a score above min_score, by rising index. Return their number K. */
int64_t find_candidates(const Image& image, uint64_t* key) {
  int64_t K = 0;
  for (int64_t i = 0; i < image.M; ++i) {
    key[K] = nk::order_key(image.score[i], static_cast<uint32_t>(i));
    K += image.score[i] > image.min_score;  // else the next key overwrites this one: no branch
  }
  return K;
}

/* Sort by the upper 32 bits, stably, in four passes over one byte each. An even number of passes leaves the result in
 * `key`. */
void radix_sort(uint64_t* key, uint64_t* spare, int64_t K) {
  const auto byte_of = [](uint64_t one, int pass) { return one >> (32 + 8 * pass) & 255; };
  uint32_t count[4][256] = {};  // of keys by byte, for every pass
  for (int64_t i = 0; i < K; ++i) {
    for (int pass = 0; pass < 4; ++pass) ++count[pass][byte_of(key[i], pass)];
  }
  for (int pass = 0; pass < 4; ++pass) {
    uint32_t next[256];  // place of the next key with a byte
    std::exclusive_scan(count[pass], count[pass] + 256, next, 0u);
    for (int64_t i = 0; i < K; ++i) {
      uint32_t& place = next[byte_of(key[i], pass)];
      spare[place] = key[i];
      ++place;
    }
    std::swap(key, spare);
  }
}

/* Number the classes of the candidates and assign columns to each. Return the number of classes. */
int64_t number_classes(const Image& image, const Scratch& scratch, int64_t K) {
  const uint64_t last = static_cast<uint64_t>(scratch.slots - 1);
  int32_t classes = 0;
  std::fill_n(scratch.table, scratch.slots, 0);
  for (int64_t k = 0; k < K; ++k) {
    const int64_t cls = image.cls[nk::index_of(scratch.key[k])];
    uint64_t slot = (static_cast<uint64_t>(cls) * 0x9e3779b97f4a7c15u >> 32) & last;
    while (scratch.table[slot] && scratch.cls_of[scratch.table[slot] - 1] != cls) slot = (slot + 1) & last;
    if (!scratch.table[slot]) {
      scratch.cls_of[classes] = cls;
      scratch.count[classes] = 0;
      scratch.table[slot] = ++classes;
    }
    scratch.number[k] = scratch.table[slot] - 1;
    ++scratch.count[scratch.number[k]];
  }
  std::exclusive_scan(scratch.count, scratch.count + classes, scratch.first, 0);
  std::fill_n(scratch.count, classes, 0);  // no column is in use
  return classes;
}

/* Return true if the IoU of the box with one of `count` columns is above thr. */
bool is_suppressed(Columns column, int64_t count, nk::Box<float> box, float area, float offset, float thr) {
  for (int64_t start = 0; start < count; start += kLanes) {
    const int32_t lanes = static_cast<int32_t>(std::min(kLanes, count - start));
    int32_t above = 0;
#pragma omp simd reduction(| : above)
    for (int32_t lane = 0; lane < static_cast<int32_t>(kLanes); ++lane) {
      const int64_t i = start + lane;
      const nk::Box<float> other{column.x1[i], column.y1[i], column.x2[i], column.y2[i]};
      above |= (nk::iou(other, column.area[i], box, area, offset) > thr) & (lane < lanes);
    }
    if (above) return true;
  }
  return false;
}

/* Visit the boxes best first and keep those that no kept box suppresses. Return the number of kept boxes. */
int64_t hard_nms(const Image& image, const Scratch& scratch, float thr) {
  const int64_t K = find_candidates(image, scratch.key);
  scratch.column.clear(K + kLanes);
  radix_sort(scratch.key, scratch.spare, K);
  number_classes(image, scratch, K);
  int64_t kept = 0;
  for (int64_t k = 0; k < K && kept < image.D; ++k) {
    const uint32_t i = nk::index_of(scratch.key[k]);
    const nk::Box<float> box = image.box(i);
    const float area = nk::area(box, image.offset);
    const int64_t first = scratch.first[scratch.number[k]];
    int32_t& count = scratch.count[scratch.number[k]];
    if (is_suppressed(scratch.column.from(first), count, box, area, image.offset, thr)) continue;
    scratch.column.set(first + count, box, area);
    ++count;
    image.index[kept] = i;
    image.kept_score[kept] = image.score[i];
    ++kept;
  }
  return kept;
}

/* Return the index of the first of `count` scores that equals `value`; there is one. */
int64_t find_score(const float* score, int64_t count, float value) {
  int64_t start = 0;
  while (start + kLanes <= count) {
    int32_t found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t lane = 0; lane < kLanes; ++lane) found |= score[start + lane] == value;
    if (found) break;
    start += kLanes;
  }
  return std::find(score + start, score + count, value) - score;
}

/* Lower the scores of `count` columns by their IoU with a box. Return the best remaining score. */
template <class Decay>
float lower_scores(
    Columns column, float* score, int64_t count, nk::Box<float> box, float area, float offset, float min_score,
    Decay decay) {
  float best = nk::kRemoved;
#pragma omp simd reduction(max : best)
  for (int64_t i = 0; i < count; ++i) {
    const nk::Box<float> other{column.x1[i], column.y1[i], column.x2[i], column.y2[i]};
    const float iou = nk::iou(other, column.area[i], box, area, offset);
    score[i] = nk::decayed(decay, score[i], iou, min_score);
    best = best > score[i] ? best : score[i];
  }
  return best;
}

/* Store the candidates in the columns of their classes, by rising index. Return the number of classes. */
int64_t fill_columns(const Image& image, const Scratch& scratch) {
  const int64_t K = find_candidates(image, scratch.key);
  const int64_t classes = number_classes(image, scratch, K);
  for (int64_t k = 0; k < K; ++k) {
    const uint32_t i = nk::index_of(scratch.key[k]);
    const int64_t c = scratch.number[k];
    const int32_t at = scratch.first[c] + scratch.count[c];
    scratch.column.set(at, image.box(i), nk::area(image.box(i), image.offset));
    scratch.score[at] = image.score[i];
    scratch.index[at] = i;
    if (scratch.count[c] == 0 || scratch.score[at] > scratch.score[scratch.best[c]]) scratch.best[c] = at;
    ++scratch.count[c];
  }
  return classes;
}

/* Return the number of the class with the best score; -1 if no box is left. */
int64_t find_best_class(const Scratch& scratch, int64_t classes) {
  uint64_t best = nk::kNoBox;
  int64_t best_class = -1;
  for (int64_t c = 0; c < classes; ++c) {
    const int32_t at = scratch.best[c];
    const uint64_t key = nk::order_key(scratch.score[at], scratch.index[at]);
    if (scratch.score[at] > nk::kRemoved && key < best) {
      best = key;
      best_class = c;
    }
  }
  return best_class;
}

/* Repeat: keep the box with the best score and lower the scores of its class. Return the number of kept boxes. */
template <class Decay>
int64_t soft_nms(const Image& image, const Scratch& scratch, const Decay& decay) {
  const int64_t classes = fill_columns(image, scratch);
  for (int64_t kept = 0; kept < image.D; ++kept) {
    const int64_t c = find_best_class(scratch, classes);
    if (c < 0) return kept;
    const int32_t at = scratch.best[c];
    image.index[kept] = scratch.index[at];
    image.kept_score[kept] = scratch.score[at];
    scratch.score[at] = nk::kRemoved;

    const int64_t first = scratch.first[c];
    const int64_t count = scratch.count[c];
    const float best_score = lower_scores(
        scratch.column.from(first), scratch.score + first, count, image.box(scratch.index[at]),
        scratch.column.area[at], image.offset, image.min_score, decay);
    scratch.best[c] = static_cast<int32_t>(first + find_score(scratch.score + first, count, best_score));
  }
  return image.D;
}

}  // namespace

int64_t nk_nms_workspace(int64_t N, int64_t M, int64_t) { return N * Scratch(nullptr, M).bytes; }

int32_t nk_nms(
    const float* bbox, const float* score, const int64_t* cls, int64_t N, int64_t M, float offset, int32_t method,
    float thr, float sigma, float min_score, int64_t D, int64_t* index, float* kept_score, void* workspace,
    intptr_t where) {
  const int64_t bytes = Scratch(nullptr, M).bytes;
  nk::parallel_for(N, where, [&](int64_t n) {
    const Image image{
        bbox + 4 * n * M, score + n * M, cls + n * M, M, offset, min_score, D, index + n * D, kept_score + n * D};
    const Scratch scratch(static_cast<char*>(workspace) + n * bytes, M);
    int64_t kept = 0;
    if (method == NK_NMS_HARD) kept = hard_nms(image, scratch, thr);
    if (method == NK_NMS_LINEAR) kept = soft_nms(image, scratch, nk::LinearDecay{thr});
    if (method == NK_NMS_GAUSSIAN) kept = soft_nms(image, scratch, nk::GaussianDecay{sigma});
    std::fill(image.index + kept, image.index + D, -1);
    std::fill(image.kept_score + kept, image.kept_score + D, 0.0f);
  });
  return 0;
}
