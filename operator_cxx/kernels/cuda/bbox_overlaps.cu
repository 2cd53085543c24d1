/* nk_bbox_overlaps on the GPU: one thread per pair of boxes. */
#include "box.h"
#include "dtype.h"
#include "launch.cuh"

namespace {

template <class T>
__global__ void overlap_kernel(const T* box, const T* other, int64_t M, int64_t G, T* iou) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * nk::kBlock;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * nk::kBlock + threadIdx.x; i < M * G; i += step) {
    const nk::Box<T> a = nk::load_box(box + 4 * (i / G));
    const nk::Box<T> b = nk::load_box(other + 4 * (i % G));
    iou[i] = nk::iou(a, nk::area(a), b, nk::area(b));
  }
}

}  // namespace

int32_t nk_bbox_overlaps(
    const void* box, const void* other, int32_t dtype, int64_t M, int64_t G, void* iou, intptr_t where) {
  if (M == 0 || G == 0) return 0;
  nk::with_dtype<float, double>(dtype, [&]<class T>() {
    NK_LAUNCH(
        (overlap_kernel<T>), nk::grid_of(nk::ceil_div(M * G, nk::kBlock)), nk::kBlock, 0, nk::stream_of(where),
        static_cast<const T*>(box), static_cast<const T*>(other), M, G, static_cast<T*>(iou));
  });
  return nk::launch_status();
}
