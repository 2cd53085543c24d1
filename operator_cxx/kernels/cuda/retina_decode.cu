/* nk_retina_decode on the GPU.
 *
 * The least of the T best keys is found without sorting, digit by digit from the top, by histograms of the keys that
 * agree with the digits so far. Once these choose exactly T keys, and at once where there are no more candidates, the
 * kernels of later digits return early. The chosen are collected, sorted by a block an image, and each becomes a row.
 */
#include "bitonic_sort.cuh"
#include "retina_decode.h"

namespace {

constexpr int kKeyBits = 63;  // a key's top bit, the sign of a probability, is 0
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kBinsOfThread = kBins / nk::kBlock;
constexpr int64_t kTile = 8192;  // probabilities that a block reads between clearing its histogram and adding it
constexpr int kAhead = 8;        // of them a thread loads before it looks at any
constexpr int64_t kMaxShared = 4096;  // keys that are sorted in shared memory

/* What is known of an image's T best keys. */
struct Selection {
  uint64_t prefix;  // the digits found so far
  uint64_t floor;   // no chosen key is below
  uint32_t wanted;  // how many are to be chosen of those that begin with the prefix
  uint32_t exact;   // those from floor on are the chosen: wanted is no more needed
  uint32_t taken;   // how many have been collected
  uint32_t unused;
};

/* An image's part of the workspace. */
struct Scratch {
  Selection* selection;
  uint32_t* bin;  // kBins
  uint64_t* key;  // `size` of them, a power of two: zeros where there are fewer candidates
};

struct Workspace {
  unsigned char* start;
  int64_t size;

  NK_HD int64_t bytes() const { return static_cast<int64_t>(sizeof(Selection) + kBins * sizeof(uint32_t)) + size * 8; }
  NK_HD Scratch operator[](int64_t n) const {
    unsigned char* at = start + n * bytes();
    uint32_t* bin = reinterpret_cast<uint32_t*>(at + sizeof(Selection));
    return {reinterpret_cast<Selection*>(at), bin, reinterpret_cast<uint64_t*>(bin + kBins)};
  }
};

/* The probabilities of every image. Element i is along the walk of an image, which has less than 2^32. */
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

/* Calls body with the key of every candidate in a tile of image n; the threads of a block share the tile. */
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

__global__ void clear(Workspace workspace, int64_t N, uint32_t wanted) {
  for (int64_t n = blockIdx.x; n < N; n += gridDim.x) {
    const Scratch scratch = workspace[n];
    for (int64_t i = threadIdx.x; i < kBins; i += nk::kBlock) scratch.bin[i] = 0;
    for (int64_t i = threadIdx.x; i < workspace.size; i += nk::kBlock) scratch.key[i] = 0;
    if (threadIdx.x == 0) *scratch.selection = {0, 0, wanted, 0, 0, 0};
  }
}

/* Adds to the bins the digit, `width` bits from `shift` on, of the keys that begin with the prefix. */
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

/* The next digit of the last key chosen, from the bins, which are cleared; a block an image. */
__global__ void choose_digit(Workspace workspace, int64_t N, int shift, int width) {
  __shared__ uint32_t sum[nk::kBlock];  // of a thread's bins and those of all threads before, which have greater digits
  for (int64_t n = blockIdx.x; n < N; n += gridDim.x) {
    const Scratch scratch = workspace[n];
    Selection& selection = *scratch.selection;
    if (selection.exact) continue;
    const uint32_t wanted = selection.wanted;
    const uint64_t prefix = selection.prefix;
    uint32_t* top = scratch.bin + kBins - 1 - threadIdx.x * kBinsOfThread;  // and downwards
    uint32_t count[kBinsOfThread], own = 0;
    for (int i = 0; i < kBinsOfThread; ++i) {
      own += count[i] = top[-i];
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
    const bool all = sum[nk::kBlock - 1] <= wanted;
    if (all && threadIdx.x == 0) {
      selection.floor = prefix << (shift + width);
      selection.exact = 1;
    } else if (!all && seen < wanted && sum[threadIdx.x] >= wanted) {
      int i = 0;
      while (seen + count[i] < wanted) seen += count[i++];
      const uint64_t digit = static_cast<uint64_t>(kBins - 1 - i) - threadIdx.x * kBinsOfThread;
      selection.prefix = prefix << width | digit;
      selection.floor = selection.prefix << shift;
      selection.wanted = wanted - seen;
      selection.exact = seen + count[i] == wanted;
    }
    __syncthreads();
  }
}

/* Gathers the chosen keys, in any order. */
template <class T>
__global__ void collect(Probabilities<T> from, Workspace workspace, int64_t N) {
  for (int64_t block = blockIdx.x; block < N * from.tiles(); block += gridDim.x) {
    const int64_t n = block / from.tiles();
    const Scratch scratch = workspace[n];
    const uint64_t floor = scratch.selection->floor;
    for_each_key(from, n, block % from.tiles(), [&](uint64_t key) {
      if (key >= floor) scratch.key[atomicAdd(&scratch.selection->taken, 1u)] = key;
    });
  }
}

/* Each image's keys falling; a block an image. */
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
  for (int64_t row = blockIdx.x * static_cast<int64_t>(nk::kBlock) + threadIdx.x; row < N * T;
       row += static_cast<int64_t>(gridDim.x) * nk::kBlock) {
    const int64_t n = row / T, t = row % T;
    write_row(t < workspace.size ? workspace[n].key[t] : 0, n, row);
  }
}

/* The chosen keys of every image, best first, to the workspace. */
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
  const nk::Walk walk = nk::walk_of(A * C, P, prob_stride[1], prob_stride[2]);
  nk::with_float(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    if (size > 0) {
      const Probabilities<S> from{static_cast<const S*>(prob), prob_stride[0], size, walk, thresh};
      choose_keys(from, scratch, N, stream);
    }
    return 0;
  });
  return nk::with_float(delta_dtype, [&](auto* type) {
    using D = std::remove_pointer_t<decltype(type)>;
    const nk::RowWriter<D> write_row{
        static_cast<const D*>(delta), delta_stride[0], delta_stride[1], delta_stride[2], anchor, im_info, A, C, P, bbox,
        score, cls};
    NK_LAUNCH(
        (write_rows<D>), nk::grid_of(nk::ceil_div(N * T, nk::kBlock)), nk::kBlock, 0, stream, write_row, scratch, N, T);
    return nk::launch_status();
  });
}
