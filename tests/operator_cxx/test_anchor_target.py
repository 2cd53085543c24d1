import math

import pytest
import torch

from operator_cxx.anchor_target import pyramid_anchor_target

PAD = [-1.0] * 5
ASSIGN = {"pos_thr": 0.5, "neg_thr": 0.4, "min_pos_thr": 0.0, "allowed_border": 9999.0}


def column(x1, x2, cls=None):
    """A box of one row of pixels: IoUs are ratios of small whole numbers."""
    return [float(x1), 0.0, float(x2), 0.0] + ([] if cls is None else [float(cls)])


def assign(boxes, anchors, im_info=(100.0, 100.0, 1.0), **thresholds):
    gt_bbox, im_info = torch.tensor([boxes]), torch.tensor([im_info])
    label, delta = pyramid_anchor_target(gt_bbox, im_info, torch.tensor(anchors), **{**ASSIGN, **thresholds})
    return label[0].tolist(), delta[0]


def test_thresholds():
    # A box of ten pixels. IoUs: 10/10, 5/10 (at pos_thr), 9/20, 4/10 (at neg_thr), 3/10, 0.
    anchors = [column(0, 9), column(0, 4), column(1, 19), column(0, 3), column(0, 2), column(50, 59)]
    label, _ = assign([column(0, 9, 7), PAD], anchors)
    assert label == [7, 7, -1, -1, 0, 0]


def test_every_anchor_that_ties_for_the_best_iou_of_a_box_is_forced():
    # Box 0..9. IoUs: 3/10, 3/10, 2/10: the two best are foreground although below neg_thr.
    label, delta = assign([column(0, 9, 7)], [column(0, 2), column(7, 9), column(0, 1)])
    assert label == [7, 7, 0]
    # Anchor 0..2 has centre 1 and width 3, the box centre 4.5 and width 10.
    torch.testing.assert_close(delta[0], torch.tensor([3.5 / 3, 0.0, math.log(10 / 3), 0.0]))
    torch.testing.assert_close(delta[1], torch.tensor([-3.5 / 3, 0.0, math.log(10 / 3), 0.0]))
    assert delta[2].tolist() == [0.0] * 4


def test_of_several_boxes_that_force_an_anchor_the_last_gives_the_class():
    # Anchor 0..9 is the best for all: IoU 3/10 with the box of class 3, 2/10 with 5, 4/10 with 4.
    boxes = [column(0, 2, 3), column(8, 9, 5), column(3, 6, 4)]
    anchors = [column(0, 9), column(90, 99)]
    assert assign(boxes, anchors, neg_thr=0.5)[0] == [4, 0]
    label, delta = assign([boxes[2], boxes[0], boxes[1]], anchors, neg_thr=0.5)
    assert label == [5, 0]
    # The deltas are those to the anchor's own best box, 3..6 of class 4: centre 4.5 and width 4.
    torch.testing.assert_close(delta[0], torch.tensor([0.0, 0.0, math.log(0.4), 0.0]))


def test_at_pos_thr_the_anchors_own_best_box_decides_over_a_box_that_forces_it():
    # Anchor 0..9: IoU 5/10 with class 3, 2/10 with class 5, for which it is the best there is.
    label, delta = assign([column(0, 4, 3), column(8, 9, 5)], [column(0, 9)])
    assert label == [3]
    torch.testing.assert_close(delta[0], torch.tensor([-0.25, 0.0, math.log(0.5), 0.0]))


def test_of_equal_best_boxes_the_first_gives_class_and_deltas():
    boxes = [column(0, 4, 3), column(5, 9, 5)]  # IoU 5/10 with the anchor 0..9, each
    label, delta = assign(boxes, [column(0, 9)])
    assert label == [3]
    assert delta[0, 0] == pytest.approx((2.0 - 4.5) / 10)
    label, delta = assign(boxes[::-1], [column(0, 9)])
    assert label == [5]
    assert delta[0, 0] == pytest.approx((7.0 - 4.5) / 10)


def test_a_forced_anchor_learns_the_place_of_its_own_best_box():
    # IoUs with 7: 7/10, 10/20, 6/24; with 8: 0, 0, 4/26. The third is the best for 8, but 7 is its own best.
    boxes = [column(0, 9, 7), column(20, 29, 8)]
    label, delta = assign(boxes, [column(0, 6), column(0, 19), column(4, 23)], pos_thr=0.6)
    assert label == [7, -1, 8]
    torch.testing.assert_close(delta[2], torch.tensor([-9 / 20, 0.0, math.log(0.5), 0.0]))


def test_a_box_forces_no_anchor_below_min_pos_thr():
    boxes, anchors = [column(0, 9, 7)], [column(0, 2), column(0, 1)]
    assert assign(boxes, anchors, min_pos_thr=0.3)[0] == [7, 0]  # IoU 3/10, at the threshold
    assert assign(boxes, anchors, min_pos_thr=0.31)[0] == [0, 0]


def test_a_box_that_overlaps_nothing_forces_nothing():
    assert assign([column(50, 59, 7)], [column(0, 9), column(10, 19)])[0] == [0, 0]


def test_anchors_beyond_the_allowed_border_are_ignored_and_are_no_boxs_best():
    # An image 4 pixels high and 20 wide; a border of 2 allows x1, y1 >= -2, x2 < 22 and y2 < 6.
    anchors = [
        [-2.0, -2.0, 21.0, 5.0],
        [-2.5, 0.0, 9.0, 3.0],
        [0.0, -2.5, 9.0, 3.0],
        [10.0, 0.0, 22.0, 3.0],
        [0.0, 0.0, 9.0, 6.0],
        [0.0, 0.0, 3.0, 3.0],
    ]
    box = [
        -2.5,
        0.0,
        9.0,
        3.0,
        7.0,
    ]  # anchor 1 exactly; of those inside, the last has IoU 16/50, the first 48/194
    label, delta = assign([box], anchors, im_info=(4.0, 20.0, 1.0), allowed_border=2.0)
    assert label == [0, -1, -1, -1, -1, 7]
    assert delta[1].tolist() == [0.0] * 4


def test_an_image_without_boxes_is_background_where_anchors_are_inside():
    anchors = [column(0, 9), column(-20, 9)]
    label, delta = assign([PAD, PAD], anchors, allowed_border=10.0)
    assert label == [0, -1]
    assert delta.tolist() == [[0.0] * 4] * 2
    gt_bbox = torch.zeros(2, 0, 5)
    label, _ = pyramid_anchor_target(gt_bbox, torch.ones(2, 3), torch.tensor(anchors), **ASSIGN)
    assert label.tolist() == [[0, 0], [0, 0]]


def test_padding_rows_overlap_nothing_and_images_do_not_mix():
    # The first anchor is what a padding row would be if it were a box.
    anchors = torch.tensor([[-1.0, -1.0, -1.0, -1.0], column(20, 29)])
    gt_bbox = torch.tensor([[PAD, column(20, 29, 2)], [column(20, 24, 3), PAD]])
    label, delta = pyramid_anchor_target(gt_bbox, torch.full((2, 3), 100.0), anchors, **ASSIGN)
    assert label.tolist() == [[0, 2], [0, 3]]
    assert delta[0, 1].tolist() == [0.0] * 4
    torch.testing.assert_close(delta[1, 1], torch.tensor([-0.25, 0.0, math.log(0.5), 0.0]))


def slow_assign(box, anchors, info, pos_thr, neg_thr, min_pos_thr, border):
    """The rules anchor by anchor and box by box, in Python floats."""

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


@pytest.mark.parametrize("seed", range(20))
def test_against_the_rules_taken_one_by_one(seed):
    random = torch.Generator().manual_seed(seed)

    def boxes(count):  # corners on a coarse grid, so that ties are common
        low = torch.randint(-2, 8, (count, 2), generator=random) * 4.0
        return torch.cat([low, low + torch.randint(1, 5, (count, 2), generator=random) * 4.0 - 1], 1).double()

    anchors, box = boxes(60), boxes(6)
    box = torch.cat([box, torch.randint(1, 9, (6, 1), generator=random)], 1)
    setting = (0.5, 0.3, 0.1, 4.0)
    gt_bbox = torch.cat([box, torch.full((3, 5), -1.0)])[None]
    label, _ = pyramid_anchor_target(
        gt_bbox,
        torch.tensor([[24.0, 32.0, 1.0]]),
        anchors,
        **dict(zip(("pos_thr", "neg_thr", "min_pos_thr", "allowed_border"), setting, strict=True)),
    )
    assert label[0].tolist() == slow_assign(box.tolist(), anchors.tolist(), (24.0, 32.0), *setting)


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
