"""Stacked feature pyramids as symbols: NAS-FPN (Ghiasi et al. 2019) and a repeated top-down bottom-up pyramid.

A pyramid has five levels, P3 to P7, with strides 8 to 128.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import symbol as S
from models.retinanet.builder import Features, MSRAResNetV1bFPN, RetinaNetHead, RetinaNetNeck
from symbol import Prefix, Symbol
from symbol.initializer import XAVIER
from symbol.layers import add_n, conv, max_pool, relu, upsample_like

if TYPE_CHECKING:
    from config.schema import NeckParam

LEVELS = ("P3", "P4", "P5", "P6", "P7")


class ResNetV1bFPN(MSRAResNetV1bFPN):
    """The backbone of the NAS-FPN recipes: ResNet v1b of BackboneParam.depth."""


def merge_sum(f1: Symbol, f2: Symbol, name: str) -> Symbol:
    """Return f1 + f2."""
    return add_n(f1, f2, name=f"{name}_sum")


def merge_gp(f1: Symbol, f2: Symbol, name: str) -> Symbol:
    """Return the global pooling fusion f1 + f2 * sigmoid(global max of f1), Ghiasi et al. 2019, figure 3."""
    pooled = S.Pooling(f1, kernel=(1, 1), pool_type="max", global_pool=True, name=f"{name}_gp")
    attention = S.Activation(pooled, act_type="sigmoid", name=f"{name}_sigmoid")
    return add_n(f1, S.broadcast_mul(f2, attention, name=f"{name}_mul"), name=f"{name}_sum")


class StackedNeck:
    """A pyramid of lateral convolutions (stage S0), followed by `num_stage` fusion stages (S1, S2, ...).

    A subclass defines one fusion stage. Node names are `S<stage>_<level>[_<step>]`.
    """

    def __init__(self, pNeck: NeckParam) -> None:
        self.p = pNeck

    def get_rpn_feature(self, feat: Features) -> Features:
        """Return (P3, P4, P5, P6, P7) from (C2, C3, C4, C5)."""
        p, (_, c3, c4, c5) = self.p, feat
        c6 = max_pool(c5, "C6", kernel=2, stride=2)
        c7 = max_pool(c5, "C7", kernel=4, stride=4)
        features = dict(zip(LEVELS, (c3, c4, c5, c6, c7), strict=True))
        pyramid = {
            level: conv(c, f"S0_{level}", p.dim_reduced, kernel=p.S0_kernel, no_bias=False, init=XAVIER)
            for level, c in features.items()
        }
        for stage in range(1, p.num_stage + 1):
            with Prefix(f"S{stage}_"):
                pyramid = self.fuse(pyramid)
        return tuple(pyramid[level] for level in LEVELS)

    def fuse(self, pyramid: dict[str, Symbol]) -> dict[str, Symbol]:
        """Apply one fusion stage, from five levels to five levels."""
        raise NotImplementedError

    def _relu_conv_bn(self, data: Symbol, name: str) -> Symbol:
        x = relu(data, f"{name}_relu")
        x = conv(x, name, self.p.dim_reduced, kernel=3, no_bias=False, init=XAVIER)
        return self.p.normalizer(x, name=f"{name}_bn_neck")


class NASFPNNeck(StackedNeck):
    """NAS-FPN with 7 merges per stage: Ghiasi et al. 2019, "NAS-FPN", figure 6 (the AmoebaNet-searched 7-merge cell).

    The digit after a level is the index of the merge within the stage. A merge applies ReLU, a 3x3 convolution and BN
    to a sum or a global pooling fusion.
    """

    def fuse(self, pyramid: dict[str, Symbol]) -> dict[str, Symbol]:
        p3_0, p4_0, p5_0, p6_0, p7_0 = (pyramid[level] for level in LEVELS)
        p6_to_p4 = upsample_like(p6_0, p4_0, "P6_0_to_P4", 4)
        p4_1 = self._relu_conv_bn(merge_gp(p6_to_p4, p4_0, "gp_P6_0_P4_0"), "P4_1")
        p4_2 = self._relu_conv_bn(merge_sum(p4_0, p4_1, "sum_P4_0_P4_1"), "P4_2")
        p4_to_p3 = upsample_like(p4_2, p3_0, "P4_2_to_P3", 2)
        p3_3 = self._relu_conv_bn(merge_sum(p4_to_p3, p3_0, "sum_P4_2_P3_0"), "P3_3")
        p3_to_p4 = max_pool(p3_3, "P3_3_to_P4", kernel=2, stride=2)
        p4_4 = self._relu_conv_bn(merge_sum(p4_2, p3_to_p4, "sum_P4_2_P3_3"), "P4_4")
        p4_to_p5 = max_pool(p4_4, "P4_4_to_P5", kernel=2, stride=2)
        p3_to_p5 = max_pool(p3_3, "P3_3_to_P5", kernel=4, stride=4)
        gp_p5 = merge_gp(p4_to_p5, p3_to_p5, "gp_P4_4_P3_3")
        p5_5 = self._relu_conv_bn(merge_sum(gp_p5, p5_0, "sum_gp_P4_4_P3_3_P5_0"), "P5_5")
        p5_to_p7 = max_pool(p5_5, "P5_5_to_P7", kernel=4, stride=4)
        p4_to_p7 = max_pool(p4_2, "P4_2_to_P7", kernel=8, stride=8)
        gp_p7 = merge_gp(p5_to_p7, p4_to_p7, "gp_P5_5_P4_2")
        p7_6 = self._relu_conv_bn(merge_sum(gp_p7, p7_0, "sum_gp_P5_5_P4_2_P7_0"), "P7_6")
        p7_to_p6 = upsample_like(p7_6, p6_0, "P7_6_to_P6", 2)
        p5_to_p6 = max_pool(p5_5, "P5_5_to_P6", kernel=2, stride=2)
        p6_7 = self._relu_conv_bn(merge_gp(p7_to_p6, p5_to_p6, "gp_P7_6_P5_5"), "P6_7")
        return {"P3": p3_3, "P4": p4_4, "P5": p5_5, "P6": p6_7, "P7": p7_6}


class TopDownBottomUpFPNNeck(StackedNeck):
    """A top-down then a bottom-up path per stage (Liu et al. 2018, PANet). A merge is a sum, ReLU, 3x3 conv, BN."""

    pool_kernel: ClassVar[int] = 2  # of the stride-2 max pooling in the bottom-up path
    pool_pad: ClassVar[int] = 0

    def fuse(self, pyramid: dict[str, Symbol]) -> dict[str, Symbol]:
        down = {"P7": pyramid["P7"]}
        for coarse, fine in (("P7", "P6"), ("P6", "P5"), ("P5", "P4"), ("P4", "P3")):
            up = upsample_like(down[coarse], pyramid[fine], f"{coarse}_1_to_{fine}", 2)
            down[fine] = self._relu_conv_bn(merge_sum(pyramid[fine], up, f"sum_{fine}_0_{coarse}_1"), f"{fine}_1")
        out = {"P3": down["P3"]}
        for fine, coarse in (("P3", "P4"), ("P4", "P5"), ("P5", "P6"), ("P6", "P7")):
            name = f"{fine}_2_to_{coarse}"
            pooled = max_pool(out[fine], name, kernel=self.pool_kernel, stride=2, pad=self.pool_pad)
            merged = merge_sum(down[coarse], pooled, f"sum_{coarse}_1_{fine}_2")
            out[coarse] = self._relu_conv_bn(merged, f"{coarse}_2")
        return out


class RetinaNetNeckWithBN(RetinaNetNeck):
    """FPN with batch normalisation of every output level."""

    def _output(self, data: Symbol, name: str) -> Symbol:
        return self.p.normalizer(data, name=f"{name}_bn")


class RetinaNetHeadWithBN(RetinaNetHead):
    """RetinaNet head with batch normalisation, separate per level, after each shared convolution."""

    def _normalize(self, data: Symbol, name: str) -> Symbol:
        return self.p.normalizer(data, name=name)
