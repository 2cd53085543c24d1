import pytest
import torch

from operator_cxx.box import inclusive_area, inclusive_iou
from operator_cxx.nms import multiclass_nms


def nms(boxes, scores, classes, thr=0.5, max_det=100):
    bbox = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    return multiclass_nms(bbox, torch.tensor(scores), torch.tensor(classes), thr=thr, max_det=max_det).tolist()


def row(x1, x2):
    return [x1, 0, x2, 0]


def test_an_iou_at_the_threshold_stays_and_one_above_goes():
    # With 0..9: 5/10 at the threshold, 6/10 above it.
    assert nms([row(0, 9), row(0, 4)], [0.9, 0.8], [1, 1]) == [0, 1]
    assert nms([row(0, 9), row(0, 5)], [0.9, 0.8], [1, 1]) == [0]


def test_classes_do_not_suppress_each_other():
    assert nms([row(0, 9), row(0, 9), row(0, 9)], [0.7, 0.9, 0.8], [1, 2, 1]) == [1, 2]


def test_a_suppressed_box_suppresses_nothing():
    # 0..9, 3..12 and 6..15: neighbours have IoU 7/13, the outer two 4/16.
    assert nms([row(6, 15), row(3, 12), row(0, 9)], [0.7, 0.8, 0.9], [1, 1, 1]) == [2, 0]


def test_equal_scores_go_by_index():
    assert nms([row(0, 9), row(0, 9), row(20, 29)], [0.5, 0.5, 0.5], [1, 1, 1]) == [0, 2]
    assert nms([row(20, 29), row(0, 9), row(0, 9)], [0.5, 0.5, 0.5], [1, 1, 1], max_det=1) == [0]


def test_max_det_keeps_the_best_of_all_classes():
    boxes = [row(10 * i, 10 * i + 5) for i in range(4)]
    assert nms(boxes, [0.1, 0.4, 0.3, 0.2], [1, 2, 3, 1], max_det=3) == [1, 2, 3]


def test_no_boxes():
    kept = multiclass_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), thr=0.5, max_det=100)
    assert kept.shape == (0,)
    assert kept.dtype == torch.int64


def slow_nms(bbox, score, cls, thr, max_det):
    """Box by box, as the definition reads."""
    area = inclusive_area(bbox)
    above = (inclusive_iou(bbox[:, None], area[:, None], bbox, area) > thr).tolist()
    score, cls = score.tolist(), cls.tolist()
    kept = []
    for i in sorted(range(len(bbox)), key=lambda i: (-score[i], i)):
        if not any(above[k][i] and cls[k] == cls[i] for k in kept):
            kept.append(i)
    return kept[:max_det]


@pytest.mark.parametrize("num_class, max_det", [(1, 2000), (5, 2000), (5, 150)])
def test_against_the_definition_over_several_blocks(num_class, max_det):
    random = torch.Generator().manual_seed(num_class)
    count = 700
    corner = torch.rand(count, 2, generator=random) * 200
    bbox = torch.cat([corner, corner + torch.rand(count, 2, generator=random) * 60], dim=1)
    score = torch.randint(0, 300, (count,), generator=random) / 300  # many equal scores
    cls = torch.randint(1, num_class + 1, (count,), generator=random)
    kept = multiclass_nms(bbox, score, cls, thr=0.3, max_det=max_det).tolist()
    assert kept == slow_nms(bbox, score, cls, 0.3, max_det)
    assert len(kept) < count


def test_a_chain_longer_than_a_block():
    # Every box overlaps the next by 7/13 and none further: every second one stays.
    boxes = [row(3 * i, 3 * i + 9) for i in range(600)]
    assert nms(boxes, [1 - i / 1000 for i in range(600)], [1] * 600, max_det=1000) == list(range(0, 600, 2))


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"cls \(M,\), got \(2, 4\), \(2,\) and \(3,\)"):
        multiclass_nms(torch.zeros(2, 4), torch.zeros(2), torch.zeros(3), thr=0.5, max_det=1)
