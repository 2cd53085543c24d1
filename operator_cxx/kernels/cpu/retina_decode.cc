/* nk_retina_decode on the CPU. N images, A anchors per cell, C classes, P cells, T boxes kept.
 *
 *     probabilities   | group | group | group | ...      groups of neighbours in memory
 *     best            |   b   |   b   |   b   | ...      maximum of each group, found by all threads
 *     candidates              | x x x |       | ...      of the few groups that can contain one of the T best
 *
 * The T-th best of the group maxima is no better than the T-th best candidate, so groups below it are skipped. The rest
 * of an image is searched by one thread. The time is that of reading the probabilities once, whatever their values.
 */
#include "retina_decode.h"

#include <functional>

#include "parallel.h"

namespace {

constexpr int64_t kGroup = 256;  // probabilities per group
constexpr int64_t kTile = 512;   // groups per block of work

/* The integer type for the bit pattern of a T, which for positive values rises with the value up to infinity. */
template <class T>
struct Bits;
template <>
struct Bits<float> {
  using type = int32_t;
  static constexpr type infinity = 0x7f800000;
};
template <>
struct Bits<nk::float16> {
  using type = int16_t;
  static constexpr type infinity = 0x7c00;
};
template <>
struct Bits<nk::bfloat16> {
  using type = int16_t;
  static constexpr type infinity = 0x7f80;
};

/* Return the maximum of `count` values, 0 if none is above 0. Integers are compared, because NaN passes through vector
 * maxima of floats. */
template <class T>
float group_best(const T* x, int64_t step, int64_t count) {
  using Integer = typename Bits<T>::type;
  Integer best = 0;
#pragma omp simd reduction(max : best)
  for (int64_t i = 0; i < count; ++i) {
    Integer bits;
    std::memcpy(&bits, x + i * step, sizeof bits);
    bits = bits > Bits<T>::infinity ? Integer(0) : bits;
    best = bits > best ? bits : best;
  }
  T value;
  std::memcpy(&value, &best, sizeof value);
  return nk::widen(value);
}

/* A cursor over the groups of an image. The last group of a line may be smaller. */
struct Group {
  const nk::Walk& walk;
  int64_t line, first;

  static int64_t of_line(const nk::Walk& walk) { return nk::ceil_div(walk.length, kGroup); }
  static int64_t count(const nk::Walk& walk) { return walk.lines * of_line(walk); }

  Group(const nk::Walk& walk, int64_t number)
      : walk(walk), line(number / of_line(walk)), first(number % of_line(walk) * kGroup) {}
  void next() {
    first += kGroup;
    if (first >= walk.length) {
      first = 0;
      ++line;
    }
  }
  int64_t size() const { return std::min(kGroup, walk.length - first); }
  int64_t offset() const { return line * walk.line_step + first * walk.step; }
  int64_t place() const { return line * walk.line_place + first * walk.place; }
};

/* The workspace of one image. */
struct Scratch {
  uint64_t* key;  // (2 T + kGroup) keys of candidates
  float* best;    // (groups) maximum of every group
  float* ranked;  // (groups) copy of the maxima, to be partially sorted

  static int64_t keys(int64_t T) { return 2 * T + kGroup; }
  /* Return the maximum number of groups over all layouts. */
  static int64_t groups(int64_t rows, int64_t P) {
    return std::max(rows * nk::ceil_div(P, kGroup), P * nk::ceil_div(rows, kGroup));
  }
  static int64_t bytes(int64_t rows, int64_t P, int64_t T) { return 8 * (keys(T) + groups(rows, P)); }

  Scratch(void* workspace, int64_t n, int64_t rows, int64_t P, int64_t T) {
    key = reinterpret_cast<uint64_t*>(static_cast<unsigned char*>(workspace) + n * bytes(rows, P, T));
    best = reinterpret_cast<float*>(key + keys(T));
    ranked = best + groups(rows, P);
  }
};

/* Write the maxima of the groups [first, last). */
template <class T>
void find_group_bests(const T* prob, const nk::Walk& walk, int64_t first, int64_t last, float* best) {
  Group group(walk, first);
  for (int64_t g = first; g < last; ++g, group.next()) {
    const T* x = prob + group.offset();
    // Two calls, so that the compiler vectorises the loads of the first.
    best[g] = walk.step == 1 ? group_best(x, 1, group.size()) : group_best(x, walk.step, group.size());
  }
}

/* Return a lower bound for the keys of the `count` best candidates. Few other candidates are above it, unless many
 * probabilities are equal. */
uint64_t floor_key(const Scratch& scratch, int64_t groups, int64_t count, float thresh) {
  float* const ranked = scratch.ranked;
  float* const last =
      std::copy_if(scratch.best, scratch.best + groups, ranked, [&](float best) { return best > thresh; });
  if (last - ranked < count) return nk::candidate_key(thresh, 0);
  std::nth_element(ranked, ranked + count - 1, last, std::greater<float>());
  return nk::candidate_key(ranked[count - 1], 0xffffffff);  // a place beyond all candidates
}

/* Keep the `count` greatest of `found` keys, in any order. Return the number of keys left. */
int64_t keep_best(uint64_t* key, int64_t found, int64_t count) {
  if (found <= count) return found;
  std::nth_element(key, key + count - 1, key + found, std::greater<uint64_t>());
  return count;
}

/* Write the keys of the `count` best candidates, best first, to scratch.key. Return their number. count is positive. */
template <class T>
int64_t best_keys(const T* prob, const nk::Walk& walk, int64_t count, float thresh, const Scratch& scratch) {
  const int64_t groups = Group::count(walk);
  uint64_t* key = scratch.key;
  uint64_t floor = floor_key(scratch, groups, count, thresh);
  int64_t found = 0;
  Group group(walk, 0);
  for (int64_t g = 0; g < groups; ++g, group.next()) {
    const float best = scratch.best[g];
    const int64_t place = group.place();
    const int64_t size = group.size();
    if (!(best > thresh) || nk::candidate_key(best, place) <= floor) continue;
    const T* x = prob + group.offset();
    const uint32_t least = static_cast<uint32_t>(floor >> 32);
    for (int64_t i = 0; i < size; ++i) {
      const float value = nk::widen(x[i * walk.step]);
      // The bit patterns of NaN and of negative values are greater than that of infinity.
      if (nk::bits_of(value) < least || nk::bits_of(value) > nk::bits_of(INFINITY)) continue;
      key[found] = nk::candidate_key(value, place + i * walk.place);
      found += key[found] > floor;  // else the next key overwrites this one: no branch
    }
    if (found > 2 * count) {
      found = keep_best(key, found, count);
      floor = key[count - 1];
    }
  }
  found = keep_best(key, found, count);
  std::sort(key, key + found, std::greater<uint64_t>());
  return found;
}

}  // namespace

int64_t nk_retina_decode_workspace(int64_t N, int64_t A, int64_t C, int64_t P, int64_t T) {
  return N * Scratch::bytes(A * C, P, std::min(T, A * C * P));
}

int32_t nk_retina_decode(
    const void* prob, int32_t dtype, const int64_t* prob_stride, const void* delta, int32_t delta_dtype,
    const int64_t* delta_stride, const float* anchor, const float* im_info, int64_t N, int64_t A, int64_t C, int64_t P,
    int64_t T, float thresh, float* bbox, float* score, int64_t* cls, void* workspace, intptr_t where) {
  const int64_t rows = A * C;
  const int64_t count = std::min(T, rows * P);
  const nk::Strides prob_at = nk::Strides::of_channels(prob_stride);
  const nk::Strides delta_at = nk::Strides::of_channels(delta_stride);
  const nk::Walk walk = nk::walk_of(rows, P, prob_at);
  const auto scratch_of = [&](int64_t n) { return Scratch(workspace, n, rows, P, count); };
  thresh = thresh > 0 ? thresh : 0.0f;  // the bit pattern of -0 would not sort
  const auto decode = [&]<class S, class D>() {
    const auto image = [&](int64_t n) { return static_cast<const S*>(prob) + n * prob_at.n; };
    const int64_t groups = Group::count(walk);
    const int64_t tiles = nk::ceil_div(groups, kTile);
    nk::parallel_for(N * tiles, where, [&](int64_t block) {
      const int64_t n = block / tiles;
      const int64_t first = block % tiles * kTile;
      find_group_bests(image(n), walk, first, std::min(first + kTile, groups), scratch_of(n).best);
    });
    const nk::RowWriter<D> write_row{
        static_cast<const D*>(delta), delta_at, anchor, im_info, A, C, P, bbox, score, cls};
    nk::parallel_for(N, where, [&](int64_t n) {
      const Scratch scratch = scratch_of(n);
      const int64_t found = count > 0 ? best_keys(image(n), walk, count, thresh, scratch) : 0;
      for (int64_t t = 0; t < T; ++t) write_row(t < found ? scratch.key[t] : 0, n, n * T + t);
    });
  };
  nk::with_dtype<float, nk::float16, nk::bfloat16>(dtype, [&]<class S>() {
    nk::with_dtype<float, nk::float16, nk::bfloat16>(delta_dtype, [&]<class D>() {
      decode.template operator()<S, D>();
    });
  });
  return 0;
}
