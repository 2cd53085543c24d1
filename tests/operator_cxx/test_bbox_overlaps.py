"""The kernel of box overlaps, called through the C interface, and its reference in plain torch."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from operator_cxx import library
from operator_cxx.reference.box import inclusive_area, inclusive_iou

KERNELS = ["compiled", "emulated"] + ["cuda"] * torch.cuda.is_available()


def reference(box, other):
    return inclusive_iou(box[:, None], inclusive_area(box)[:, None], other, inclusive_area(other))


def overlaps(box, other):
    """Return the IoUs (M, G) of boxes (M, 4) with boxes (G, 4)."""
    if not library.serves(box):
        return reference(box, other)
    M, G = len(box), len(other)
    iou = box.new_full((M * G + 1,), -7.0)
    library.loaded[box.device.type].run("bbox_overlaps", box, box, other, library.DTYPES[box.dtype], M, G, iou)
    assert iou[-1] == -7  # nothing is written beyond the result
    return iou[:-1].reshape(M, G)


def boxes(count, seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=random, dtype=torch.float64) * 50
    return torch.cat([low, low + torch.rand(count, 2, generator=random, dtype=torch.float64) * 40], 1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_by_hand(device, dtype):
    box = torch.tensor([[0, 0, 9, 9], [5, 5, 5, 5]], dtype=dtype, device=device)
    other = torch.tensor([[0, 0, 9, 9], [0, 0, 4, 9], [9, 9, 18, 18], [10, 0, 19, 9], [5, 5, 6, 5]], dtype=dtype)
    # Inclusive: boxes that share the pixel (9, 9) overlap, 0..9 and 10..19 do not.
    expected = [[1, 50 / 100, 1 / 199, 0, 2 / 100], [1 / 100, 0, 0, 0, 1 / 2]]
    assert torch.equal(overlaps(box, other.to(device)).cpu(), torch.tensor(expected, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("M, G", [(1, 1), (300, 1), (257, 7), (1, 300), (256, 8), (300, 259), (5, 600)])
def test_against_the_definition(device, dtype, M, G):
    # The side that is stored as columns changes at G = 8; tiles have 256 boxes.
    box, other = boxes(M, 1, dtype), boxes(G, 2, dtype)
    iou = overlaps(box.to(device), other.to(device)).cpu()
    pairs = [(0, 0), (M - 1, G - 1), (M // 2, G // 3), (0, G - 1), (M - 1, 0)]
    for m, g in pairs:
        a, b = box[m].tolist(), other[g].tolist()
        inter = math.prod(max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + 1, 0) for i in (0, 1))
        union = sum((c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)) - inter
        assert iou[m, g].item() == pytest.approx(inter / union, rel=1e-4)
    assert torch.equal(iou, reference(box, other))


def test_no_boxes(device):
    for M, G in ((0, 3), (3, 0), (0, 0)):
        assert overlaps(boxes(M).to(device), boxes(G).to(device)).shape == (M, G)


SIDE = st.integers(-8, 24).map(float) | st.floats(-1e4, 1e4, width=32) | st.sampled_from([math.nan, math.inf, -3e38])
BOXES = st.lists(st.tuples(SIDE, SIDE, SIDE, SIDE), min_size=1, max_size=12)


@pytest.mark.parametrize("device", KERNELS, indirect=True)
@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(box=BOXES, other=BOXES, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_a_search_for_disagreement_with_the_reference(device, box, other, dtype):
    box, other = torch.tensor(box, dtype=dtype, device=device), torch.tensor(other, dtype=dtype, device=device)
    torch.testing.assert_close(overlaps(box, other), reference(box, other), rtol=0, atol=0, equal_nan=True)


def test_the_threads_change_no_bit():
    box, other = boxes(1000, 1), boxes(700, 2)
    results = []
    for threads in (2, 5, 1):
        torch.set_num_threads(threads)
        results.append(overlaps(box, other))
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[2])


def test_from_many_threads_at_once(device):
    box, other = boxes(40, 1).to(device), boxes(30, 2).to(device)
    expected = overlaps(box, other)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: overlaps(box, other), range(32)))
    assert all(torch.equal(result, expected) for result in results)
