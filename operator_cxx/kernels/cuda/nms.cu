/* nk_nms on the GPU, one block per image. N images, M boxes, D detections kept.
 *
 * Hard: the candidates are sorted and decided in chunks of one box per thread, first against all boxes kept from
 * earlier chunks, then one after another against each other. Soft: one pass over all boxes per kept box.
 */
#include "bitonic_sort.cuh"
#include "nms.h"

namespace {

constexpr int kThreads = 512;  // more than kBlock: the only block of an image has to hide its own latency

struct alignas(16) Candidate {
  nk::Box<float> box;
  float area;
  int64_t cls;
};

/* The inputs, settings and outputs of all images. */
struct Images {
  const float* bbox;   // (N, M, 4)
  const float* score;  // (N, M)
  const int64_t* cls;  // (N, M)
  int64_t N, M;
  float offset, min_score;
  int64_t D;
  int64_t* index;     // (N, D)
  float* kept_score;  // (N, D)
};

/* The workspace of an image holds the keys, then the kept boxes. */
NK_HD int64_t key_count(int64_t M) { return nk::power_of_two(M < 2 ? 2 : M); }

NK_HD int64_t image_bytes(int64_t M) {
  return key_count(M) * static_cast<int64_t>(sizeof(uint64_t)) + M * static_cast<int64_t>(sizeof(Candidate));
}

/* One image and its workspace. */
struct Image {
  const float* bbox;
  const float* score;
  const int64_t* cls;
  int64_t* index;
  float* kept_score;
  uint64_t* key;
  Candidate* kept;

  __device__ Image(const Images& all, unsigned char* workspace, int64_t n)
      : bbox(all.bbox + 4 * n * all.M), score(all.score + n * all.M), cls(all.cls + n * all.M),
        index(all.index + n * all.D), kept_score(all.kept_score + n * all.D),
        key(reinterpret_cast<uint64_t*>(workspace + n * image_bytes(all.M))),
        kept(reinterpret_cast<Candidate*>(key + key_count(all.M))) {}

  __device__ Candidate candidate(uint32_t i, float offset) const {
    const nk::Box<float> box = nk::load_box(bbox + 4 * static_cast<int64_t>(i));
    return {box, nk::area(box, offset), cls[i]};
  }

  __device__ void keep(int64_t place, uint32_t i, float last_score) const {
    index[place] = i;
    kept_score[place] = last_score;
  }
};

__device__ void fill_rest(const Image& image, int64_t kept, int64_t D) {
  for (int64_t d = kept + threadIdx.x; d < D; d += kThreads) {
    image.index[d] = -1;
    image.kept_score[d] = 0;
  }
}

/* Write the keys of the boxes with a score above min_score, in any order. Return their number. */
__device__ int64_t find_candidates(const Image& image, int64_t M, float min_score) {
  __shared__ unsigned int found;
  if (threadIdx.x == 0) found = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < M; i += kThreads) {
    if (image.score[i] > min_score) {
      image.key[atomicAdd(&found, 1u)] = nk::order_key(image.score[i], static_cast<uint32_t>(i));
    }
  }
  __syncthreads();
  return found;  // not overwritten by the next image before all threads have read it: the sort synchronises
}

/* Sort K keys, padded to a power of two. */
__device__ void sort_keys(uint64_t* key, int64_t K) {
  const int64_t size = key_count(K);
  for (int64_t k = K + threadIdx.x; k < size; k += kThreads) key[k] = nk::kNoBox;
  nk::bitonic_sort(key, size, [](uint64_t a, uint64_t b) { return a < b; });
}

__global__ void hard_kernel(Images all, float thr, unsigned char* workspace) {
  __shared__ Candidate chunk[kThreads];
  __shared__ bool alive[kThreads];
  const int t = static_cast<int>(threadIdx.x);
  for (int64_t n = blockIdx.x; n < all.N; n += gridDim.x) {
    const Image image(all, workspace, n);
    const int64_t K = find_candidates(image, all.M, all.min_score);
    sort_keys(image.key, K);
    int64_t kept = 0;  // the same in every thread
    for (int64_t first = 0; first < K && kept < all.D; first += kThreads) {
      const int width = static_cast<int>(K - first < kThreads ? K - first : kThreads);
      const uint32_t i = nk::index_of(image.key[first + (t < width ? t : 0)]);
      const Candidate mine = image.candidate(i, all.offset);
      const auto suppresses_mine = [&](const Candidate& other) {
        return other.cls == mine.cls && nk::iou(other.box, other.area, mine.box, mine.area, all.offset) > thr;
      };
      bool stays = t < width;
      for (int64_t k = 0; stays && k < kept; ++k) stays = !suppresses_mine(image.kept[k]);
      chunk[t] = mine;
      alive[t] = stays;
      __syncthreads();
      // A box that is alive at its turn is kept. Only kept boxes change `alive`, so the threads synchronise only then.
      for (int turn = 0; turn < width && kept < all.D; ++turn) {
        if (!alive[turn]) continue;
        if (t == turn) {
          image.kept[kept] = mine;
          image.keep(kept, i, image.score[i]);
        } else if (t > turn && alive[t] && suppresses_mine(chunk[turn])) {
          alive[t] = false;
        }
        ++kept;
        __syncthreads();
      }
      __syncthreads();
    }
    fill_rest(image, kept, all.D);
  }
}

/* Return the minimum of the keys of all threads, on every thread. */
__device__ uint64_t least_key(uint64_t key) {
  __shared__ uint64_t least[kThreads];
  least[threadIdx.x] = key;
  __syncthreads();
  for (unsigned int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half && least[threadIdx.x + half] < least[threadIdx.x]) {
      least[threadIdx.x] = least[threadIdx.x + half];
    }
    __syncthreads();
  }
  const uint64_t found = least[0];
  __syncthreads();
  return found;
}

template <class Decay>
__global__ void soft_kernel(Images all, Decay decay, unsigned char* workspace) {
  for (int64_t n = blockIdx.x; n < all.N; n += gridDim.x) {
    const Image image(all, workspace, n);
    float* score = reinterpret_cast<float*>(image.key);  // lowered scores; a thread accesses those of its own boxes
    uint64_t best = nk::kNoBox;                          // of this thread's boxes
    for (int64_t i = threadIdx.x; i < all.M; i += kThreads) {
      const bool candidate = image.score[i] > all.min_score;
      const uint64_t key = nk::order_key(image.score[i], static_cast<uint32_t>(i));
      score[i] = candidate ? image.score[i] : nk::kRemoved;
      if (candidate && key < best) best = key;
    }
    int64_t kept = 0;  // the same in every thread
    while (kept < all.D) {
      best = least_key(best);
      if (best == nk::kNoBox) break;
      const uint32_t chosen = nk::index_of(best);
      const Candidate other = image.candidate(chosen, all.offset);
      best = nk::kNoBox;
      for (int64_t i = threadIdx.x; i < all.M; i += kThreads) {
        if (i == chosen) {
          image.keep(kept, chosen, score[i]);
          score[i] = nk::kRemoved;
        } else if (image.cls[i] == other.cls && score[i] > nk::kRemoved) {
          const nk::Box<float> box = nk::load_box(image.bbox + 4 * i);
          const float iou = nk::iou(box, nk::area(box, all.offset), other.box, other.area, all.offset);
          score[i] = nk::decayed(decay, score[i], iou, all.min_score);
        }
        const uint64_t key = nk::order_key(score[i], static_cast<uint32_t>(i));
        if (score[i] > nk::kRemoved && key < best) best = key;
      }
      ++kept;
    }
    fill_rest(image, kept, all.D);
  }
}

}  // namespace

int64_t nk_nms_workspace(int64_t N, int64_t M, int64_t) { return N * image_bytes(M); }

int32_t nk_nms(
    const float* bbox, const float* score, const int64_t* cls, int64_t N, int64_t M, float offset, int32_t method,
    float thr, float sigma, float min_score, int64_t D, int64_t* index, float* kept_score, void* workspace,
    intptr_t where) {
  if (N == 0) return 0;
  const Images all{bbox, score, cls, N, M, offset, min_score, D, index, kept_score};
  unsigned char* scratch = static_cast<unsigned char*>(workspace);
  const unsigned int grid = nk::grid_of(N);
  const cudaStream_t stream = nk::stream_of(where);
  if (method == NK_NMS_HARD) {
    NK_LAUNCH(hard_kernel, grid, kThreads, 0, stream, all, thr, scratch);
  } else if (method == NK_NMS_LINEAR) {
    NK_LAUNCH((soft_kernel<nk::LinearDecay>), grid, kThreads, 0, stream, all, nk::LinearDecay{thr}, scratch);
  } else {
    NK_LAUNCH((soft_kernel<nk::GaussianDecay>), grid, kThreads, 0, stream, all, nk::GaussianDecay{sigma}, scratch);
  }
  return nk::launch_status();
}
