/* nk_nms on the CPU, an image a block of work. What is compared lies class by class, so that a box meets those of its
 * own class alone, and in columns, so that it meets many at once. */
#include "nms.h"

#include <utility>

#include "parallel.h"

namespace {

constexpr int64_t kLanes = 32;  // kept boxes that are compared with a box before a look at what came of it

/* Boxes as columns. */
struct Columns {
  float *x1, *y1, *x2, *y2, *area;

  Columns from(int64_t i) const { return {x1 + i, y1 + i, x2 + i, y2 + i, area + i}; }

  void set(int64_t i, const nk::Box<float>& box, float its_area) const {
    x1[i] = box.x1;
    y1[i] = box.y1;
    x2[i] = box.x2;
    y2[i] = box.y2;
    area[i] = its_area;
  }

  /* Numbers that are slow to divide, such as subnormal ones, may lie in fresh memory. */
  void clear(int64_t size) const {
    for (float* column : {x1, y1, x2, y2, area}) std::fill_n(column, size, 0.0f);
  }
};

/* The workspace of one image of M boxes. K of them are candidates, of `classes` classes. */
struct Scratch {
  uint64_t *key, *spare;   // (M): K candidates, and where sorting puts them meanwhile
  int32_t* table;          // (slots): a hash table of class numbers from 1, 0 is free
  int64_t slots;
  int64_t* cls_of;         // (M): a class by its number
  int32_t *first, *count;  // (M): where a class's columns begin, and how many there are
  int32_t* number;         // (K): the class number of a candidate
  Columns column;          // (M + kLanes): a class after another
  float* score;            // (M): of the columns
  uint32_t* index;         // (M): of the columns' boxes
  int32_t* best;           // (M): the column of each class's best score
  int64_t bytes;

  Scratch(void* workspace, int64_t M) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(workspace);
    uintptr_t next = begin;
    const auto take = [&next](auto*& array, int64_t size) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(next);
      next += static_cast<uintptr_t>(nk::ceil_div(size * static_cast<int64_t>(sizeof *array), 16) * 16);
    };
    for (slots = 1; slots < 2 * M;) slots *= 2;
    for (uint64_t** array : {&key, &spare}) take(*array, M);
    take(table, slots);
    take(cls_of, M);
    for (int32_t** array : {&first, &count, &number, &best}) take(*array, M);
    for (float** array : {&column.x1, &column.y1, &column.x2, &column.y2, &column.area}) take(*array, M + kLanes);
    take(score, M);
    take(index, M);
    bytes = static_cast<int64_t>(next - begin);
  }
};

/* What is asked of one image. */
struct Image {
  const float *bbox, *score;
  const int64_t* cls;
  int64_t M;
  float offset, min_score;
  int64_t D;
  int64_t* index;
  float* kept_score;

  nk::Box<float> box(uint32_t i) const { return nk::load_box(bbox + 4 * static_cast<int64_t>(i)); }
};

/* The keys of the boxes with a score above min_score, by rising index. Returns how many. */
int64_t find_candidates(const Image& image, uint64_t* key) {
  int64_t K = 0;
  for (int64_t i = 0; i < image.M; ++i) {
    key[K] = nk::order_key(image.score[i], static_cast<uint32_t>(i));
    K += image.score[i] > image.min_score;
  }
  return K;
}

/* Sorts by the upper 32 bits, a byte at a time; equal ones keep their order. After four bytes key holds the result. */
void radix_sort(uint64_t* key, uint64_t* spare, int64_t K) {
  uint32_t place[4][256] = {};
  for (int64_t i = 0; i < K; ++i) {
    for (int digit = 0; digit < 4; ++digit) ++place[digit][key[i] >> (32 + 8 * digit) & 255];
  }
  for (int digit = 0; digit < 4; ++digit) {
    uint32_t sum = 0;
    for (uint32_t& entry : place[digit]) sum += std::exchange(entry, sum);
    for (int64_t i = 0; i < K; ++i) spare[place[digit][key[i] >> (32 + 8 * digit) & 255]++] = key[i];
    std::swap(key, spare);
  }
}

/* Numbers the classes of the candidates and gives each its columns. Returns how many classes there are. */
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
  for (int32_t c = 0, sum = 0; c < classes; ++c) {
    scratch.first[c] = sum;
    sum += std::exchange(scratch.count[c], 0);
  }
  return classes;
}

/* Is an IoU of the box with one of the columns above thr? */
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

/* Takes the boxes best first and keeps those that no kept one suppresses. Returns how many. */
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
    scratch.column.set(first + count++, box, area);
    image.index[kept] = i;
    image.kept_score[kept++] = image.score[i];
  }
  return kept;
}

/* The first of `count` scores that equals `wanted`, which is among them. */
int64_t find_score(const float* score, int64_t count, float wanted) {
  int64_t start = 0;
  for (; start + kLanes <= count; start += kLanes) {
    int32_t found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t lane = 0; lane < kLanes; ++lane) found |= score[start + lane] == wanted;
    if (found) break;
  }
  return std::find(score + start, score + count, wanted) - score;
}

/* Lowers the scores of columns where they overlap a box. Returns the best score that is left. */
template <class Decay>
float lower_scores(
    Columns column, float* score, int64_t count, nk::Box<float> box, float area, float offset, float min_score,
    Decay decay) {
  float best = nk::kOut;
#pragma omp simd reduction(max : best)
  for (int64_t i = 0; i < count; ++i) {
    const nk::Box<float> other{column.x1[i], column.y1[i], column.x2[i], column.y2[i]};
    const float iou = nk::iou(other, column.area[i], box, area, offset);
    score[i] = nk::decayed(decay, score[i], iou, min_score);
    best = best > score[i] ? best : score[i];
  }
  return best;
}

/* Lowers the scores of a class for a box that was kept, and finds the best that is left. */
template <class Decay>
void lower_class(
    const Image& image, const Scratch& scratch, int64_t c, const nk::Box<float>& box, float area, const Decay& decay) {
  const int64_t first = scratch.first[c], count = scratch.count[c];
  const float best = lower_scores(
      scratch.column.from(first), scratch.score + first, count, box, area, image.offset, image.min_score, decay);
  scratch.best[c] = static_cast<int32_t>(first + find_score(scratch.score + first, count, best));
}

/* Puts the candidates into their classes' columns, by rising index. Returns how many classes there are. */
int64_t fill_columns(const Image& image, const Scratch& scratch) {
  const int64_t K = find_candidates(image, scratch.key), classes = number_classes(image, scratch, K);
  for (int64_t k = 0; k < K; ++k) {
    const uint32_t i = nk::index_of(scratch.key[k]);
    const int64_t c = scratch.number[k], at = scratch.first[c] + scratch.count[c]++;
    scratch.column.set(at, image.box(i), nk::area(image.box(i), image.offset));
    scratch.score[at] = image.score[i];
    scratch.index[at] = i;
    if (scratch.count[c] == 1 || scratch.score[at] > scratch.score[scratch.best[c]])
      scratch.best[c] = static_cast<int32_t>(at);
  }
  return classes;
}

/* Keeps the box of the best score again and again, and lowers the scores of its class. Returns how many. */
template <class Decay>
int64_t soft_nms(const Image& image, const Scratch& scratch, const Decay& decay) {
  const int64_t classes = fill_columns(image, scratch);
  for (int64_t kept = 0; kept < image.D; ++kept) {
    uint64_t best = nk::kNoBox;
    int64_t best_class = 0;
    for (int64_t c = 0; c < classes; ++c) {
      const int32_t at = scratch.best[c];
      const uint64_t key = nk::order_key(scratch.score[at], scratch.index[at]);
      if (scratch.score[at] <= nk::kOut || key >= best) continue;
      best = key;
      best_class = c;
    }
    if (best == nk::kNoBox) return kept;
    const int32_t at = scratch.best[best_class];
    image.index[kept] = scratch.index[at];
    image.kept_score[kept] = std::exchange(scratch.score[at], nk::kOut);
    const nk::Box<float> box = image.box(scratch.index[at]);
    lower_class(image, scratch, best_class, box, scratch.column.area[at], decay);
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
  nk::parallel_for(N, where, [&](int64_t n, int64_t) {
    const Image image{
        bbox + 4 * n * M, score + n * M, cls + n * M, M, offset, min_score, D, index + n * D, kept_score + n * D};
    const Scratch scratch(static_cast<char*>(workspace) + n * bytes, M);
    const int64_t kept = method == NK_NMS_HARD     ? hard_nms(image, scratch, thr)
                         : method == NK_NMS_LINEAR ? soft_nms(image, scratch, nk::LinearDecay{thr})
                                                   : soft_nms(image, scratch, nk::GaussianDecay{sigma});
    std::fill(image.index + kept, image.index + D, -1);
    std::fill(image.kept_score + kept, image.kept_score + D, 0.0f);
  });
  return 0;
}
