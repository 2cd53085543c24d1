/* nk_anchor_target on the GPU. N images, G boxes per image, K anchors.
 *
 * A thread takes an anchor; the boxes of the image pass through shared memory. The first kernel finds the best IoU of
 * every box. The second recomputes the IoUs, which is cheaper than storing them, and tests which force an anchor.
 */
#include "anchor_target.h"
#include "launch.cuh"

namespace {

constexpr int kChunk = 64;  // boxes in shared memory

struct AnchorTarget {
  const float* gt_bbox;  // (N, G, 5)
  const float* im_info;  // (N, 3)
  const float* anchor;   // (K, 4)
  int64_t N, G, K;
  nk::AnchorRule rule;
  uint32_t* top;  // (N, G) rank of the best IoU of every box
};

/* An anchor and its position in the image. */
struct Candidate {
  nk::Box<float> box;
  float area;
  float inside;  // 1 or 0
  bool regular;

  __device__ Candidate(const AnchorTarget& target, int64_t n, int64_t k)
      : box(nk::load_box(target.anchor + 4 * k)),
        area(nk::area(box)),
        inside(target.rule.inside(box, target.im_info[3 * n], target.im_info[3 * n + 1])),
        regular(nk::is_regular(box)) {}

  /* Return the IoU with a box. Most are 0, which needs no division unless irregular sides could give NaN. */
  __device__ float iou(const nk::GroundTruth& truth) const {
    if (regular && (nk::are_apart(box, truth.box) || inside == 0) && nk::is_regular(truth.box)) return 0;
    return nk::iou(box, area, truth.box, truth.area) * inside;
  }
};

/* Copy the next chunk of at most `left` rows of gt_bbox to shared memory, with all threads. Return its size. */
__device__ int load_chunk(const float* rows, int64_t left, float* shared) {
  const int count = static_cast<int>(left < kChunk ? left : kChunk);
  __syncthreads();
  for (int i = threadIdx.x; i < 5 * count; i += nk::kBlock) shared[i] = rows[i];
  __syncthreads();
  return count;
}

__global__ void top_kernel(AnchorTarget target) {
  __shared__ float rows[5 * kChunk];
  __shared__ unsigned int top[kChunk];
  const int64_t tiles = nk::ceil_div(target.K, nk::kBlock);
  for (int64_t block = blockIdx.x; block < target.N * tiles; block += gridDim.x) {
    const int64_t n = block / tiles;
    const int64_t k = block % tiles * nk::kBlock + threadIdx.x;
    const Candidate anchor(target, n, k < target.K ? k : target.K - 1);
    for (int64_t first = n * target.G; first < (n + 1) * target.G; first += kChunk) {
      if (threadIdx.x < kChunk) top[threadIdx.x] = 0;
      const int count = load_chunk(target.gt_bbox + 5 * first, (n + 1) * target.G - first, rows);
      for (int g = 0; g < count; ++g) {
        const nk::GroundTruth truth(rows + 5 * g);
        const uint32_t rank = truth.is_padding() ? 0 : nk::rank_of(anchor.iou(truth));
        if (rank > 0) atomicMax(&top[g], rank);
      }
      __syncthreads();
      if (static_cast<int>(threadIdx.x) < count && top[threadIdx.x] > 0) {
        atomicMax(&target.top[first + threadIdx.x], top[threadIdx.x]);
      }
    }
  }
}

__global__ void label_kernel(AnchorTarget target, float* label, float* delta) {
  __shared__ float rows[5 * kChunk];
  const int64_t tiles = nk::ceil_div(target.K, nk::kBlock);
  for (int64_t block = blockIdx.x; block < target.N * tiles; block += gridDim.x) {
    const int64_t n = block / tiles;
    const int64_t k = block % tiles * nk::kBlock + threadIdx.x;
    const Candidate anchor(target, n, k < target.K ? k : target.K - 1);
    uint32_t best = 0;
    int32_t best_box = -1;
    float forced = 0;
    for (int64_t first = 0; first < target.G; first += kChunk) {
      const int count = load_chunk(target.gt_bbox + 5 * (n * target.G + first), target.G - first, rows);
      for (int i = 0; i < count; ++i) {
        const nk::GroundTruth truth(rows + 5 * i);
        if (truth.is_padding()) continue;
        const int32_t g = static_cast<int32_t>(first) + i;
        if (best_box < 0) best_box = g;  // the first box counts as the best
        const float forcing = target.rule.forcing_iou(target.top[n * target.G + g]);
        nk::visit_box(anchor.iou(truth), g, truth.cls, forcing, best, best_box, forced);
      }
    }
    if (k >= target.K) continue;
    float value = anchor.inside - 1;  // without boxes: background or ignored
    float to_box[4] = {0, 0, 0, 0};
    if (best_box >= 0) {
      const float* row = target.gt_bbox + 5 * (n * target.G + best_box);
      value = target.rule.label(best, row[4], forced, anchor.inside);
      if (value >= 1) nk::encode(anchor.box, nk::load_box(row), to_box);
    }
    label[n * target.K + k] = value;
    for (int i = 0; i < 4; ++i) delta[4 * (n * target.K + k) + i] = to_box[i];
  }
}

}  // namespace

int64_t nk_anchor_target_workspace(int64_t N, int64_t G, int64_t) {
  return N * G * static_cast<int64_t>(sizeof(uint32_t));
}

int32_t nk_anchor_target(
    const float* gt_bbox, const float* im_info, const float* anchor, int64_t N, int64_t G, int64_t K, float pos_thr,
    float neg_thr, float min_pos_thr, float allowed_border, float* label, float* delta, void* workspace,
    intptr_t where) {
  if (N == 0 || K == 0) return 0;
  const AnchorTarget target{
      gt_bbox, im_info, anchor, N, G, K, {pos_thr, neg_thr, min_pos_thr, allowed_border},
      static_cast<uint32_t*>(workspace)};
  const unsigned int blocks = nk::grid_of(N * nk::ceil_div(K, nk::kBlock));
  const cudaStream_t stream = nk::stream_of(where);
  if (G > 0) {
    const cudaError_t status = cudaMemsetAsync(target.top, 0, nk_anchor_target_workspace(N, G, K), stream);
    if (status != cudaSuccess) return static_cast<int32_t>(status);
    NK_LAUNCH(top_kernel, blocks, nk::kBlock, 0, stream, target);
  }
  NK_LAUNCH(label_kernel, blocks, nk::kBlock, 0, stream, target, label, delta);
  return nk::launch_status();
}
