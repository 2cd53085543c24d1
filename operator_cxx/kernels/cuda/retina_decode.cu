/* nk_retina_decode on the GPU. N images, A anchors per cell, C classes, P cells, T boxes kept.
 *
 * The T best keys are selected by a radix selection, which finds the least of them digit by digit from the top, with
 * histograms of the keys that begin with the digits found so far:
 *
 *     keys above the chosen digit      all chosen
 *     keys with the chosen digit       the last chosen key is among them: the next digit decides
 *     keys below the chosen digit      none chosen
 *
 * Once exactly T keys are chosen, or if there are no more than T candidates, the kernels of later digits return early.
 * The chosen keys are collected, sorted by one block per image, and decoded to one row each.
 */
#include "bitonic_sort.cuh"
#include "retina_decode.h"

namespace {

constexpr int kKeyBits = 63;  // the top bit of a key, the sign of a probability, is 0
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kBinsPerThread = kBins / nk::kBlock;
constexpr int64_t kTile = 8192;       // probabilities that a block adds to its histogram before it writes it
constexpr int kAhead = 8;             // probabilities that a thread loads before it tests the first
constexpr int64_t kMaxShared = 4096;  // keys that are sorted in shared memory

/* The state of the selection of an image's T best keys. */
struct Selection {
  uint64_t prefix;     // the digits found so far
  uint64_t floor;      // no chosen key is below
  uint32_t remaining;  // keys to choose among those that begin with the prefix
  uint32_t exact;      // 1 if the keys from floor on are the chosen ones: no digit remains to be found
  uint32_t collected;  // keys collected so far
  uint32_t unused;
};

/* The workspace of one image. */
struct Scratch {
  Selection* selection;
  uint32_t* bin;  // (kBins) histogram of a digit
  uint64_t* key;  // (size) chosen keys, zeros beyond them
};

/* The workspaces of all images. */
struct Workspace {
  unsigned char* start;
  int64_t size;  // a power of two, at least the number of keys to choose

  NK_HD int64_t bytes() const { return static_cast<int64_t>(sizeof(Selection) + kBins * sizeof(uint32_t)) + size * 8; }
  NK_HD Scratch operator[](int64_t n) const {
    unsigned char* at = start + n * bytes();
    uint32_t* bin = reinterpret_cast<uint32_t*>(at + sizeof(Selection));
    return {reinterpret_cast<Selection*>(at), bin, reinterpret_cast<uint64_t*>(bin + kBins)};
  }
};

/* The probabilities of all images. Index i, below 2^32, follows the walk of an image. */
template <class T>
struct Probabilities {
  const T* prob;
  int64_t image_step, size;
  nk::Walk walk;
  float thresh;

  NK_HD int64_t tiles() const { return nk::ceil_div(size, kTile); }
  NK_HD uint32_t line(uint32_t i) const { return walk.lines == 1 ? 0 : i / static_cast<uint32_t>(walk.length); }
  NK_HD float value(int64_t n, uint32_t i) const {
    const int64_t at = i - line(i) * walk.length;
    return nk::widen(prob[n * image_step + line(i) * walk.line_step + at * walk.step]);
  }
  NK_HD int64_t place(uint32_t i) const {
    const int64_t at = i - line(i) * walk.length;
    return line(i) * walk.line_place + at * walk.place;
  }
};

/* Call body with the key of every candidate in a tile of image n, which the threads of a block share. */
template <class T, class Body>
__device__ inline void for_each_key(const Probabilities<T>& from, int64_t n, int64_t tile, Body body) {
  const int64_t last = (tile + 1) * kTile < from.size ? (tile + 1) * kTile : from.size;
  for (int64_t first = tile * kTile + threadIdx.x; first < last; first += kAhead * nk::kBlock) {
    float value[kAhead];
    for (int j = 0; j < kAhead; ++j) {
      const int64_t i = first + j * nk::kBlock;
      value[j] = i < last ? from.value(n, static_cast<uint32_t>(i)) : 0.0f;  // 0 is not above the threshold
    }
    for (int j = 0; j < kAhead; ++j) {
      const uint32_t i = static_cast<uint32_t>(first + j * nk::kBlock);
      if (value[j] > from.thresh) body(nk::candidate_key(value[j], from.place(i)));
    }
  }
}

__global__ void clear(Workspace workspace, int64_t N, uint32_t count) {
  for (int64_t n = blockIdx.x; n < N; n += gridDim.x) {
    const Scratch scratch = workspace[n];
    for (int64_t i = threadIdx.x; i < kBins; i += nk::kBlock) scratch.bin[i] = 0;
    for (int64_t i = threadIdx.x; i < workspace.size; i += nk::kBlock) scratch.key[i] = 0;
    if (threadIdx.x == 0) *scratch.selection = {0, 0, count, 0, 0, 0};
  }
}

/* Add the digits of the keys that begin with the prefix to the histogram; a digit is `width` bits from `shift` on. */
template <class T>
__global__ void count_digits(Probabilities<T> from, Workspace workspace, int64_t N, int shift, int width) {
  __shared__ uint32_t bin[kBins];
  for (int64_t block = blockIdx.x; block < N * from.tiles(); block += gridDim.x) {
    const int64_t n = block / from.tiles();
    const Scratch scratch = workspace[n];
    if (scratch.selection->exact) continue;
    const uint64_t prefix = scratch.selection->prefix;
    for (int i = threadIdx.x; i < kBins; i += nk::kBlock) bin[i] = 0;
    __syncthreads();
    for_each_key(from, n, block % from.tiles(), [&](uint64_t key) {
      if (key >> (shift + width) == prefix) atomicAdd(&bin[key >> shift & ((1u << width) - 1)], 1u);
    });
    __syncthreads();
    for (int i = threadIdx.x; i < kBins; i += nk::kBlock) {
      if (bin[i] != 0) atomicAdd(&scratch.bin[i], bin[i]);
    }
    __syncthreads();
  }
}

/* Find the next digit of the least chosen key from the histogram and clear it; one block per image.
 *
 *     bin        kBins-1 ... | ...        | ... 0        greater digits first, kBinsPerThread of them per thread
 *     thread     0           | 1          | ...
 *     sum        keys in the bins of this thread and all before
 *
 * The digit is that of the bin at which the running count of keys reaches `remaining`.
 */
__global__ void choose_digit(Workspace workspace, int64_t N, int shift, int width) {
  __shared__ uint32_t sum[nk::kBlock];
  for (int64_t n = blockIdx.x; n < N; n += gridDim.x) {
    const Scratch scratch = workspace[n];
    Selection& selection = *scratch.selection;
    if (selection.exact) continue;
    const uint32_t remaining = selection.remaining;
    const uint64_t prefix = selection.prefix;
    uint32_t* top = scratch.bin + kBins - 1 - threadIdx.x * kBinsPerThread;  // this thread's greatest digit
    uint32_t count[kBinsPerThread];
    uint32_t own = 0;
    for (int i = 0; i < kBinsPerThread; ++i) {
      count[i] = top[-i];
      own += count[i];
      top[-i] = 0;
    }
    sum[threadIdx.x] = own;
    __syncthreads();
    for (unsigned int apart = 1; apart < nk::kBlock; apart *= 2) {
      const uint32_t before = threadIdx.x >= apart ? sum[threadIdx.x - apart] : 0;
      __syncthreads();
      sum[threadIdx.x] += before;
      __syncthreads();
    }
    uint32_t seen = sum[threadIdx.x] - own;
    const bool all = sum[nk::kBlock - 1] <= remaining;
    if (all && threadIdx.x == 0) {
      selection.floor = prefix << (shift + width);
      selection.exact = 1;
    } else if (!all && seen < remaining && sum[threadIdx.x] >= remaining) {
      int i = 0;
      while (seen + count[i] < remaining) {
        seen += count[i];
        ++i;
      }
      const uint64_t digit = static_cast<uint64_t>(kBins - 1 - i) - threadIdx.x * kBinsPerThread;
      selection.prefix = prefix << width | digit;
      selection.floor = selection.prefix << shift;
      selection.remaining = remaining - seen;
      selection.exact = seen + count[i] == remaining;
    }
    __syncthreads();
  }
}

/* Collect the chosen keys, in any order. */
template <class T>
__global__ void collect(Probabilities<T> from, Workspace workspace, int64_t N) {
  for (int64_t block = blockIdx.x; block < N * from.tiles(); block += gridDim.x) {
    const int64_t n = block / from.tiles();
    const Scratch scratch = workspace[n];
    const uint64_t floor = scratch.selection->floor;
    for_each_key(from, n, block % from.tiles(), [&](uint64_t key) {
      if (key >= floor) scratch.key[atomicAdd(&scratch.selection->collected, 1u)] = key;
    });
  }
}

/* Sort the keys of every image in descending order; one block per image. */
__global__ void sort_keys(Workspace workspace, int64_t N, bool in_shared) {
  NK_DYNAMIC_SHARED(uint64_t, shared);
  const int64_t size = workspace.size;
  for (int64_t n = blockIdx.x; n < N; n += gridDim.x) {
    uint64_t* stored = workspace[n].key;
    uint64_t* key = in_shared ? shared : stored;
    for (int64_t i = threadIdx.x; in_shared && i < size; i += blockDim.x) key[i] = stored[i];
    nk::bitonic_sort(key, size, [](uint64_t a, uint64_t b) { return a > b; });
    for (int64_t i = threadIdx.x; in_shared && i < size; i += blockDim.x) stored[i] = key[i];
    __syncthreads();
  }
}

template <class D>
__global__ void write_rows(nk::RowWriter<D> write_row, Workspace workspace, int64_t N, int64_t T) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * nk::kBlock;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * nk::kBlock + threadIdx.x; row < N * T; row += step) {
    const int64_t n = row / T;
    const int64_t t = row % T;
    write_row(t < workspace.size ? workspace[n].key[t] : 0, n, row);
  }
}

/* Write the keys of every image's best candidates to the workspace, best first. */
template <class T>
void choose_keys(const Probabilities<T>& from, Workspace workspace, int64_t N, cudaStream_t stream) {
  const unsigned int blocks = nk::grid_of(N * from.tiles());
  for (int end = kKeyBits; end > 0; end -= kDigitBits) {
    const int shift = std::max(end - kDigitBits, 0);
    NK_LAUNCH((count_digits<T>), blocks, nk::kBlock, 0, stream, from, workspace, N, shift, end - shift);
    NK_LAUNCH(choose_digit, nk::grid_of(N), nk::kBlock, 0, stream, workspace, N, shift, end - shift);
  }
  NK_LAUNCH((collect<T>), blocks, nk::kBlock, 0, stream, from, workspace, N);
  const int64_t pairs = workspace.size / 2;
  const unsigned int threads = static_cast<unsigned int>(std::min<int64_t>(1024, std::max<int64_t>(32, pairs)));
  const bool in_shared = workspace.size <= kMaxShared;
  const size_t shared_bytes = in_shared ? workspace.size * sizeof(uint64_t) : 0;
  NK_LAUNCH(sort_keys, nk::grid_of(N), threads, shared_bytes, stream, workspace, N, in_shared);
}

Workspace workspace_at(void* start, int64_t size, int64_t T) {
  return {static_cast<unsigned char*>(start), nk::power_of_two(std::min(T, size))};
}

}  // namespace

int64_t nk_retina_decode_workspace(int64_t N, int64_t A, int64_t C, int64_t P, int64_t T) {
  return N * workspace_at(nullptr, A * C * P, T).bytes();
}

int32_t nk_retina_decode(
    const void* prob, int32_t dtype, const int64_t* prob_stride, const void* delta, int32_t delta_dtype,
    const int64_t* delta_stride, const float* anchor, const float* im_info, int64_t N, int64_t A, int64_t C, int64_t P,
    int64_t T, float thresh, float* bbox, float* score, int64_t* cls, void* workspace, intptr_t where) {
  if (N == 0 || T == 0) return 0;
  const int64_t size = A * C * P;
  const Workspace scratch = workspace_at(workspace, size, T);
  const cudaStream_t stream = nk::stream_of(where);
  NK_LAUNCH(clear, nk::grid_of(N), nk::kBlock, 0, stream, scratch, N, static_cast<uint32_t>(std::min(T, size)));
  const nk::Strides prob_at = nk::Strides::of_channels(prob_stride);
  const nk::Strides delta_at = nk::Strides::of_channels(delta_stride);
  const nk::Walk walk = nk::walk_of(A * C, P, prob_at);
  if (size > 0) {
    nk::with_dtype<float, nk::float16, nk::bfloat16>(dtype, [&]<class S>() {
      const Probabilities<S> from{static_cast<const S*>(prob), prob_at.n, size, walk, thresh};
      choose_keys(from, scratch, N, stream);
    });
  }
  nk::with_dtype<float, nk::float16, nk::bfloat16>(delta_dtype, [&]<class D>() {
    const nk::RowWriter<D> write_row{
        static_cast<const D*>(delta), delta_at, anchor, im_info, A, C, P, bbox, score, cls};
    NK_LAUNCH(
        (write_rows<D>), nk::grid_of(nk::ceil_div(N * T, nk::kBlock)), nk::kBlock, 0, stream, write_row, scratch, N, T);
  });
  return nk::launch_status();
}
