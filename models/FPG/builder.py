"""The path-aggregation pyramid of SimpleDet's TD-BU recipe at 640, under SimpleDet's module path and class name."""

from __future__ import annotations

from models.NASFPN.builder import TopDownBottomUpFPNNeck


class PAFPNNeckP3P7(TopDownBottomUpFPNNeck):
    """Top-down bottom-up pyramid over P3 to P7 (Liu et al. 2018, PANet) with overlapping max pooling, 3x3, pad 1."""

    pool_kernel = 3
    pool_pad = 1
