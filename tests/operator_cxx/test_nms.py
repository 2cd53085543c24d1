"""Hard and soft non-maximum suppression: results by hand, and a comparison with the definition."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from operator_cxx import library
from operator_cxx.nms import nms, soft_nms

GOLDEN = Path(__file__).parents[1] / "golden"
INF, NAN = math.inf, math.nan


def row(x1, x2):
    return [x1, 0, x2, 0]


def one_image(device, boxes, scores, classes=None):
    """Return bbox (1, M, 4), score (1, M) and cls (1, M)."""
    cls = torch.tensor(classes or [1] * len(boxes), dtype=torch.int64, device=device)
    bbox = torch.tensor(boxes, dtype=torch.float32, device=device).reshape(1, -1, 4)
    return bbox, torch.tensor(scores, dtype=torch.float32, device=device)[None], cls[None]


def answer(index, score):
    """Return [(index, score), ...] of the kept boxes of every image; check the padding of -1 and 0."""
    kept = []
    for its_index, its_score in zip(index.tolist(), score.tolist(), strict=True):
        count = sum(i >= 0 for i in its_index)
        assert its_index[count:] == [-1] * (len(its_index) - count)
        assert its_score[count:] == [0.0] * (len(its_score) - count)
        kept.append(list(zip(its_index[:count], its_score[:count], strict=True)))
    return kept


def kept_of(device, boxes, scores, classes=None, thr=0.5, max_det=5, **options):
    index, score = nms(*one_image(device, boxes, scores, classes), thr=thr, max_det=max_det, **options)
    assert index.dtype == torch.int64
    assert index.shape == score.shape == (1, max_det)
    (kept,) = answer(index, score)
    assert [s for _, s in kept] == [np.float32(scores[i]) for i, _ in kept]
    return [i for i, _ in kept]


def soft_of(device, boxes, scores, classes=None, thr=0.5, sigma=0.5, min_score=0.001, max_det=5, method="linear"):
    tensors = one_image(device, boxes, scores, classes)
    found = soft_nms(*tensors, method=method, thr=thr, sigma=sigma, min_score=min_score, max_det=max_det)
    return answer(*found)[0]


def define(bbox, score, cls, *, thr, max_det, min_score, offset=1, method="hard", sigma=0.5):
    """Apply the definition to the lists of one image, box by box, in float32: [(index, score), ...]."""
    thr, min_score, sigma, one = np.float32(thr), np.float32(min_score), np.float32(sigma), np.float32(offset)

    def side(low, high):
        return high - low + one

    def iou(a, b):
        width = max(side(max(a[0], b[0]), min(a[2], b[2])), np.float32(0))
        height = max(side(max(a[1], b[1]), min(a[3], b[3])), np.float32(0))
        areas = side(a[0], a[2]) * side(a[1], a[3]) + side(b[0], b[2]) * side(b[1], b[3])
        return width * height / (areas - width * height)

    def decayed(value, overlap):
        if method == "hard":
            return np.float32(-np.inf) if overlap > thr else value
        if method == "linear":
            return value * (1 - overlap) if overlap > thr else value
        return value if np.isnan(overlap) else value * np.exp(-overlap * overlap / sigma)

    with np.errstate(all="ignore"):
        boxes = [[np.float32(x) for x in box] for box in bbox]
        left = {i: np.float32(s) for i, s in enumerate(score) if np.float32(s) > min_score}
        kept = []
        while left and len(kept) < max_det:
            best = max(left, key=lambda i: (left[i], -i))
            kept.append((best, float(left.pop(best))))
            same = [i for i in left if cls[i] == cls[best]]
            left |= {i: decayed(left[i], iou(boxes[i], boxes[best])) for i in same}
            left = {i: s for i, s in left.items() if s > min_score}
    return kept


def random_batch(seed, N, M, num_class, spread=200.0, scores=300):
    """Return overlapping boxes with many equal scores."""
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(N, M, 2, generator=random) * spread
    bbox = torch.cat([corner, corner + torch.rand(N, M, 2, generator=random) * 60], dim=2)
    score = torch.randint(0, scores, (N, M), generator=random) / scores
    return bbox, score, torch.randint(1, num_class + 1, (N, M), generator=random)


def test_an_iou_at_the_threshold_stays_and_one_above_goes(device):
    # With 0..9: 5/10 at the threshold, 6/10 above it.
    assert kept_of(device, [row(0, 9), row(0, 4)], [0.9, 0.8]) == [0, 1]
    assert kept_of(device, [row(0, 9), row(0, 5)], [0.9, 0.8]) == [0]


@pytest.mark.parametrize("width", [1, 3, 6, 7, 9])
def test_the_threshold_is_compared_in_the_type_of_the_boxes(device, width):
    # width / 10 is not a float32: IoU and threshold are rounded alike, so the IoU is not above.
    boxes = [row(0, 9), row(0, width - 1)]
    assert kept_of(device, boxes, [0.9, 0.8], thr=width / 10) == [0, 1]
    assert kept_of(device, boxes, [0.9, 0.8], thr=np.nextafter(np.float32(width / 10), np.float32(0)).item()) == [0]


def test_exclusive_corners(device):
    # With 0..10 x 0..2: 5 x 2 / 20 is at the threshold, inclusive it is 6 x 3 / 33 and above.
    boxes = [[0, 0, 10, 2], [0, 0, 5, 2]]
    assert kept_of(device, boxes, [0.9, 0.8], inclusive=False) == [0, 1]
    assert kept_of(device, boxes, [0.9, 0.8]) == [0]


def test_classes_do_not_suppress_each_other(device):
    assert kept_of(device, [row(0, 9)] * 3, [0.7, 0.9, 0.8], [1, 2, 1]) == [1, 2]
    far = [2**63 - 1, -(2**63), *(5 + i * 2**k for i in range(-10, 10, 3) for k in (32, 40, 48))]
    assert kept_of(device, [row(0, 9)] * 46, [0.5] * 46, far + far, max_det=46) == list(range(23))


def test_a_suppressed_box_suppresses_nothing(device):
    # 0..9, 3..12 and 6..15: neighbours have IoU 7/13, the outer two 4/16.
    assert kept_of(device, [row(6, 15), row(3, 12), row(0, 9)], [0.7, 0.8, 0.9]) == [2, 0]


def test_equal_scores_go_by_index(device):
    assert kept_of(device, [row(0, 9), row(0, 9), row(20, 29)], [0.5] * 3) == [0, 2]
    assert kept_of(device, [row(20, 29), row(0, 9), row(0, 9)], [0.5] * 3, max_det=1) == [0]
    assert kept_of(device, [row(0, 9), row(20, 29), row(40, 49)], [0.0, -0.0, 0.0]) == [0, 1, 2]


def test_scores_of_any_sign_are_ordered(device):
    boxes = [row(10 * i, 10 * i + 5) for i in range(6)]
    scores = [-1.0, INF, 1e-45, -1e-45, 2.0, -3e38]
    assert kept_of(device, boxes, scores, max_det=6) == [1, 4, 2, 3, 0, 5]


def test_scores_not_above_min_score_are_removed(device):
    boxes = [row(10 * i, 10 * i + 5) for i in range(5)]
    assert kept_of(device, boxes, [0.5, NAN, 0.3, 0.7, -INF], min_score=0.3) == [3, 0]
    assert kept_of(device, boxes, [0.5, NAN, 0.3, 0.7, -INF]) == [3, 0, 2]
    assert kept_of(device, boxes, [0.5, NAN, 0.3, 0.7, -INF], min_score=0.7) == []


def test_a_nan_coordinate_suppresses_nothing_and_is_not_suppressed(device):
    for place in range(4):
        nan = [0.0, 0.0, 9.0, 0.0]
        nan[place] = NAN
        assert kept_of(device, [row(0, 9), nan, row(0, 9), nan], [0.9, 0.8, 0.7, 0.6]) == [0, 1, 3]
        assert kept_of(device, [nan, row(0, 9)], [0.9, 0.8]) == [0, 1]
        assert soft_of(device, [nan, row(0, 9)], [0.75, 0.5], method="gaussian") == [(0, 0.75), (1, 0.5)]


def test_max_det_keeps_the_best_of_all_classes(device):
    boxes = [row(10 * i, 10 * i + 5) for i in range(4)]
    assert kept_of(device, boxes, [0.1, 0.4, 0.3, 0.2], [1, 2, 3, 1], max_det=3) == [1, 2, 3]


def test_a_chain_longer_than_what_is_decided_at_once(device):
    # Every box has IoU 7/13 with the next and 4/16 or less with others: every second box is kept.
    boxes = [row(3 * i, 3 * i + 9) for i in range(600)]
    assert kept_of(device, boxes, [1 - i / 1000 for i in range(600)], max_det=700) == list(range(0, 600, 2))


def test_hundreds_of_suppressed_boxes_before_hundreds_of_kept_ones(device):
    boxes = [row(0, 9)] * 512 + [row(20 * i, 20 * i + 9) for i in range(1, 513)]
    scores = [2 - i / 1024 for i in range(1024)]
    assert kept_of(device, boxes, scores, max_det=520) == [0, *range(512, 1024)]
    assert kept_of(device, boxes, scores, max_det=3) == [0, 512, 513]


def test_linear_decay_by_hand(device):
    # With 0..9: 0..7 has IoU 8/10 and drops to 0.75 (1 - 0.8) = 0.15, behind 20..29; 0..4 has 5/10, not above thr. Then
    # 0..4 has 5/8 with 0..7, whose score drops to 0.15 (1 - 0.625) = 0.05625.
    boxes, scores = [row(0, 7), row(0, 9), row(20, 29), row(0, 4)], [0.75, 0.875, 0.25, 0.5]
    expected = [(1, 0.875), (3, 0.5), (2, 0.25), (0, pytest.approx(0.05625))]
    assert soft_of(device, boxes, scores) == expected
    assert soft_of(device, boxes, scores, min_score=0.06) == expected[:3]
    assert soft_of(device, boxes, scores, max_det=2) == expected[:2]
    assert soft_of(device, boxes, scores, [1, 2, 2, 1]) == [
        (1, 0.875),
        (0, 0.75),
        (2, 0.25),
        (3, pytest.approx(0.5 * 3 / 8)),
    ]


def test_gaussian_decay_by_hand(device):
    # IoU 5/10: 0.5 exp(-0.25 / 0.5). A box apart has IoU 0 and keeps its exact score.
    boxes, scores = [row(0, 9), row(0, 4), row(20, 29)], [0.75, 0.5, 0.6]
    expected = [(0, 0.75), (2, np.float32(0.6)), (1, pytest.approx(0.5 * math.exp(-0.5), rel=1e-6))]
    assert soft_of(device, boxes, scores, method="gaussian") == expected
    # the threshold has no effect
    assert soft_of(device, boxes, scores, method="gaussian", thr=0.9) == expected
    sharp = [(0, 0.75), (2, np.float32(0.6))]  # 0.5 exp(-0.25 / 0.01) = 7e-12
    assert soft_of(device, boxes, scores, method="gaussian", sigma=0.01) == sharp


def test_linear_decay_of_equal_boxes_leaves_nothing(device):
    # 1 - IoU is 0, and inf times 0 is NaN, which is removed.
    assert soft_of(device, [row(0, 9)] * 3, [INF, INF, 0.5], min_score=-1.0) == [(0, INF), (2, 0.0)]
    assert soft_of(device, [row(0, 9)] * 3, [0.5] * 3, min_score=0.0) == [(0, 0.5)]


def test_images_are_independent(device):
    bbox = torch.tensor([[row(0, 9), row(0, 8)], [row(0, 9), row(20, 29)], [row(0, 9), row(0, 9)]], device=device)
    score = torch.tensor([[0.5, 0.9], [0.5, 0.9], [0.5, NAN]], device=device)
    cls = torch.ones(3, 2, dtype=torch.int64, device=device)
    index, kept_score = nms(bbox.float(), score, cls, thr=0.5, max_det=3)
    assert index.tolist() == [[1, -1, -1], [1, 0, -1], [0, -1, -1]]
    assert torch.equal(kept_score.cpu(), torch.tensor([[0.9, 0, 0], [0.9, 0.5, 0], [0.5, 0, 0]]))


@pytest.mark.parametrize("N, M", [(0, 5), (0, 0), (1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("method", ["hard", "linear", "gaussian"])
def test_nothing_to_keep(device, N, M, method):
    bbox, cls = torch.zeros(N, M, 4, device=device), torch.ones(N, M, dtype=torch.int64, device=device)
    score = torch.zeros(N, M, device=device)
    if method == "hard":
        index, kept = nms(bbox, score, cls, thr=0.5, max_det=3, min_score=0.0)
    else:
        index, kept = soft_nms(bbox, score, cls, method=method, thr=0.5, sigma=0.5, min_score=0.0, max_det=3)
    assert index.tolist() == [[-1, -1, -1]] * N
    assert kept.tolist() == [[0.0, 0.0, 0.0]] * N


def test_detections_of_the_original(device):
    golden = np.load(GOLDEN / "decode_256.npz")
    rows, expected = (torch.from_numpy(golden[name]).to(device) for name in ("candidates", "detections"))
    bbox, score, cls = rows[None, :, :4], rows[None, :, 4], rows[None, :, 5].long()
    index, kept = nms(bbox, score, cls, thr=float(golden["nms_thr"]), max_det=int(golden["max_det_per_image"]))
    index = index[index >= 0]
    assert len(rows) > len(index) == len(expected)
    assert torch.equal(rows[index], expected)
    assert torch.equal(kept[0, : len(index)], expected[:, 4])


@pytest.mark.parametrize("M, num_class, max_det", [(700, 1, 700), (700, 5, 800), (700, 5, 40), (257, 300, 300)])
@pytest.mark.parametrize("offset", [0, 1])
def test_hard_against_the_definition(device, M, num_class, max_det, offset):
    batch = random_batch(M + num_class, 2, M, num_class)
    options = {"thr": 0.3, "max_det": max_det, "min_score": 0.01}
    found = answer(*nms(*(t.to(device) for t in batch), inclusive=offset == 1, **options))
    assert found == [
        define(*image, offset=offset, **options) for image in zip(*(t.tolist() for t in batch), strict=True)
    ]
    assert all(0 < len(image) < M for image in found)


@pytest.mark.parametrize("M, num_class, max_det", [(130, 1, 130), (200, 7, 60), (70, 90, 70)])
@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_against_the_definition(device, M, num_class, max_det, method):
    batch = random_batch(M, 2, M, num_class, scores=100_000)
    options = {"method": method, "thr": 0.3, "sigma": 0.4, "max_det": max_det, "min_score": 0.05}
    found = answer(*soft_nms(*(t.to(device) for t in batch), **options))
    expected = [define(*image, **options) for image in zip(*(t.tolist() for t in batch), strict=True)]
    assert [[i for i, _ in image] for image in found] == [[i for i, _ in image] for image in expected]
    scores = [torch.tensor([s for image in images for _, s in image]) for images in (found, expected)]
    torch.testing.assert_close(*scores, rtol=0 if method == "linear" else 1e-5, atol=0)
    assert all(0 < len(image) < M for image in found)


sides = st.sampled_from([0.0, 1.0, 3.0, 5.0, 9.0, -2.0, 1e-20, 3e19, INF, -INF, NAN])
classes = st.sampled_from([0, 1, -1, 2**40])
values = st.sampled_from([0.0, -0.0, 0.25, 0.5, 0.75, -0.5, 1e-40, INF, -INF, NAN])


@settings(max_examples=80, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(sides, sides, sides, sides, values, classes), min_size=1, max_size=12),
    thr=st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0]),
    min_score=st.sampled_from([-INF, -1.0, 0.0, 0.25]),
    method=st.sampled_from(["hard", "linear", "gaussian"]),
    offset=st.sampled_from([0, 1]),
    max_det=st.integers(1, 14),
)
def test_any_numbers_against_the_definition(device, rows, thr, min_score, method, offset, max_det):
    image = [r[:4] for r in rows], [r[4] for r in rows], [r[5] for r in rows]
    options = {"thr": thr, "max_det": max_det, "min_score": min_score}
    tensors = one_image(device, *image)
    if method == "hard":
        found = nms(*tensors, inclusive=offset == 1, **options)
    else:
        found = soft_nms(*tensors, method=method, sigma=0.5, inclusive=offset == 1, **options)
    expected = define(*image, method=method, offset=offset, **options)
    (kept,) = answer(*found)
    assert [i for i, _ in kept] == [i for i, _ in expected]
    assert [s for _, s in kept] == pytest.approx([s for _, s in expected], rel=1e-5, abs=1e-37)


def test_any_layout_and_integer_type(device):
    bbox, score, cls = (t.to(device) for t in random_batch(3, 3, 50, 3))
    expected = nms(bbox, score, cls, thr=0.3, max_det=50)
    columns = bbox.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    spread = torch.stack([score, score], dim=2)[:, :, 1]
    for dtype in (torch.int32, torch.uint8, torch.int64):
        found = nms(columns, spread, cls.to(dtype).t().contiguous().t(), thr=0.3, max_det=50)
        assert all(map(torch.equal, found, expected))
    one = nms(bbox[:1].expand(3, -1, -1), score[:1].expand(3, -1), cls[:1].expand(3, -1), thr=0.3, max_det=50)
    assert one[0].tolist() == [expected[0][0].tolist()] * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types(device, dtype):
    # sides of 10 and 6 of 10 are exact in all of them
    bbox, score, cls = one_image(device, [row(0, 9), row(0, 5), row(20, 29)], [0.5, 0.25, 0.75])
    index, kept = nms(bbox.to(dtype), score.to(dtype), cls, thr=0.5, max_det=3)
    assert index.tolist() == [[2, 0, -1]]
    assert kept.dtype == dtype
    assert kept.tolist() == [[0.75, 0.5, 0]]
    index, kept = soft_nms(
        bbox.long(), score.to(dtype), cls, method="linear", thr=0.5, sigma=1, min_score=0.0, max_det=3
    )
    assert index.tolist() == [[2, 0, 1]]
    assert kept.dtype == dtype
    assert kept[0].tolist() == pytest.approx([0.75, 0.5, 0.1], rel=1e-2)


def both(batch, max_det=40):
    options = {"thr": 0.6, "max_det": max_det}
    soft = soft_nms(*batch, method="gaussian", sigma=0.5, min_score=0.01, **options)
    return [*nms(*batch, **options), *soft]


def test_the_number_of_threads_changes_nothing(device):
    # enough work for the threads to overlap
    batch = [t.to(device) for t in random_batch(5, 4, 1000, 2)]
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(both(batch, max_det=60))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_many_threads_may_call_at_once(device):
    batches = [[t.to(device) for t in random_batch(seed, 2, 60, 3)] for seed in range(8)]
    expected = [both(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(both, batches))
    assert all(torch.equal(a, b) for e, f in zip(expected, found, strict=True) for a, b in zip(e, f, strict=True))


def test_the_inputs_stay_as_they_are(device):
    batch = [t.to(device) for t in random_batch(6, 2, 40, 2)]
    before = [t.clone() for t in batch]
    both(batch)
    assert all(map(torch.equal, batch, before))


@pytest.mark.parametrize("method", ["hard", "linear"])
def test_it_is_an_operator_of_torch(device, method):
    bbox, score, cls = (t.to(device) for t in random_batch(7, 2, 12, 2))
    torch.library.opcheck(torch.ops.necklace.nms.default, (bbox, score, cls, method, 0.3, 1.0, 0.0, 5, True))


class Both(torch.nn.Module):
    def forward(self, bbox, score, cls):
        return both((bbox, score, cls))


def test_it_can_be_traced(device):
    batch = tuple(t.to(device) for t in random_batch(8, 2, 30, 2))
    expected = both(batch)
    torch._dynamo.reset()
    compiled = torch.compile(Both(), fullgraph=True, backend="aot_eager")(*batch)
    exported = torch.export.export(Both(), batch).module()(*batch)
    for found in (compiled, exported):
        assert all(map(torch.equal, found, expected))


def test_too_many_boxes_are_refused(monkeypatch):
    monkeypatch.setattr(library, "loaded", {"cpu": None})  # refused before a kernel is used
    score, cls = torch.zeros(1).expand(1, 2**31), torch.ones(1).long().expand(1, 2**31)
    with pytest.raises(ValueError, match=r"nms: expected fewer than 2\^31 boxes per image, got 2147483648"):
        nms(score[..., None].expand(-1, -1, 4), score, cls, thr=0.5, max_det=1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cls": torch.ones(1, 3).long()}, r"cls \(N, M\), got \(1, 2, 4\), \(1, 2\) and \(1, 3\)"),
        ({"bbox": torch.zeros(2, 4)}, r"bbox \(N, M, 4\), .* got \(2, 4\), \(1, 2\) and \(1, 2\)"),
        ({"bbox": torch.zeros(1, 2, 5)}, r"got \(1, 2, 5\)"),
        ({"score": torch.zeros(2)}, r"got \(1, 2, 4\), \(2,\) and"),
        ({"score": torch.zeros(1, 2).long()}, "score of a floating-point type .* got torch.int64 and torch.int64"),
        ({"cls": torch.zeros(1, 2)}, "cls of an integer type, got torch.float32 and torch.float32"),
        ({"score": torch.zeros(1, 2, device="meta")}, "on one device, got cpu, meta and cpu"),
        ({"thr": 1.5}, "thr of 0 to 1, .* got 1.5, 3 and 0.0"),
        ({"thr": NAN}, "thr of 0 to 1, .* got nan"),
        ({"max_det": 0}, "max_det of at least 1 .* got 0.5, 0 and"),
        ({"min_score": NAN}, "a min_score, got 0.5, 3 and nan"),
    ],
)
@pytest.mark.parametrize("soft", [False, True])
def test_invalid_arguments_are_refused(change, message, soft):
    arguments = {"bbox": torch.zeros(1, 2, 4), "score": torch.zeros(1, 2), "cls": torch.ones(1, 2).long()}
    arguments |= {"thr": 0.5, "max_det": 3, "min_score": 0.0} | change
    with pytest.raises(ValueError, match=("soft_nms: expected .*" if soft else "^nms: expected .*") + message):
        soft_nms(**arguments, method="linear", sigma=0.5) if soft else nms(**arguments)


@pytest.mark.parametrize("method, sigma", [("hard", 0.5), ("gauss", 0.5), ("linear", 0.0), ("gaussian", NAN)])
def test_invalid_soft_settings_are_refused(method, sigma):
    tensors = torch.zeros(1, 2, 4), torch.zeros(1, 2), torch.ones(1, 2).long()
    with pytest.raises(ValueError, match=f"method linear or gaussian and sigma > 0, got {method} and {sigma}"):
        soft_nms(*tensors, method=method, thr=0.5, sigma=sigma, min_score=0.0, max_det=1)
