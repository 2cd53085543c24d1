from pathlib import Path

import numpy as np
import pytest
import torch

from operator_cxx.anchor import base_anchors, grid_anchors

GOLDEN = Path(__file__).parents[1] / "golden"
SCALES = (4.0, 4.0 * 2 ** (1 / 3), 4.0 * 2 ** (2 / 3))


def test_base_anchors_of_the_original():
    golden = np.load(GOLDEN / "target_square_256.npz")["base_anchor_per_stride"]
    for stride, expected in zip((8, 16, 32, 64, 128), golden, strict=True):
        np.testing.assert_allclose(base_anchors(stride, SCALES, (0.5, 1.0, 2.0)), expected, rtol=0, atol=1e-9)


def test_base_anchors_by_hand():
    # Stride 8, aspect 0.5: w = round(sqrt(128) = 11.3) = 11, h = round(5.5) = 6 (to even), about (3.5, 3.5).
    anchors = base_anchors(8, (1, 2), (0.5, 1.0))
    assert anchors.dtype == np.float64
    assert anchors.tolist() == [
        [-1.5, 1.0, 8.5, 6.0],  # 11 x 6
        [-7.0, -2.0, 14.0, 9.0],  # 22 x 12
        [0.0, 0.0, 7.0, 7.0],
        [-4.0, -4.0, 11.0, 11.0],
    ]


@pytest.mark.parametrize("aspect, height", [(0.25, 2), (0.75, 4)])
def test_halves_round_to_even(aspect, height):
    # Stride 5. Aspect 0.25: w = 10, h = 2.5 -> 2. Aspect 0.75: w = round(5.77) = 6, h = 4.5 -> 4.
    _, y1, _, y2 = base_anchors(5, (1,), (aspect,))[0]
    assert y2 - y1 + 1 == height


def test_grid_runs_over_rows_then_columns_then_anchors():
    base = np.array([[0.0, 0.0, 7.0, 7.0], [-4.0, 0.0, 11.0, 7.0]])
    anchors = grid_anchors(2, 3, 8, base)
    assert anchors.shape == (12, 4)
    assert anchors.dtype == torch.float32
    assert anchors.reshape(2, 3, 2, 4)[1, 2].tolist() == [[16.0, 8.0, 23.0, 15.0], [12.0, 8.0, 27.0, 15.0]]
    assert anchors[2].tolist() == [8.0, 0.0, 15.0, 7.0]


def test_grid_is_the_float64_sum_rounded_once():
    base = base_anchors(8, SCALES, (0.5, 1.0, 2.0))
    anchors = grid_anchors(100, 160, 8, base)
    expected = np.float32(base[8] + np.array([159 * 8, 99 * 8, 159 * 8, 99 * 8]))
    assert anchors[-1].numpy().tolist() == expected.tolist()
