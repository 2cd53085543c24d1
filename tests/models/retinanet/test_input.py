from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models.retinanet.input import AverageFgCount, Norm2DImage, PyramidAnchorTarget2D
from tests.two_processes import run_in_processes

GOLDEN = Path(__file__).parents[2] / "golden"
MEAN, STD = (123.688, 116.779, 103.939), (58.393, 57.12, 57.375)
CASES = ["target_square_256", "target_wide_256x384"]


def anchor_param(short, long, stride, scales, aspects, **assign):
    assign = {"pos_thr": 0.5, "neg_thr": 0.5, "min_pos_thr": 0.0, "allowed_border": 9999.0} | assign
    generate = SimpleNamespace(short=short, long=long, stride=stride, scales=scales, aspects=aspects)
    return SimpleNamespace(generate=generate, assign=SimpleNamespace(**assign))


def golden_param(golden):
    return anchor_param(
        tuple(golden["feature_short"].tolist()),
        tuple(golden["feature_long"].tolist()),
        (8, 16, 32, 64, 128),
        (4.0, 4.0 * 2 ** (1 / 3), 4.0 * 2 ** (2 / 3)),
        (0.5, 1.0, 2.0),
    )


def small_param(**assign):
    """One anchor of 8 x 8 pixels per cell, maps 2 x 3 and 1 x 2 where the input is landscape."""
    return anchor_param((2, 1), (3, 2), (8, 16), (1.0,), (1.0,), **assign)


def assert_golden(target, golden):
    np.testing.assert_array_equal(target["rpn_cls_label"], golden["cls_label"])
    assert target["rpn_fg_count"] == golden["fg_count"]
    weighted = target["rpn_reg_target"] * target["rpn_reg_weight"]
    np.testing.assert_allclose(weighted, golden["reg_target"], rtol=0, atol=1e-5)
    assert np.array_equal(np.unique(target["rpn_reg_weight"]), [0, 1])
    assert target["rpn_reg_weight"].sum() == 4 * golden["fg_count"]


@pytest.mark.parametrize("case", CASES)
def test_target_of_the_original_on_one_numpy_record(case):
    golden = np.load(GOLDEN / f"{case}.npz")
    record = {"gt_bbox": golden["gt_bbox"], "im_info": golden["im_info"]}
    PyramidAnchorTarget2D(golden_param(golden)).apply(record)
    assert all(value.dtype == np.float32 for value in record.values())
    assert_golden(record, golden)


@pytest.mark.parametrize("case", CASES)
def test_target_of_the_original_in_a_batch(case):
    golden = np.load(GOLDEN / f"{case}.npz")
    gt_bbox, im_info = torch.from_numpy(golden["gt_bbox"]), torch.from_numpy(golden["im_info"])
    height, width = golden["im_info"][:2].astype(int).tolist()
    record = {
        "gt_bbox": torch.stack([torch.full_like(gt_bbox, -1), gt_bbox]),
        "im_info": torch.stack([im_info, im_info]),
        "image": torch.zeros(2, height, width, 3, dtype=torch.uint8),
    }
    PyramidAnchorTarget2D(golden_param(golden)).apply(record)
    names = ("rpn_cls_label", "rpn_reg_target", "rpn_reg_weight", "rpn_fg_count")
    assert {record[name].dtype for name in names} == {torch.float32}
    assert_golden({name: record[name][1].numpy() for name in names}, golden)
    assert not any(record[name][0].any() for name in names[:3])  # no boxes: all background
    assert record["rpn_fg_count"][0] == 1


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "data", "no image"])
@pytest.mark.parametrize("portrait", [False, True])
def test_orientation_and_layout_of_the_levels(layout, portrait):
    # The 8 x 8 cell in row 1, column 2 of the landscape map 2 x 3, or in row 2, column 1 of the portrait map 3 x 2.
    box = [8.0, 16.0, 15.0, 23.0] if portrait else [16.0, 8.0, 23.0, 15.0]
    size = (24, 16) if portrait else (16, 24)
    record = {"gt_bbox": torch.tensor([[[*box, 5.0]]]), "im_info": torch.tensor([[*size, 1.0]])}
    if layout == "NHWC":
        record["image"] = torch.zeros(1, *size, 3)
    elif layout != "no image":
        record["data" if layout == "data" else "image"] = torch.zeros(1, 3, *size)
    PyramidAnchorTarget2D(small_param()).apply(record)
    # Cells 0..5 of stride 8, then 0 and 1 of stride 16.
    assert record["rpn_cls_label"].tolist() == [[0, 0, 0, 0, 0, 5, 0, 0]]
    assert record["rpn_reg_weight"].shape == (1, 4, 8)
    assert record["rpn_reg_weight"][0, 0].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
    assert record["rpn_fg_count"].tolist() == [1]


def test_an_image_without_foreground_counts_one():
    """SimpleDet's rpn_fg_count is max(1, count) per image before the mean over images."""
    box = torch.full((2, 1, 5), -1.0)
    box[0, 0] = torch.tensor([16.0, 8.0, 23.0, 15.0, 5.0])
    record = {"gt_bbox": box, "im_info": torch.tensor([[16.0, 24.0, 1.0]]).repeat(2, 1)}
    PyramidAnchorTarget2D(small_param()).apply(record)
    assert (record["rpn_cls_label"] >= 1).sum(1).tolist() == [1, 0]
    assert record["rpn_fg_count"].tolist() == [1, 1]
    AverageFgCount("rpn_fg_count").apply(record)
    assert record["rpn_fg_count"].tolist() == [2, 2]  # the divisor of the losses: 1 + max(1, 0)


def test_channels_are_anchor_major_then_dx_dy_dw_dh():
    # Stride 8, two anchors per cell: 8 x 8 and 16 x 16. The box is the larger one of cell 0, moved by 4 and 2.
    param = anchor_param((1,), (2,), (8,), (1.0, 2.0), (1.0,))
    record = {"gt_bbox": torch.tensor([[[0.0, -2.0, 15.0, 13.0, 3.0]]]), "im_info": torch.tensor([[8.0, 16.0, 1.0]])}
    PyramidAnchorTarget2D(param).apply(record)
    # Labels of (A, cells): the first anchor has none. Both larger anchors have IoU 12 * 14 / (512 - 168).
    assert record["rpn_cls_label"].tolist() == [[0, 0, 3, 3]]
    expected = torch.zeros(8, 2)
    expected[4] = torch.tensor([4 / 16, -4 / 16])
    expected[5] = torch.tensor([2 / 16, 2 / 16])
    torch.testing.assert_close(record["rpn_reg_target"][0], expected)
    assert record["rpn_reg_weight"][0].tolist() == [[0.0, 0.0]] * 4 + [[1.0, 1.0]] * 4


@pytest.mark.parametrize(
    "assign, expected",
    [
        ({}, [2, 0]),
        ({"pos_thr": 0.6, "min_pos_thr": 0.6}, [-1, 0]),
        ({"pos_thr": 0.6, "min_pos_thr": 0.6, "neg_thr": 0.6}, [0, 0]),
        ({"allowed_border": 0.0}, [2, 0]),
        ({"allowed_border": -8.0}, [-1, -1]),
    ],
)
def test_the_assignment_settings_are_passed_on(assign, expected):
    # A map of one row and two cells; the box is the upper half of the first anchor.
    record = {
        "gt_bbox": np.array([[0, 0, 7, 3, 2], [-1, -1, -1, -1, -1]], np.float32),
        "im_info": np.array([8, 16, 1], np.float32),
    }
    PyramidAnchorTarget2D(anchor_param((1,), (2,), (8,), (1.0,), (1.0,), **assign)).apply(record)
    assert record["rpn_cls_label"].tolist() == expected


def test_a_batch_of_both_orientations_is_refused():
    record = {"gt_bbox": torch.full((2, 1, 5), -1.0), "im_info": torch.tensor([[16.0, 24.0, 1.0], [24.0, 16.0, 1.0]])}
    with pytest.raises(ValueError, match=r"portrait and landscape.*batch them by orientation"):
        PyramidAnchorTarget2D(small_param()).apply(record)


def normalized(value):
    return [(value - m) / s for m, s in zip(MEAN, STD, strict=True)]


@pytest.mark.parametrize("channel_first", [False, True])
def test_norm_leaves_padding_at_zero(channel_first):
    image = torch.full((2, 4, 5, 3), 200, dtype=torch.uint8)
    image[:, 1, 2] = 0
    info = torch.tensor([[3.0, 4.0, 1.0], [2.0, 5.0, 1.0]])
    image = image.permute(0, 3, 1, 2) if channel_first else image
    record = {"image": image, "im_info": info}
    Norm2DImage(SimpleNamespace(mean=MEAN, std=STD)).apply(record)
    out = record["image"]
    assert out.dtype == torch.float32
    assert out.shape == image.shape
    out = out.permute(0, 2, 3, 1) if channel_first else out
    assert out[0, 0, 0].tolist() == pytest.approx(normalized(200), rel=1e-6)
    assert out[0, 1, 2].tolist() == pytest.approx(normalized(0), rel=1e-6)
    inside = out.abs().sum(3) != 0
    assert inside[0].tolist() == [[True] * 4 + [False]] * 3 + [[False] * 5]
    assert inside[1].tolist() == [[True] * 5] * 2 + [[False] * 5] * 2
    assert (image == 200).any()  # the uint8 input is untouched


def test_norm_of_one_numpy_image():
    image = np.full((4, 5, 3), 200, np.uint8)
    record = {"image": image, "im_info": np.array([3, 5, 1], np.float32)}
    norm = Norm2DImage(SimpleNamespace(mean=MEAN, std=STD))
    norm.apply(record)
    assert record["image"].dtype == np.float32
    np.testing.assert_allclose(record["image"][2, 4], normalized(200), rtol=1e-6)
    assert not record["image"][3].any()
    record = {"image": image}
    norm.apply(record)
    np.testing.assert_allclose(record["image"][3, 4], normalized(200), rtol=1e-6)


def test_norm_refuses_grey_images():
    with pytest.raises(ValueError, match=r"got \(2, 8, 8\): read them as RGB"):
        Norm2DImage(SimpleNamespace(mean=MEAN, std=STD)).apply({"image": torch.zeros(2, 8, 8)})


@pytest.mark.parametrize("count, expected", [([3.0, 4.0], 7.0), ([0.0, 0.0], 1.0)])
def test_average_fg_count_is_the_devices_total_and_at_least_one(count, expected):
    record = {"rpn_fg_count": torch.tensor(count)}
    AverageFgCount("rpn_fg_count").apply(record)
    assert record["rpn_fg_count"].tolist() == [expected, expected]


def average_count(rank, counts):
    before = torch.tensor(counts[rank])
    record = {"rpn_fg_count": before}
    AverageFgCount("rpn_fg_count").apply(record)
    return before.tolist(), record["rpn_fg_count"].tolist()


def test_average_fg_count_is_the_mean_over_the_processes():
    # (3 + 4 + 4) / 2; a process without images has one element
    assert run_in_processes(average_count, ([3.0, 4.0], [4.0])) == [([3.0, 4.0], [5.5, 5.5]), ([4.0], [5.5])]
    assert run_in_processes(average_count, ([3.0], [])) == [([3.0], [1.5]), ([], [1.5])]


def test_a_batch_of_no_images_keeps_its_shapes():
    size = (16, 8, 4, 2, 1)
    param = anchor_param(size, size, (8, 16, 32, 64, 128), (4.0,), (1.0,))
    record = {"image": torch.zeros(0, 3, 128, 128, dtype=torch.uint8), "gt_bbox": torch.zeros(0, 7, 5)}
    record["im_info"] = torch.zeros(0, 3)
    for transform in (Norm2DImage(SimpleNamespace(mean=MEAN, std=STD)), PyramidAnchorTarget2D(param)):
        transform.apply(record)
    AverageFgCount("rpn_fg_count").apply(record)
    cells = sum(side * side for side in size)
    shapes = {"image": (0, 3, 128, 128), "rpn_cls_label": (0, cells), "rpn_fg_count": (1,)}
    shapes |= dict.fromkeys(("rpn_reg_target", "rpn_reg_weight"), (0, 4, cells))
    assert {name: tuple(record[name].shape) for name in shapes} == shapes
    assert record["image"].dtype == torch.float32
