import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from operator_cxx import library
from operator_cxx.anchor_target import pyramid_anchor_target
from operator_cxx.reference import anchor_target as reference

KERNELS = ["compiled", "emulated"] + ["cuda"] * torch.cuda.is_available()
PAD = [-1.0] * 5
ASSIGN = {"pos_thr": 0.5, "neg_thr": 0.4, "min_pos_thr": 0.0, "allowed_border": 9999.0}


def column(x1, x2, cls=None):
    """Return a box that is one pixel high, so that IoUs are ratios of small integers."""
    return [float(x1), 0.0, float(x2), 0.0] + ([] if cls is None else [float(cls)])


def assign(device, boxes, anchors, im_info=(100.0, 100.0, 1.0), **thresholds):
    gt_bbox, im_info = torch.tensor([boxes], device=device), torch.tensor([im_info], device=device)
    anchors = torch.tensor(anchors, device=device)
    label, delta = pyramid_anchor_target(gt_bbox, im_info, anchors, **{**ASSIGN, **thresholds})
    return label[0].tolist(), delta[0].cpu()


def test_thresholds(device):
    # A box of ten pixels. IoUs: 10/10, 5/10 (at pos_thr), 9/20, 4/10 (at neg_thr), 3/10, 0.
    anchors = [column(0, 9), column(0, 4), column(1, 19), column(0, 3), column(0, 2), column(50, 59)]
    label, _ = assign(device, [column(0, 9, 7), PAD], anchors)
    assert label == [7, 7, -1, -1, 0, 0]


def test_every_anchor_that_ties_for_the_best_iou_of_a_box_is_forced(device):
    # Box 0..9. IoUs: 3/10, 3/10, 2/10: the two best are foreground although below neg_thr.
    label, delta = assign(device, [column(0, 9, 7)], [column(0, 2), column(7, 9), column(0, 1)])
    assert label == [7, 7, 0]
    # Anchor 0..2 has centre 1 and width 3, the box centre 4.5 and width 10.
    torch.testing.assert_close(delta[0], torch.tensor([3.5 / 3, 0.0, math.log(10 / 3), 0.0]))
    torch.testing.assert_close(delta[1], torch.tensor([-3.5 / 3, 0.0, math.log(10 / 3), 0.0]))
    assert delta[2].tolist() == [0.0] * 4


def test_of_several_boxes_that_force_an_anchor_the_last_gives_the_class(device):
    # Anchor 0..9 is the best for all: IoU 3/10 with the box of class 3, 2/10 with 5, 4/10 with 4.
    boxes = [column(0, 2, 3), column(8, 9, 5), column(3, 6, 4)]
    anchors = [column(0, 9), column(90, 99)]
    assert assign(device, boxes, anchors, neg_thr=0.5)[0] == [4, 0]
    label, delta = assign(device, [boxes[2], boxes[0], boxes[1]], anchors, neg_thr=0.5)
    assert label == [5, 0]
    # The deltas are those to the anchor's own best box, 3..6 of class 4: centre 4.5 and width 4.
    torch.testing.assert_close(delta[0], torch.tensor([0.0, 0.0, math.log(0.4), 0.0]))


def test_at_pos_thr_the_anchors_own_best_box_decides_over_a_box_that_forces_it(device):
    # Anchor 0..9: IoU 5/10 with class 3, 2/10 with class 5, whose best anchor it is.
    label, delta = assign(device, [column(0, 4, 3), column(8, 9, 5)], [column(0, 9)])
    assert label == [3]
    torch.testing.assert_close(delta[0], torch.tensor([-0.25, 0.0, math.log(0.5), 0.0]))


def test_of_equal_best_boxes_the_first_gives_class_and_deltas(device):
    boxes = [column(0, 4, 3), column(5, 9, 5)]  # IoU 5/10 with the anchor 0..9, each
    label, delta = assign(device, boxes, [column(0, 9)])
    assert label == [3]
    assert delta[0, 0] == pytest.approx((2.0 - 4.5) / 10)
    label, delta = assign(device, boxes[::-1], [column(0, 9)])
    assert label == [5]
    assert delta[0, 0] == pytest.approx((7.0 - 4.5) / 10)


def test_a_forced_anchor_has_the_deltas_to_its_own_best_box(device):
    # IoUs with 7: 7/10, 10/20, 6/24; with 8: 0, 0, 4/26. The third is the best for 8, but 7 is its own best.
    boxes = [column(0, 9, 7), column(20, 29, 8)]
    label, delta = assign(device, boxes, [column(0, 6), column(0, 19), column(4, 23)], pos_thr=0.6)
    assert label == [7, -1, 8]
    torch.testing.assert_close(delta[2], torch.tensor([-9 / 20, 0.0, math.log(0.5), 0.0]))


def test_a_box_forces_no_anchor_below_min_pos_thr(device):
    boxes, anchors = [column(0, 9, 7)], [column(0, 2), column(0, 1)]
    assert assign(device, boxes, anchors, min_pos_thr=0.3)[0] == [7, 0]  # IoU 3/10, at the threshold
    assert assign(device, boxes, anchors, min_pos_thr=0.31)[0] == [0, 0]


def test_a_box_that_overlaps_nothing_forces_nothing(device):
    assert assign(device, [column(50, 59, 7)], [column(0, 9), column(10, 19)])[0] == [0, 0]


def test_anchors_beyond_the_allowed_border_are_ignored_and_are_no_boxs_best(device):
    # An image 4 pixels high and 20 wide; a border of 2 allows x1, y1 >= -2, x2 < 22 and y2 < 6.
    anchors = [
        [-2.0, -2.0, 21.0, 5.0],
        [-2.5, 0.0, 9.0, 3.0],
        [0.0, -2.5, 9.0, 3.0],
        [10.0, 0.0, 22.0, 3.0],
        [0.0, 0.0, 9.0, 6.0],
        [0.0, 0.0, 3.0, 3.0],
    ]
    # Anchor 1 exactly; of those inside, the last has IoU 16/50, the first 48/194.
    box = [-2.5, 0.0, 9.0, 3.0, 7.0]
    label, delta = assign(device, [box], anchors, im_info=(4.0, 20.0, 1.0), allowed_border=2.0)
    assert label == [0, -1, -1, -1, -1, 7]
    assert delta[1].tolist() == [0.0] * 4


def test_an_image_without_boxes_is_background_where_anchors_are_inside(device):
    anchors = [column(0, 9), column(-20, 9)]
    label, delta = assign(device, [PAD, PAD], anchors, allowed_border=10.0)
    assert label == [0, -1]
    assert delta.tolist() == [[0.0] * 4] * 2
    gt_bbox, im_info = torch.zeros(2, 0, 5, device=device), torch.ones(2, 3, device=device)
    label, _ = pyramid_anchor_target(gt_bbox, im_info, torch.tensor(anchors, device=device), **ASSIGN)
    assert label.tolist() == [[0, 0], [0, 0]]


def test_padding_rows_overlap_nothing_and_images_do_not_mix(device):
    # The first anchor is what a padding row would be if it were a box.
    anchors = torch.tensor([[-1.0, -1.0, -1.0, -1.0], column(20, 29)], device=device)
    gt_bbox = torch.tensor([[PAD, column(20, 29, 2)], [column(20, 24, 3), PAD]], device=device)
    label, delta = pyramid_anchor_target(gt_bbox, torch.full((2, 3), 100.0, device=device), anchors, **ASSIGN)
    assert label.tolist() == [[0, 2], [0, 3]]
    assert delta[0, 1].tolist() == [0.0] * 4
    torch.testing.assert_close(delta[1, 1].cpu(), torch.tensor([-0.25, 0.0, math.log(0.5), 0.0]))


def test_anchors_far_apart_tie_for_a_box(device):
    # Kernels process anchors in tiles. The best IoU of the second box, 3/10, occurs in three of them. That of the first
    # box is 9/10 in one tile and 3/10 in another.
    anchors = [column(90, 99)] * 1100
    anchors[3] = anchors[300] = anchors[1099] = column(40, 42)
    anchors[5], anchors[700] = column(0, 2), column(0, 8)
    label, _ = assign(device, [column(0, 9, 3), PAD, column(40, 49, 5)], anchors, pos_thr=0.95)
    assert {i: cls for i, cls in enumerate(label) if cls != 0} == {3: 5, 300: 5, 700: 3, 1099: 5}


def test_many_boxes(device):
    # More boxes than kernels load at a time, alternating with padding. Each forces its own anchor, at 9/9 to 4/9.
    boxes = [row for x in range(150) for row in (column(10 * x, 10 * x + 8, x % 80 + 1), PAD)]
    anchors = [column(10 * x, 10 * x + 8 - x // 25) for x in range(150)]
    assert assign(device, boxes, anchors, pos_thr=1.5)[0] == [x % 80 + 1 for x in range(150)]
    # An anchor that covers all has IoU 9/1500 with each: the first is its best box, the last forces it.
    label, delta = assign(device, boxes, [column(0, 1499)])
    assert label == [149 % 80 + 1]
    torch.testing.assert_close(delta, torch.tensor([[(4 - 749.5) / 1500, 0.0, math.log(9 / 1500), 0.0]]))


def test_nan(device):
    # A box with NaN forces nothing; its IoU with every anchor is NaN, which is neither background nor foreground.
    nan = [0.0, 0.0, math.nan, 0.0, 4.0]
    anchors = [column(0, 9), column(0, 2), column(50, 59)]
    assert assign(device, [nan], anchors)[0] == [-1, -1, -1]
    label, delta = assign(device, [column(0, 9, 7), nan], anchors)
    assert label == [7, -1, -1]  # forced by the first box
    assert delta[0].tolist() == [0.0] * 4  # its best box before the NaN
    # An anchor with NaN keeps every box from forcing.
    assert assign(device, [column(0, 9, 7)], [*anchors, column(0, math.nan)])[0] == [7, 0, 0, -1]
    assert assign(device, [column(0, 9, 7)], [*anchors[1:], column(0, math.nan)])[0] == [0, 0, -1]
    # A class that is NaN is padding, and an image whose size is NaN has no anchors.
    assert assign(device, [column(0, 9, math.nan)], anchors)[0] == [0, 0, 0]
    assert assign(device, [column(0, 9, 7)], anchors, im_info=(math.nan, 100.0, 1.0))[0] == [-1, -1, -1]


def test_inverted_boxes_have_a_nan_iou_where_the_areas_cancel(device):
    # Areas 10 and (-2) * 5 = -10: 0/0, although they are apart; with the anchor 0..8 it is 0/-1.
    turned = [20.0, 30.0, 17.0, 34.0]
    assert assign(device, [[*turned, 7.0]], [column(0, 9), column(0, 8)])[0] == [-1, 0]
    assert assign(device, [column(0, 9, 7)], [turned])[0] == [-1]


def test_infinite_sides(device):
    # The whole plane with ten pixels: 10/inf. Two boxes that extend infinitely to the left: inf/inf or, if they are
    # apart, (inf * 0)/inf.
    assert assign(device, [[-math.inf, -math.inf, math.inf, math.inf, 7.0]], [column(0, 9)])[0] == [0]
    endless = [[-math.inf, 0.0, 9.0, 9.0, 7.0]]
    assert assign(device, endless, [[-math.inf, 0.0, 9.0, 9.0]], allowed_border=math.inf)[0] == [-1]
    assert assign(device, endless, [[-math.inf, 50.0, 9.0, 59.0]], allowed_border=math.inf)[0] == [-1]
    # Sides whose area overflows: 10/inf.
    assert assign(device, [[-1e30, -1e30, 1e30, 1e30, 7.0]], [column(0, 9)])[0] == [0]


def test_without_any_overlap_the_first_box_is_the_best(device):
    # This shows at pos_thr 0. The anchor 0..9 has its centre 50 left of the box's, which is as wide.
    label, delta = assign(device, [PAD, column(50, 59, 7), column(70, 79, 8)], [column(0, 9)], pos_thr=0.0)
    assert label == [7]
    assert delta.tolist() == [[5.0, 0.0, 0.0, 0.0]]


def test_nothing_to_do(device):
    for N, G, K in ((0, 3, 4), (2, 3, 0), (2, 0, 0), (0, 0, 0)):
        inputs = torch.ones(N, G, 5, device=device), torch.ones(N, 3, device=device), torch.ones(K, 4, device=device)
        label, delta = pyramid_anchor_target(*inputs, **ASSIGN)
        assert (label.shape, delta.shape) == ((N, K), (N, K, 4))


def slow_assign(box, anchors, info, pos_thr, neg_thr, min_pos_thr, border):
    """Apply the rules anchor by anchor and box by box, in Python floats."""

    def overlap(a, b):
        w = min(a[2], b[2]) - max(a[0], b[0]) + 1
        h = min(a[3], b[3]) - max(a[1], b[1]) + 1
        inter = max(w, 0) * max(h, 0)
        areas = [(x[2] - x[0] + 1) * (x[3] - x[1] + 1) for x in (a, b)]
        return inter / (sum(areas) - inter)

    inside = [
        a[0] >= -border and a[1] >= -border and a[2] < info[1] + border and a[3] < info[0] + border for a in anchors
    ]
    table = [[overlap(a, b) if ok else -1 for b in box] for a, ok in zip(anchors, inside, strict=True)]
    label = []
    for i, row in enumerate(table):
        best = max(row)
        answer = 0 if best < neg_thr else -1
        for g, b in enumerate(box):
            top = max(r[g] for r in table)
            if top > 0 and top >= min_pos_thr and row[g] == top:
                answer = b[4]
        if best >= pos_thr:
            answer = box[row.index(best)][4]
        label.append(answer if inside[i] else -1)
    return label


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(20))
def test_against_the_rules_taken_one_by_one(device, seed, dtype):
    random = torch.Generator().manual_seed(seed)

    def boxes(count):  # corners on a coarse grid, so that ties are common
        low = torch.randint(-2, 8, (count, 2), generator=random) * 4.0
        return torch.cat([low, low + torch.randint(1, 5, (count, 2), generator=random) * 4.0 - 1], 1).to(dtype)

    anchors, box = boxes(60), boxes(6)
    box = torch.cat([box, torch.randint(1, 9, (6, 1), generator=random)], 1)
    setting = (0.5, 0.3, 0.1, 4.0)
    gt_bbox = torch.cat([box, torch.full((3, 5), -1.0)])[torch.randperm(9, generator=random)]
    label, _ = pyramid_anchor_target(
        gt_bbox[None].to(device),
        torch.tensor([[24.0, 32.0, 1.0]], device=device),
        anchors.to(device),
        **dict(zip(("pos_thr", "neg_thr", "min_pos_thr", "allowed_border"), setting, strict=True)),
    )
    box = gt_bbox[gt_bbox[:, 4] >= 1]
    assert label[0].tolist() == slow_assign(box.tolist(), anchors.tolist(), (24.0, 32.0), *setting)


def example(device, N=3, G=9, K=700, seed=0):
    """Return boxes with padding, image sizes, and unordered anchors of many sizes."""
    random = torch.Generator().manual_seed(seed)

    def boxes(count):
        low = torch.rand(count, 2, generator=random) * 120 - 10
        return torch.cat([low, low + 2 ** (torch.rand(count, 2, generator=random) * 6)], 1)

    cls = torch.randint(-1, 6, (N * G, 1), generator=random)
    gt_bbox = torch.cat([boxes(N * G), cls], 1).reshape(N, G, 5)
    im_info = torch.tensor([[120.0, 90.0, 1.0]]) - torch.arange(N)[:, None]
    return gt_bbox.to(device), im_info.to(device), boxes(K).to(device)


def assert_as_reference(gt_bbox, im_info, anchors, **thresholds):
    options = {**ASSIGN, **thresholds}
    label, delta = pyramid_anchor_target(gt_bbox, im_info, anchors, **options)
    expected_label, expected_delta = reference.pyramid_anchor_target(gt_bbox, im_info, anchors, **options)
    assert torch.equal(label, expected_label)
    torch.testing.assert_close(delta, expected_delta, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("device", KERNELS, indirect=True)
@pytest.mark.parametrize("border", [9999.0, 0.0, -20.0])
def test_kernels_agree_with_the_reference(device, border):
    for seed, K in enumerate([1, 255, 256, 257, 1500]):
        assert_as_reference(*example(device, K=K, seed=seed), allowed_border=border, pos_thr=0.4, neg_thr=0.3)


SPECIAL = st.sampled_from([math.nan, math.inf, -math.inf, 3e38, -3e38, -0.0, 1e-30])
SIDE = st.integers(-8, 24).map(float) | st.floats(-8, 24, width=32) | SPECIAL
BOX = st.tuples(SIDE, SIDE, SIDE, SIDE)
CLASS = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, math.inf, math.nan])
THRESHOLD = st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, math.nan])


@pytest.mark.parametrize("device", KERNELS, indirect=True)
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    box=st.lists(st.tuples(BOX, CLASS), max_size=6),
    anchors=st.lists(BOX, min_size=1, max_size=8),
    far=st.sampled_from([0, 1, 255, 520]),
    size=st.just((110.0, 110.0)) | st.tuples(SIDE, SIDE),
    thresholds=st.tuples(THRESHOLD, THRESHOLD, THRESHOLD),
    border=st.sampled_from([0.0, 4.0, 9999.0, math.inf]),
)
def test_a_search_for_disagreement_with_the_reference(device, box, anchors, far, size, thresholds, border):
    gt_bbox = torch.tensor([[*xyxy, cls] for xyxy, cls in box], device=device).reshape(1, -1, 5)
    between = [(100.0, 100.0, 109.0, 109.0)] * far  # puts the first and the last anchors in different tiles
    assert_as_reference(
        gt_bbox,
        torch.tensor([[*size, 1.0]], device=device),
        torch.tensor([*anchors, *between, *anchors[::-1]], device=device),
        **dict(zip(("pos_thr", "neg_thr", "min_pos_thr"), thresholds, strict=True)),
        allowed_border=border,
    )


def test_any_layout_and_any_type_of_the_boxes(device):
    gt_bbox, im_info, anchors = example(device)
    gt_bbox = gt_bbox.half().float()
    label, delta = pyramid_anchor_target(gt_bbox, im_info, anchors, **ASSIGN)
    for boxes, info, laid in (
        (gt_bbox.transpose(0, 1).contiguous().transpose(0, 1), im_info.t().contiguous().t(), anchors),
        (gt_bbox.half(), im_info.double(), anchors.t().contiguous().t()),
        (gt_bbox.double(), im_info.long(), torch.stack([anchors, anchors], 1).flatten(0, 1)[::2]),
        (gt_bbox.clone().requires_grad_(), im_info, anchors.clone().requires_grad_()),
    ):
        again = pyramid_anchor_target(boxes, info, laid, **ASSIGN)
        assert torch.equal(again[0], label)
        assert torch.equal(again[1], delta)
        assert not again[1].requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_anchors_of_other_types(device, dtype):
    inputs = [tensor.to(dtype) for tensor in example(device)]
    label, delta = pyramid_anchor_target(*inputs, **ASSIGN)
    assert label.dtype == delta.dtype == dtype
    assert set(label.flatten().tolist()) == {-1, 0, 1, 2, 3, 4, 5}


def test_the_threads_change_no_bit():
    inputs = example("cpu", K=5000)
    results = []
    for threads in (2, 5, 1):
        torch.set_num_threads(threads)
        results.append(pyramid_anchor_target(*inputs, **ASSIGN))
    for label, delta in results[1:]:
        assert torch.equal(label, results[0][0])
        assert torch.equal(delta, results[0][1])


def test_from_many_threads_at_once(device):
    inputs = example(device)
    label, delta = pyramid_anchor_target(*inputs, **ASSIGN)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: pyramid_anchor_target(*inputs, **ASSIGN), range(32)))
    assert all(torch.equal(result[0], label) and torch.equal(result[1], delta) for result in results)


@pytest.mark.parametrize("device", KERNELS, indirect=True)
def test_scratch_memory_is_small(device):
    # At 1280 x 1280 with 100 boxes the table of all IoUs would be 123 MB.
    kernels = library.loaded[device.type]
    anchors = torch.empty(0, device=device)
    assert 0 < kernels.workspace("anchor_target", anchors, 1, 100, 306900).nbytes < 2e6
    assert kernels.workspace("anchor_target", anchors, 2, 0, 306900).nbytes == 0


def test_tracing():
    inputs = example("cpu")
    torch.library.opcheck(torch.ops.necklace.anchor_target.default, (*inputs, 0.5, 0.4, 0.0, 0.0))
    compiled = torch.compile(
        lambda *tensors: pyramid_anchor_target(*tensors, **ASSIGN), fullgraph=True, backend="aot_eager"
    )
    assert all(map(torch.equal, compiled(*inputs), pyramid_anchor_target(*inputs, **ASSIGN)))


def test_export():
    class Target(torch.nn.Module):
        def forward(self, gt_bbox, im_info, anchors):
            return pyramid_anchor_target(gt_bbox, im_info, anchors, **ASSIGN)

    inputs = example("cpu")
    program = torch.export.export(Target(), inputs)
    assert all(map(torch.equal, program.module()(*inputs), Target()(*inputs)))


@pytest.mark.parametrize(
    "gt_bbox, im_info, anchors, message",
    [
        ((1, 3, 4), (1, 3), (2, 4), r"expected gt_bbox \(N, G, 5\).*got \(1, 3, 4\)"),
        ((2, 3, 5), (1, 3), (2, 4), r"im_info \(N, 3\), got \(2, 3, 5\) and \(1, 3\)"),
        ((1, 3, 5), (1, 3), (2, 5), r"expected anchors \(K, 4\), got \(2, 5\)"),
    ],
)
def test_wrong_shapes_are_named(gt_bbox, im_info, anchors, message):
    with pytest.raises(ValueError, match=message):
        pyramid_anchor_target(torch.ones(gt_bbox), torch.ones(im_info), torch.ones(anchors), **ASSIGN)


def test_integer_anchors_or_anchors_on_another_device_are_refused():
    boxes = torch.ones(1, 1, 5), torch.ones(1, 3)
    with pytest.raises(ValueError, match=r"expected anchors of a floating-point type, got torch\.int64"):
        pyramid_anchor_target(*boxes, torch.ones(2, 4, dtype=torch.int64), **ASSIGN)
    with pytest.raises(ValueError, match="on one device, got gt_bbox on cpu, im_info on cpu, anchors on meta"):
        pyramid_anchor_target(*boxes, torch.ones(2, 4, device="meta"), **ASSIGN)
