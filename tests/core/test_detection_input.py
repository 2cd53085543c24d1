from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from config.schema import PadParam, ResizeParam
from core.detection_input import (
    ConvertImageFromHwcToChw,
    Flip2DImageBbox,
    Pad2DImageBbox,
    ReadRoiRecord,
    RenameRecord,
    Resize2DImageBbox,
)


def pad_param(short: int, long: int, max_num_gt: int) -> PadParam:
    param = PadParam(max_num_gt=max_num_gt)
    object.__setattr__(param, "short", short)  # derived by load_config elsewhere
    object.__setattr__(param, "long", long)
    return param


def make_record(height: int, width: int, boxes: Sequence[Sequence[float]] = (), **more: Any) -> dict[str, Any]:
    image = np.random.default_rng(0).integers(1, 256, (height, width, 3), np.uint8)
    gt_bbox = np.array(boxes, np.float32).reshape(-1, 5)
    return {"image": image, "gt_bbox": gt_bbox, "h": height, "w": width} | more


def test_read(tmp_path: Path) -> None:
    image = make_record(4, 6)["image"]
    Image.fromarray(image).save(tmp_path / "a.png")
    record = {"image_path": str(tmp_path / "a.png"), "h": 4, "w": 6}
    ReadRoiRecord().apply(record)
    assert np.array_equal(record["image"], image)
    assert record["im_info"].tolist() == [4, 6, 1]


def test_resize_by_the_shorter_side() -> None:
    record = make_record(100, 120, [[10, 20, 50, 99, 3]])
    Resize2DImageBbox(ResizeParam(short=50, long=90)).apply(record)  # min(50 / 100, 90 / 120) = 0.5
    assert record["image"].shape == (50, 60, 3)
    assert record["im_info"].tolist() == [50, 60, 0.5]
    assert record["gt_bbox"].tolist() == [[5, 10, 25, 49, 3]]  # 99 * 0.5 = 49.5 is beyond the last pixel, 49


def test_resize_by_the_longer_side() -> None:
    record = make_record(400, 100)
    Resize2DImageBbox(ResizeParam(short=50, long=100)).apply(record)  # min(50 / 100, 100 / 400) = 0.25
    assert record["image"].shape == (100, 25, 3)


def test_a_side_never_vanishes() -> None:
    record = make_record(1, 1000, [[999, 0, 999, 0, 1]])
    Resize2DImageBbox(ResizeParam(short=128, long=128)).apply(record)
    assert record["image"].shape == (1, 128, 3)
    assert record["gt_bbox"].tolist() == [[127, 0, 127, 0, 1]]  # 999 * 0.128 = 127.9: the last pixel, not lost


def test_flip_mirrors_pixels_and_boxes() -> None:
    record = make_record(5, 10, [[0, 1, 3, 4, 2], [9, 0, 9, 0, 1]], flipped=True)
    image = record["image"]
    Flip2DImageBbox().apply(record)
    assert np.array_equal(record["image"], image[:, ::-1])
    assert record["gt_bbox"].tolist() == [[6, 1, 9, 4, 2], [0, 0, 0, 0, 1]]  # 9 - 3 = 6, 9 - 0 = 9
    assert record["gt_bbox"].dtype == np.float32


def test_flip_leaves_the_plain_sample_alone() -> None:
    record = make_record(5, 10, [[0, 1, 3, 4, 2]], flipped=False)
    image = record["image"]
    Flip2DImageBbox().apply(record)
    assert record["image"] is image
    assert record["gt_bbox"].tolist() == [[0, 1, 3, 4, 2]]


def test_flip_without_boxes() -> None:
    record = make_record(5, 10, flipped=True)
    Flip2DImageBbox().apply(record)
    assert record["gt_bbox"].shape == (0, 5)


@pytest.mark.parametrize("sides, padded", [((5, 9), (8, 16)), ((9, 5), (16, 8)), ((7, 7), (16, 8))])
def test_pad_by_orientation(sides: tuple[int, int], padded: tuple[int, int]) -> None:
    record = make_record(*sides, [[0, 1, 2, 3, 4]])
    image = record["image"]
    Pad2DImageBbox(pad_param(8, 16, 3)).apply(record)
    assert record["image"].shape == (*padded, 3)
    assert np.array_equal(record["image"][: sides[0], : sides[1]], image)
    assert record["image"].sum() == image.sum()  # zeros elsewhere
    assert record["gt_bbox"].tolist() == [[0, 1, 2, 3, 4], [-1] * 5, [-1] * 5]
    assert record["gt_bbox"].dtype == np.float32


def test_the_file_decides_the_orientation_not_the_crop() -> None:
    record = make_record(8, 8) | {"h": 30, "w": 31}
    Pad2DImageBbox(pad_param(8, 16, 1)).apply(record)
    assert record["image"].shape == (8, 16, 3)


def test_the_largest_boxes_stay_in_their_order() -> None:
    # areas 4, 9, 1, 9, 9 and 16 by inclusive corners
    corners = [(0, 1), (0, 2), (5, 5), (1, 3), (2, 4), (0, 3)]
    record = make_record(8, 8, [[a, a, b, b, i + 1] for i, (a, b) in enumerate(corners)])
    Pad2DImageBbox(pad_param(8, 8, 3)).apply(record)
    assert record["gt_bbox"][:, 4].tolist() == [2, 4, 6]  # the last of the three equal ones is dropped


def test_a_line_of_one_pixel_has_an_area() -> None:
    record = make_record(8, 8, [[0, 0, 1, 1, 1], [3, 0, 3, 7, 2], [0, 3, 7, 3, 3]])  # areas 4, 8, 8
    Pad2DImageBbox(pad_param(8, 8, 2)).apply(record)
    assert record["gt_bbox"][:, 4].tolist() == [2, 3]


def test_exactly_max_num_gt_boxes_stay() -> None:
    record = make_record(8, 8, [[0, 0, 1, 1, 1], [0, 0, 2, 2, 2]])
    Pad2DImageBbox(pad_param(8, 8, 2)).apply(record)
    assert record["gt_bbox"][:, 4].tolist() == [1, 2]


def test_pad_without_boxes() -> None:
    record = make_record(8, 8)
    Pad2DImageBbox(pad_param(8, 8, 2)).apply(record)
    assert record["gt_bbox"].tolist() == [[-1] * 5] * 2


def test_an_image_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="9 x 8 does not fit into the input of 8 x 8; put a transform"):
        Pad2DImageBbox(pad_param(8, 8, 2)).apply(make_record(9, 8))


def test_hwc_to_chw_of_a_batch_and_of_one_image() -> None:
    batch = {"image": torch.arange(2 * 4 * 5 * 3).reshape(2, 4, 5, 3)}
    expected = batch["image"].permute(0, 3, 1, 2)
    ConvertImageFromHwcToChw().apply(batch)
    assert torch.equal(batch["image"], expected)
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    record = make_record(4, 5)
    channel = record["image"][:, :, 2]
    ConvertImageFromHwcToChw().apply(record)
    assert record["image"].shape == (3, 4, 5)
    assert np.array_equal(record["image"][2], channel)


def test_rename() -> None:
    record = {"image": 1, "im_info": 2}
    RenameRecord({"image": "data"}).apply(record)
    assert record == {"data": 1, "im_info": 2}


def test_rename_of_a_missing_entry_names_both_sides() -> None:
    with pytest.raises(ValueError, match=r"no imge in the record, which has image, im_info"):
        RenameRecord({"imge": "data"}).apply({"image": 1, "im_info": 2})
