/* nk_anchor_target on the CPU. N images, G boxes per image, K anchors.
 *
 * Anchors are processed in tiles. Which anchor is the best of a box is known only after all tiles, so there are two
 * passes. The first assigns all tiles and stores the best IoU of every tile with every box. The second repeats the
 * tiles that contain the best anchor of a box, with the IoU at which that box forces an anchor. They are few: a box has
 * its best anchor in one tile, or in several if there are ties.
 */
#include "anchor_target.h"

#include "parallel.h"

namespace {

constexpr int64_t kTile = 256;  // anchors: at most a few rows of a level, which most boxes do not overlap

/* A tile of anchors as columns, and their state while the boxes are visited. */
struct Tile {
  int64_t count;
  float x1[kTile], y1[kTile], x2[kTile], y2[kTile], area[kTile], inside[kTile];
  nk::Box<float> extent;    // of the anchors inside the image
  bool regular;             // all anchors are regular
  uint32_t best[kTile];     // rank of the best IoU
  int32_t best_box[kTile];  // index of the best box
  float forced[kTile];      // class that a box forces, or 0

  /* Load the anchors of a tile and their position in the image. */
  void load(const float* anchor, int64_t size, const nk::AnchorRule& rule, const float* im_info) {
    count = size;
    float low_x = INFINITY, low_y = INFINITY, high_x = -INFINITY, high_y = -INFINITY;
    int irregular = 0;
#pragma omp simd reduction(min : low_x, low_y) reduction(max : high_x, high_y) reduction(+ : irregular)
    for (int64_t i = 0; i < size; ++i) {
      const nk::Box<float> box = nk::load_box(anchor + 4 * i);
      x1[i] = box.x1;
      y1[i] = box.y1;
      x2[i] = box.x2;
      y2[i] = box.y2;
      area[i] = nk::area(box);
      const float in = rule.inside(box, im_info[0], im_info[1]);
      inside[i] = in;
      low_x = nk::lesser(in > 0 ? box.x1 : INFINITY, low_x);
      low_y = nk::lesser(in > 0 ? box.y1 : INFINITY, low_y);
      high_x = nk::greater(in > 0 ? box.x2 : -INFINITY, high_x);
      high_y = nk::greater(in > 0 ? box.y2 : -INFINITY, high_y);
      irregular += !nk::is_regular(box);
    }
    extent = {low_x, low_y, high_x, high_y};
    regular = irregular == 0;
  }

  /* Reset the state to that before any box; the first box counts as the best. */
  void clear(int32_t first_box) {
    std::fill_n(best, count, 0u);
    std::fill_n(best_box, count, first_box);
    std::fill_n(forced, count, 0.0f);
  }

  /* Update the anchors for box g. Return the rank of the best IoU of the box with one of them. */
  uint32_t visit(const nk::GroundTruth& truth, int32_t g, float forcing_iou) {
    uint32_t top = 0;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < count; ++i) {
      const nk::Box<float> anchor{x1[i], y1[i], x2[i], y2[i]};
      const float iou = nk::iou(anchor, area[i], truth.box, truth.area) * inside[i];
      const uint32_t rank = nk::rank_of(iou);
      top = rank > top ? rank : top;
      nk::visit_box(iou, g, truth.cls, forcing_iou, best[i], best_box[i], forced[i]);
    }
    return top;
  }
};

struct AnchorTarget {
  const float* gt_bbox;  // (N, G, 5)
  const float* im_info;  // (N, 3)
  const float* anchor;   // (K, 4)
  int64_t G, K;
  nk::AnchorRule rule;
  float* label;        // (N, K)
  float* delta;        // (N, K, 4)
  uint32_t* tile_top;  // (N, tiles, G) rank of the best IoU of a box in a tile
  uint32_t* top;       // (N, G) their maximum; 0, at which a box forces no anchor, during the first pass

  int64_t tiles() const { return nk::ceil_div(K, kTile); }

  /* Assign tile t of image n: write its labels and deltas given `top`, and its `tile_top`. */
  void assign(int64_t n, int64_t t) const {
    const float* rows = gt_bbox + n * G * 5;
    uint32_t* found = tile_top + (n * tiles() + t) * G;
    int64_t first = 0;
    while (first < G && nk::GroundTruth(rows + 5 * first).is_padding()) ++first;
    Tile tile;
    tile.load(anchor + 4 * t * kTile, std::min(kTile, K - t * kTile), rule, im_info + 3 * n);
    tile.clear(static_cast<int32_t>(first));
    std::fill_n(found, G, 0u);
    for (int64_t g = first; g < G; ++g) {
      const nk::GroundTruth truth(rows + 5 * g);
      if (truth.is_padding()) continue;
      // A box apart from all anchors has only IoUs of 0, which change nothing, unless irregular sides could give NaN.
      if (tile.regular && nk::are_apart(tile.extent, truth.box) && nk::is_regular(truth.box)) continue;
      found[g] = tile.visit(truth, static_cast<int32_t>(g), rule.forcing_iou(top[n * G + g]));
    }
    write(tile, first < G ? rows : nullptr, n * K + t * kTile);
  }

  /* Write the labels and deltas of a tile from index `at` on. rows: the boxes of the image, null if it has none. */
  void write(const Tile& tile, const float* rows, int64_t at) const {
    std::fill_n(delta + 4 * at, 4 * tile.count, 0.0f);
    for (int64_t i = 0; i < tile.count; ++i) {
      if (!rows) {
        label[at + i] = tile.inside[i] - 1;
        continue;
      }
      const float* row = rows + 5 * static_cast<int64_t>(tile.best_box[i]);
      const float value = rule.label(tile.best[i], row[4], tile.forced[i], tile.inside[i]);
      label[at + i] = value;
      if (value >= 1) {
        const nk::Box<float> box{tile.x1[i], tile.y1[i], tile.x2[i], tile.y2[i]};
        nk::encode(box, nk::load_box(row), delta + 4 * (at + i));
      }
    }
  }

  /* Write `top` of an image from the tiles' best IoUs. */
  void find_top(int64_t n) const {
    for (int64_t t = 0; t < tiles(); ++t) {
      const uint32_t* found = tile_top + (n * tiles() + t) * G;
      for (int64_t g = 0; g < G; ++g) top[n * G + g] = std::max(top[n * G + g], found[g]);
    }
  }

  /* Return true if a box forces an anchor of the tile: the best IoU of the box is found there. */
  bool has_forced(int64_t n, int64_t t) const {
    const uint32_t* found = tile_top + (n * tiles() + t) * G;
    bool any = false;
    for (int64_t g = 0; g < G; ++g) {
      const uint32_t best = top[n * G + g];
      any |= (found[g] == best) & (rule.forcing_iou(best) < INFINITY);
    }
    return any;
  }
};

}  // namespace

int64_t nk_anchor_target_workspace(int64_t N, int64_t G, int64_t K) {
  return N * G * (nk::ceil_div(K, kTile) + 1) * static_cast<int64_t>(sizeof(uint32_t));
}

int32_t nk_anchor_target(
    const float* gt_bbox, const float* im_info, const float* anchor, int64_t N, int64_t G, int64_t K, float pos_thr,
    float neg_thr, float min_pos_thr, float allowed_border, float* label, float* delta, void* workspace,
    intptr_t where) {
  uint32_t* top = static_cast<uint32_t*>(workspace);
  const AnchorTarget target{
      gt_bbox, im_info, anchor, G, K, {pos_thr, neg_thr, min_pos_thr, allowed_border}, label, delta, top + N * G, top};
  const int64_t tiles = target.tiles();
  std::fill_n(top, N * G, 0u);
  nk::parallel_for(N * tiles, where, [&](int64_t block) { target.assign(block / tiles, block % tiles); });
  nk::parallel_for(N, where, [&](int64_t n) { target.find_top(n); });
  nk::parallel_for(N * tiles, where, [&](int64_t block) {
    if (target.has_forced(block / tiles, block % tiles)) target.assign(block / tiles, block % tiles);
  });
  return 0;
}
