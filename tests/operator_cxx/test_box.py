import math

import pytest
import torch

from operator_cxx.box import decode_box, encode_box, inclusive_area, inclusive_iou


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
