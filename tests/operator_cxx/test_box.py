import ctypes
import math
import subprocess

import pytest
import torch

from operator_cxx import build
from operator_cxx.reference.box import MAX_LOG_RATIO, decode_box, encode_box, inclusive_area, inclusive_iou

# box.h on arrays of boxes.
SOURCE = r"""
#include "box.h"
extern "C" NK_EXPORT double max_log_ratio() { return nk::kMaxLogRatio; }
template <class T>
void all(const T* first, const T* second, T offset, int64_t count, T* area, T* iou, T* encoded, T* decoded) {
  for (int64_t i = 0; i < count; ++i) {
    const nk::Box<T> a = nk::load_box(first + 4 * i), b = nk::load_box(second + 4 * i);
    area[i] = nk::area(a, offset);
    iou[i] = nk::iou(a, area[i], b, nk::area(b, offset), offset);
    nk::encode(a, b, encoded + 4 * i);
    const nk::Box<T> box = nk::decode(a, second + 4 * i);
    const T four[4] = {box.x1, box.y1, box.x2, box.y2};
    for (int k = 0; k < 4; ++k) decoded[4 * i + k] = four[k];
  }
}
extern "C" NK_EXPORT void all_float(
    const float* a, const float* b, float offset, int64_t count, float* area, float* iou, float* encoded,
    float* decoded) {
  all(a, b, offset, count, area, iou, encoded, decoded);
}
extern "C" NK_EXPORT void all_double(
    const double* a, const double* b, double offset, int64_t count, double* area, double* iou, double* encoded,
    double* decoded) {
  all(a, b, offset, count, area, iou, encoded, decoded);
}
"""


@pytest.fixture(scope="module", params=["native", "x86-64"])
def compiled_box(request, tmp_path_factory):
    """box.h, compiled as the kernels are for this processor and for any."""
    folder = tmp_path_factory.mktemp("box")
    (folder / "box.cc").write_text(SOURCE)
    flags = [*build.CXX_FLAGS, f"-march={request.param}", *build.include_flags(), "-shared"]
    subprocess.run(
        [*build.compiler(), *flags, str(folder / "box.cc"), "-o", str(folder / "box.so")],
        check=True,
        capture_output=True,
    )
    return ctypes.CDLL(str(folder / "box.so"))


def iou(a, b):
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    return inclusive_iou(a, inclusive_area(a), b, inclusive_area(b)).item()


def test_a_box_of_one_pixel_has_area_one():
    assert inclusive_area(torch.tensor([[5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 9.0, 19.0]])).tolist() == [
        1.0,
        200.0,
    ]


@pytest.mark.parametrize(
    "box, expected",
    [
        ([0, 0, 9, 9], 1.0),
        ([5, 0, 14, 9], 50 / 150),  # columns 5..9 are shared
        ([9, 9, 18, 18], 1 / 199),  # the corner pixel is shared
        ([10, 0, 19, 9], 0.0),  # the next column
        ([15, 0, 19, 9], 0.0),  # further to the right
        ([0, 15, 9, 19], 0.0),  # further down
        ([2, 2, 4, 6], 15 / 100),  # inside
        ([30, 40, 50, 60], 0.0),  # apart on both axes: the two negative sides do not multiply to an area
    ],
)
def test_iou_with_the_box_of_ten_pixels(box, expected):
    assert iou([0.0, 0.0, 9.0, 9.0], box) == pytest.approx(expected, abs=1e-15)


def test_encode_box_by_hand():
    # Anchor: centre (4.5, 4.5), size (10, 10). Box: columns 2..21, rows 1..5: centre (11.5, 3), size (20, 5).
    delta = encode_box(torch.tensor([0.0, 0.0, 9.0, 9.0]), torch.tensor([2.0, 1.0, 21.0, 5.0]))
    torch.testing.assert_close(delta, torch.tensor([0.7, -0.15, math.log(2), math.log(0.5)]))


def test_decode_box_undoes_encode_box():
    anchor = torch.tensor([[0.0, 0.0, 9.0, 9.0], [-20.5, 3.0, 60.0, 8.25]], dtype=torch.float64)
    box = torch.tensor([[2.0, 1.0, 21.0, 5.0], [7.0, 7.0, 7.0, 7.0]], dtype=torch.float64)
    torch.testing.assert_close(decode_box(anchor, encode_box(anchor, box)), box)


def test_decode_box_caps_the_size_at_1000_16ths_of_the_anchor():
    # 16 * 1000 / 16 = 1000 pixels about the centre 7.5: from -492 to 507.
    box = decode_box(torch.tensor([0.0, 0.0, 15.0, 15.0]), torch.tensor([0.0, 0.0, 100.0, 0.0]))
    torch.testing.assert_close(box, torch.tensor([-492.0, 0.0, 507.0, 15.0]))


def run_compiled(library, a, b, offset):
    """area (M), iou (M), encoded and decoded (M, 4) of rows of a with rows of b."""
    name, number = ("all_float", ctypes.c_float) if a.dtype == torch.float32 else ("all_double", ctypes.c_double)
    out = [a.new_empty(len(a)), a.new_empty(len(a)), torch.empty_like(a), torch.empty_like(a)]
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (a, b)], [ctypes.c_void_p(x.data_ptr()) for x in out]
    getattr(library, name)(*pointers[0], number(offset), ctypes.c_int64(len(a)), *pointers[1])
    return out


def boxes(kind, dtype):
    """Two lots of boxes (M, 4)."""
    random = torch.Generator().manual_seed(5)
    if kind == "common":
        corner = torch.rand(2, 4000, 2, generator=random, dtype=torch.float64) * 100
        size = torch.rand(2, 4000, 2, generator=random, dtype=torch.float64) * 60
        return torch.cat([corner, corner + size], dim=2).to(dtype)
    if kind == "grid":  # many equal overlaps, touching and single pixels
        corner = torch.randint(0, 8, (2, 4000, 2), generator=random)
        return torch.cat([corner, corner + torch.randint(-2, 6, (2, 4000, 2), generator=random)], dim=2).to(dtype)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 9.0, 1e30, -1e38, math.inf, -math.inf, math.nan], dtype=dtype)
    return special[torch.randint(0, len(special), (2, 20000, 4), generator=random)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["common", "grid", "special"])
def test_compiled_overlaps_are_the_references_to_the_bit(compiled_box, kind, dtype):
    a, b = boxes(kind, dtype)
    area, overlap, _, _ = run_compiled(compiled_box, a, b, 1.0)
    expected = inclusive_iou(a, inclusive_area(a), b, inclusive_area(b))
    torch.testing.assert_close(area, inclusive_area(a), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(overlap, expected, rtol=0, atol=0, equal_nan=True)
    assert len(expected.nan_to_num().unique()) > (2 if kind == "special" else 50)


def test_compiled_overlap_of_exclusive_corners(compiled_box):
    a, b = torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([[5.0, 0.0, 15.0, 10.0]])
    area, overlap, _, _ = run_compiled(compiled_box, a, b, 0.0)
    assert area.item() == 100
    assert overlap.item() == torch.tensor(50 / 150).item()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_compiled_deltas_are_the_references(compiled_box, dtype, tolerance):
    anchor, box = boxes("common", dtype)
    _, _, encoded, _ = run_compiled(compiled_box, anchor, box, 1.0)
    torch.testing.assert_close(encoded, encode_box(anchor, box), rtol=tolerance, atol=tolerance)
    delta = torch.randn(len(anchor), 4, generator=torch.Generator().manual_seed(1), dtype=dtype) * 3
    delta[:40, ::3] = math.nan
    delta[40:80, 2:] = math.inf
    delta[80:120, 1:3] = -math.inf
    _, _, _, decoded = run_compiled(compiled_box, anchor, delta, 1.0)
    expected = decode_box(anchor, delta)
    torch.testing.assert_close(decoded, expected, rtol=tolerance, atol=tolerance * 1e3, equal_nan=True)
    assert expected[:40].isnan().any(dim=1).all()


def test_compiled_boxes_have_the_same_cap(compiled_box):
    compiled_box.max_log_ratio.restype = ctypes.c_double
    assert compiled_box.max_log_ratio() == MAX_LOG_RATIO
