import math
from pathlib import Path

import numpy as np
import pytest
import torch

from operator_cxx.anchor import base_anchors, grid_anchors
from operator_cxx.nms import multiclass_nms
from operator_cxx.retina_decode import retina_decode

GOLDEN = Path(__file__).parents[1] / "golden"
SCALES = (4.0, 4.0 * 2 ** (1 / 3), 4.0 * 2 ** (2 / 3))


def golden_candidates():
    """(M, 6) rows of box, score and class, as the golden case has them."""
    golden = np.load(GOLDEN / "decode_256.npz")
    rows = []
    for stride in (8, 16, 32, 64, 128):
        prob = torch.from_numpy(golden[f"cls_prob_stride{stride}"])
        anchors = grid_anchors(*prob.shape[2:], stride, base_anchors(stride, SCALES, (0.5, 1.0, 2.0)))
        box, score, cls = retina_decode(
            prob,
            torch.from_numpy(golden[f"bbox_delta_stride{stride}"]),
            torch.from_numpy(golden["im_info"])[None],
            anchors,
            pre_nms_top_n=int(golden["pre_nms_top_n"]),
            thresh=0.0 if stride == 128 else float(golden["min_det_score"]),
            num_anchors=9,
        )
        row = torch.cat([box[0], score[0, :, None], cls[0, :, None]], dim=1)
        rows.append(row[score[0] > 0])
    return golden, torch.cat(rows)


def sorted_rows(rows):
    """Rows in an order that does not depend on the order of rows."""
    return rows[np.lexsort((rows[:, 0], rows[:, 5], rows[:, 4]))]


def test_candidates_of_the_original():
    golden, rows = golden_candidates()
    expected, rows = sorted_rows(golden["candidates"]), sorted_rows(rows.numpy())
    assert rows.shape == expected.shape
    np.testing.assert_array_equal(rows[:, 4:], expected[:, 4:])
    np.testing.assert_allclose(rows[:, :4], expected[:, :4], rtol=0, atol=1e-3)


def test_detections_of_the_original():
    golden, rows = golden_candidates()
    thr, max_det = float(golden["nms_thr"]), int(golden["max_det_per_image"])
    kept = multiclass_nms(rows[:, :4], rows[:, 4], rows[:, 5], thr=thr, max_det=max_det)
    np.testing.assert_array_equal(rows[kept, 4:].numpy(), golden["detections"][:, 4:])
    np.testing.assert_allclose(rows[kept, :4].numpy(), golden["detections"][:, :4], rtol=0, atol=1e-3)


def decode(prob, delta=None, anchors=None, im_info=(100.0, 100.0, 1.0), *, A=1, top_n=5, thresh=0.05):
    prob = torch.tensor(prob)
    N, _, H, W = prob.shape
    delta = torch.zeros(N, 4 * A, H, W) if delta is None else delta
    if anchors is None:  # a different box for every row
        anchors = torch.arange(H * W * A)[:, None] + torch.tensor([0.0, 0.0, 9.0, 9.0])
    info = torch.tensor([im_info]).expand(N, 3)
    return retina_decode(prob, delta, info, anchors, pre_nms_top_n=top_n, thresh=thresh, num_anchors=A)


def test_channels_are_anchor_major_and_anchor_rows_have_the_anchor_fastest():
    prob = np.zeros((1, 2 * 3, 2, 4), np.float32)  # A = 2, C = 3, H = 2, W = 4
    prob[0, 1 * 3 + 2, 1, 3] = 0.9  # anchor 1, class 3, last cell: row (1 * 4 + 3) * 2 + 1 = 15
    prob[0, 0 * 3 + 1, 0, 2] = 0.8  # anchor 0, class 2, row 2 * 2 = 4
    delta = torch.zeros(1, 2, 4, 2, 4)
    delta[0, 1, 0, 1, 3] = 0.5  # dx of the first: 5 pixels
    delta[0, 0, 3, 0, 2] = math.log(2)  # dh of the second: 20 pixels about the centre 8.5
    bbox, score, cls = decode(prob, delta.reshape(1, 8, 2, 4), A=2, top_n=3)
    torch.testing.assert_close(bbox[0], torch.tensor([[20.0, 15.0, 29.0, 24.0], [4.0, 0.0, 13.0, 18.0], [0.0] * 4]))
    assert score[0].tolist() == pytest.approx([0.9, 0.8, 0.0])
    assert cls[0].tolist() == [3, 2, 0]
    assert cls.dtype == torch.int64


def test_boxes_are_clipped_to_each_image():
    anchors = torch.tensor([[-5.0, -6.0, 50.0, 60.0]])
    prob, delta = torch.full((2, 1, 1, 1), 0.5), torch.zeros(2, 4, 1, 1)
    info = torch.tensor([[40.0, 30.0, 1.0], [61.0, 51.0, 1.0]])
    bbox, _, _ = retina_decode(prob, delta, info, anchors, pre_nms_top_n=1, thresh=0.0, num_anchors=1)
    assert bbox[:, 0].tolist() == [[0.0, 0.0, 29.0, 39.0], [0.0, 0.0, 50.0, 60.0]]


def test_width_and_height_are_capped():
    anchors = torch.tensor([[0.0, 0.0, 15.0, 15.0]])
    bbox, _, _ = decode([[[[0.5]]]], torch.full((1, 4, 1, 1), 50.0), anchors, (5e3, 5e3, 1.0))
    assert bbox[0, 0].tolist() == pytest.approx([308.0, 308.0, 1307.0, 1307.0])  # centre 7.5 + 800, 1000 wide


def test_only_scores_above_the_threshold_are_candidates():
    bbox, score, cls = decode([[[[0.25, 0.250001, 0.0, 0.5]]]], thresh=0.25)
    assert score[0].tolist() == pytest.approx([0.5, 0.250001, 0, 0, 0])
    assert cls[0].tolist() == [1, 1, 0, 0, 0]
    assert bbox[0, 2:].count_nonzero() == 0
    assert decode([[[[0.0, 1e-30]]]], thresh=0.0)[2][0].tolist() == [1, 0, 0, 0, 0]


def test_equal_scores_keep_their_order_in_anchor_class_row_column():
    # A = 2, C = 2, one row of three columns: 0.5 twice, then the first two of four 0.25 in (A, C, H, W).
    prob = [[[[0.25, 0.5, 0.0]], [[0.0, 0.0, 0.25]], [[0.25, 0.0, 0.0]], [[0.0, 0.5, 0.25]]]]
    bbox, score, cls = decode(prob, A=2, top_n=4)
    assert score[0].tolist() == [0.5, 0.5, 0.25, 0.25]
    assert cls[0].tolist() == [1, 2, 1, 2]
    assert bbox[0, :, 0].tolist() == [2.0, 3.0, 0.0, 4.0]  # anchor rows: column * 2 + anchor


@pytest.mark.parametrize("top_n", [1, 70, 500, 5000])
def test_order_over_many_groups_of_few_different_scores(top_n):
    random = torch.Generator().manual_seed(top_n)
    prob = torch.randint(0, 6, (2, 3, 20, 37), generator=random) / 5  # A = 3, C = 1
    prob[:, :, :, :15] *= 0.1  # whole groups without a candidate
    _, score, cls = decode(prob.tolist(), A=3, top_n=top_n, thresh=0.2)
    bbox, _, _ = decode(prob.tolist(), A=3, top_n=top_n, thresh=0.2, im_info=(1e5, 1e5, 1.0))
    for n in range(2):
        flat = prob[n].flatten()
        order = torch.sort(flat, descending=True, stable=True).indices
        order = order[flat[order] > 0.2][:top_n]
        assert score[n, : len(order)].tolist() == flat[order].tolist()
        row = order % (20 * 37) * 3 + order // (20 * 37)
        assert bbox[n, : len(order), 0].tolist() == row.tolist()
        assert cls[n].tolist() == [1] * len(order) + [0] * (top_n - len(order))
        assert not score[n, len(order) :].any()


def test_all_scores_equal():
    prob = torch.full((1, 2, 20, 30), 0.01).tolist()
    bbox, _, cls = decode(prob, im_info=(1e4, 1e4, 1.0), top_n=700, thresh=0.0)
    assert bbox[0, :, 0].tolist() == [*range(600), *range(100)]
    assert cls[0].tolist() == [1] * 600 + [2] * 100


def test_half_precision_boxes_are_computed_in_float32():
    delta = torch.full((1, 4, 1, 1), 0.1, dtype=torch.float16)
    half, _, _ = decode([[[[0.5]]]], delta, torch.tensor([[600.0, 0.0, 1111.0, 99.0]]), (5e3, 5e3, 1.0))
    full, _, _ = decode([[[[0.5]]]], delta.float(), torch.tensor([[600.0, 0.0, 1111.0, 99.0]]), (5e3, 5e3, 1.0))
    assert half.dtype == torch.float32
    assert half.tolist() == full.tolist()


class Level(torch.nn.Module):
    def forward(self, prob, delta, im_info):
        anchors = grid_anchors(prob.shape[2], prob.shape[3], 8, base_anchors(8, (1, 2), (1.0,)))
        return retina_decode(prob, delta, im_info, anchors, pre_nms_top_n=7, thresh=0.5, num_anchors=2)


def test_it_can_be_exported():
    random = torch.Generator().manual_seed(0)
    prob, delta = torch.rand(2, 6, 4, 4, generator=random), torch.randn(2, 8, 4, 4, generator=random)
    inputs = (prob, delta, torch.tensor([[30.0, 32.0, 1.0], [32.0, 20.0, 1.0]]))
    exported = torch.export.export(Level(), inputs).module()
    other = (prob.flip(0), delta.flip(0), inputs[2])
    for got, expected in zip(exported(*other), Level()(*other), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prob": (1, 5, 2, 2)}, r"cls_prob \(N, A\*C, H, W\) with A = 2, got \(1, 5, 2, 2\)"),
        ({"delta": (1, 4, 2, 2)}, r"expected bbox_pred \(1, 8, 2, 2\), got \(1, 4, 2, 2\)"),
        ({"im_info": (1, 2)}, r"expected im_info \(1, 3\), got \(1, 2\)"),
        ({"anchors": (4, 4)}, r"expected anchors \(8, 4\), got \(4, 4\)"),
        ({"top_n": 0}, "pre_nms_top_n >= 1 and thresh >= 0, got 0 and 0.5"),
        ({"thresh": -1.0}, "pre_nms_top_n >= 1 and thresh >= 0, got 3 and -1.0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    shape = {"prob": (1, 6, 2, 2), "delta": (1, 8, 2, 2), "im_info": (1, 3), "anchors": (8, 4)} | change
    tensors = [torch.ones(shape[name]) for name in ("prob", "delta", "im_info", "anchors")]
    top_n, thresh = change.get("top_n", 3), change.get("thresh", 0.5)
    with pytest.raises(ValueError, match=message):
        retina_decode(*tensors, pre_nms_top_n=top_n, thresh=thresh, num_anchors=2)
