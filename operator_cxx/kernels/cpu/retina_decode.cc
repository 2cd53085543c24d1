/* nk_retina_decode on the CPU.
 *
 * All threads find the best probability of every group of neighbours. The T-th best of these is no better than the T-th
 * best candidate, so only the few groups that reach it are searched for candidates, an image on one thread. The time is
 * that of reading the probabilities once, whatever they are.
 */
#include "retina_decode.h"

#include <functional>

#include "parallel.h"

namespace {

constexpr int64_t kGroup = 256;  // neighbours in a group
constexpr int64_t kTile = 512;   // groups that a thread takes at a time

/* The integer with the bits of a T; those of a positive T rise with its value up to infinity. */
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

/* The greatest of count values, 0 where none is above 0. Compared as integers, as vectors of floats would carry NaN. */
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

/* Steps through the groups of an image, from a given one on: a line's last may be smaller. */
struct Group {
  const nk::Walk& walk;
  int64_t line, first;

  static int64_t of_line(const nk::Walk& walk) { return nk::ceil_div(walk.length, kGroup); }
  static int64_t count(const nk::Walk& walk) { return walk.lines * of_line(walk); }

  Group(const nk::Walk& walk, int64_t number)
      : walk(walk), line(number / of_line(walk)), first(number % of_line(walk) * kGroup) {}
  void next() {
    first += kGroup;
    if (first >= walk.length) first = 0, ++line;
  }
  int64_t size() const { return std::min(kGroup, walk.length - first); }
  int64_t offset() const { return line * walk.line_step + first * walk.step; }
  int64_t place() const { return line * walk.line_place + first * walk.place; }
};

/* An image's part of the workspace. */
struct Scratch {
  uint64_t* key;  // 2 T + kGroup
  float* best;    // of every group
  float* ranked;  // the best again, to be put in order

  static int64_t keys(int64_t T) { return 2 * T + kGroup; }
  static int64_t groups(int64_t rows, int64_t P) {  // the most, however they lie
    return std::max(rows * nk::ceil_div(P, kGroup), P * nk::ceil_div(rows, kGroup));
  }
  static int64_t bytes(int64_t rows, int64_t P, int64_t T) { return 8 * (keys(T) + groups(rows, P)); }

  Scratch(void* workspace, int64_t n, int64_t rows, int64_t P, int64_t T) {
    key = reinterpret_cast<uint64_t*>(static_cast<unsigned char*>(workspace) + n * bytes(rows, P, T));
    best = reinterpret_cast<float*>(key + keys(T));
    ranked = best + groups(rows, P);
  }
};

/* The best of the groups from first up to last, to best. */
template <class T>
void find_group_bests(const T* prob, const nk::Walk& walk, int64_t first, int64_t last, float* best) {
  Group group(walk, first);
  for (int64_t g = first; g < last; ++g, group.next()) {
    const T* x = prob + group.offset();
    // two calls, so that neighbours that touch are read as vectors
    best[g] = walk.step == 1 ? group_best(x, 1, group.size()) : group_best(x, walk.step, group.size());
  }
}

/* A key that is less than those of the T best candidates and, but for equal probabilities, not of many others. */
uint64_t floor_key(const Scratch& scratch, int64_t groups, int64_t T, float thresh) {
  const float* last =
      std::copy_if(scratch.best, scratch.best + groups, scratch.ranked, [&](float best) { return best > thresh; });
  if (last - scratch.ranked < T) return nk::candidate_key(thresh, 0);
  float* at = scratch.ranked + T - 1;
  std::nth_element(scratch.ranked, at, scratch.ranked + (last - scratch.ranked), std::greater<float>());
  return nk::candidate_key(*at, 0xffffffff);  // a place that no candidate has
}

/* The keys of the `count` best candidates, at least 1, best first, to scratch.key; how many there are. */
template <class T>
int64_t best_keys(const T* prob, const nk::Walk& walk, int64_t count, float thresh, const Scratch& scratch) {
  const int64_t groups = Group::count(walk);
  uint64_t* key = scratch.key;
  uint64_t floor = floor_key(scratch, groups, count, thresh);
  int64_t found = 0;
  Group group(walk, 0);
  for (int64_t g = 0; g < groups; ++g, group.next()) {
    const float best = scratch.best[g];
    const int64_t place = group.place(), size = group.size();
    if (!(best > thresh) || nk::candidate_key(best, place) <= floor) continue;
    const T* x = prob + group.offset();
    const uint32_t least = static_cast<uint32_t>(floor >> 32);
    for (int64_t i = 0; i < size; ++i) {
      const float value = nk::widen(x[i * walk.step]);
      // as bits, of which NaN and what is below 0 have more than infinity
      if (nk::bits_of(value) < least || nk::bits_of(value) > nk::bits_of(INFINITY)) continue;
      key[found] = nk::candidate_key(value, place + i * walk.place);
      found += key[found] > floor;
    }
    if (found > 2 * count) {
      std::nth_element(key, key + count - 1, key + found, std::greater<uint64_t>());
      found = count;
      floor = key[count - 1];
    }
  }
  if (found > count) std::nth_element(key, key + count - 1, key + found, std::greater<uint64_t>());
  found = std::min(found, count);
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
  const int64_t rows = A * C, count = std::min(T, rows * P);
  const nk::Walk walk = nk::walk_of(rows, P, prob_stride[1], prob_stride[2]);
  const auto scratch = [&](int64_t n) { return Scratch(workspace, n, rows, P, count); };
  thresh = thresh > 0 ? thresh : 0.0f;  // -0 has other bits
  return nk::with_float(dtype, [&](auto* prob_type) {
    using S = std::remove_pointer_t<decltype(prob_type)>;
    const auto image = [&](int64_t n) { return static_cast<const S*>(prob) + n * prob_stride[0]; };
    const int64_t groups = Group::count(walk), tiles = nk::ceil_div(groups, kTile);
    nk::parallel_for(N * tiles, where, [&](int64_t block, int64_t) {
      const int64_t n = block / tiles, first = block % tiles * kTile;
      find_group_bests(image(n), walk, first, std::min(first + kTile, groups), scratch(n).best);
    });
    return nk::with_float(delta_dtype, [&](auto* delta_type) {
      using D = std::remove_pointer_t<decltype(delta_type)>;
      const nk::RowWriter<D> write_row{
          static_cast<const D*>(delta), delta_stride[0], delta_stride[1], delta_stride[2], anchor, im_info, A, C, P,
          bbox, score, cls};
      nk::parallel_for(N, where, [&](int64_t n, int64_t) {
        const int64_t found = count > 0 ? best_keys(image(n), walk, count, thresh, scratch(n)) : 0;
        for (int64_t t = 0; t < T; ++t) write_row(t < found ? scratch(n).key[t] : 0, n, n * T + t);
      });
      return 0;
    });
  });
}
