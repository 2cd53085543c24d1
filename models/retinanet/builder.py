"""RetinaNet as symbols: Lin et al. 2017, "Focal Loss for Dense Object Detection".

N images, A anchors per cell, C classes, H x W cells of a level, K anchors of all levels, P cells of all levels.
Boxes are xyxy with inclusive corners, in input pixels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import symbol as S
from models.backbone.resnet import Variant, resnet_v1, resnet_v1b
from symbol import Group, Symbol, var
from symbol.initializer import XAVIER, ZERO, constant, normal
from symbol.layers import add_n, cast, concat, conv, relu, reshape, sigmoid, upsample_like

if TYPE_CHECKING:
    from config.schema import BackboneParam, NeckParam, RpnParam

PRIOR = 0.01  # initial foreground probability of every anchor
SMOOTH_L1_BETA = 0.11  # smooth L1 is quadratic below this difference

Features = tuple[Symbol, ...]


class RetinaNet:
    """The training and test graphs of backbone, neck and head."""

    @staticmethod
    def get_train_symbol(backbone: MSRAResNetV1bFPN, neck: RetinaNetNeck, head: RetinaNetHead) -> Symbol:
        """Return the graph with outputs cls_loss and reg_loss.

        Inputs are data (N, 3, H, W) and the labels rpn_cls_label (N, K), rpn_reg_target and rpn_reg_weight (N, 4A, P);
        with sync_loss also rpn_fg_count (N,).
        """
        feat = neck.get_rpn_feature(backbone.get_rpn_feature())
        return Group(head.get_loss(feat, var("rpn_cls_label"), var("rpn_reg_target"), var("rpn_reg_weight")))

    @staticmethod
    def get_test_symbol(backbone: MSRAResNetV1bFPN, neck: RetinaNetNeck, head: RetinaNetHead) -> Symbol:
        """Return the graph with outputs cls_score (N, M, C + 1) and bbox_xyxy (N, M, 4), M = levels * pre_nms_top_n.

        Inputs are data (N, 3, H, W) and im_info (N, 3).
        """
        feat = neck.get_rpn_feature(backbone.get_rpn_feature())
        return Group(head.get_prediction(feat, var("im_info")))


class MSRAResNetV1bFPN:
    """ResNet v1b with the four feature maps that a pyramid is built from."""

    variant: ClassVar[Variant] = "v1b"  # selects the pretrained weights, whose names and shapes do not differ

    def __init__(self, pBackbone: BackboneParam) -> None:
        self.p = pBackbone

    def get_rpn_feature(self) -> Features:
        """Return (C2, C3, C4, C5)."""
        p = self.p
        return resnet_v1b(p.depth, p.normalizer, p.fp16, p.num_filter)


class MSRAResNetV1FPN(MSRAResNetV1bFPN):
    """ResNet v1 of depth 50, 101 or 152, as in the paper, with the same features."""

    variant = "v1"

    def get_rpn_feature(self) -> Features:
        p = self.p
        return resnet_v1(p.depth, p.normalizer, p.fp16, p.num_filter)


class RetinaNetNeck:
    """The FPN of RetinaNet: P3 to P5 top-down, P6 and P7 by strided convolutions of C5."""

    def __init__(self, pNeck: NeckParam) -> None:
        self.p = pNeck

    def _conv(self, data: Symbol, name: str, kernel: int = 3, stride: int = 1) -> Symbol:
        filter = self.p.dim_reduced
        return conv(data, name, filter, kernel=kernel, stride=stride, no_bias=False, init=XAVIER)

    def _output(self, data: Symbol, name: str) -> Symbol:
        """Return the output of a level; overridden to normalise it."""
        return data

    def get_rpn_feature(self, feat: Features) -> Features:
        """Return (P3, P4, P5, P6, P7), strides 8 to 128."""
        _, c3, c4, c5 = feat
        p5 = self._conv(c5, "P5_lateral", kernel=1)
        p4_lateral = self._conv(c4, "P4_lateral", kernel=1)
        p4 = add_n(upsample_like(p5, p4_lateral, "P5_upsampling", 2), p4_lateral, name="P4_sum")
        p3_lateral = self._conv(c3, "P3_lateral", kernel=1)
        p3 = add_n(upsample_like(p4, p3_lateral, "P4_upsampling", 2), p3_lateral, name="P3_sum")
        p6 = self._conv(c5, "P6_conv", stride=2)
        p7 = self._conv(relu(p6, "P6_relu"), "P7_conv", stride=2)
        levels = {
            "P3_conv": self._conv(p3, "P3_conv"),
            "P4_conv": self._conv(p4, "P4_conv"),
            "P5_conv": self._conv(p5, "P5_conv"),
            "P6_conv": p6,
            "P7_conv": p7,
        }
        return tuple(self._output(level, name) for name, level in levels.items())


class RetinaNetHead:
    """Two subnets with weights shared by all levels: class logits and box deltas of every anchor."""

    def __init__(self, pRpn: RpnParam) -> None:
        self.p = pRpn

    @property
    def num_base_anchor(self) -> int:
        """A, the number of anchors per cell."""
        return len(self.p.anchor_generate.ratio) * len(self.p.anchor_generate.scale)

    @property
    def num_foreground(self) -> int:
        """C, the number of foreground classes."""
        assert self.p.num_class is not None
        return self.p.num_class - 1

    def _normalize(self, data: Symbol, name: str) -> Symbol:
        """Return the output of a subnet's convolution; overridden to normalise it."""
        return data

    def _weights(self, subnet: str, prior_bias: str) -> dict[str, tuple[Symbol, Symbol]]:
        names = [f"{subnet}_conv{i + 1}" for i in range(self.p.head.num_conv)]
        weights = {n: (var(f"{n}_weight", init=normal(0.01)), var(f"{n}_bias", init=ZERO)) for n in names}
        pred = f"{subnet}_pred"
        weights[pred] = (var(f"{pred}_weight", init=normal(0.01)), var(f"{pred}_bias", init=prior_bias))
        return weights

    def _subnet(
        self, feat: Symbol, subnet: str, weights: dict[str, tuple[Symbol, Symbol]], filter: int, stride: int
    ) -> Symbol:
        x = feat
        *hidden, pred = weights
        for name in hidden:
            weight, bias = weights[name]
            channel = self.p.head.conv_channel
            x = conv(x, f"{name}_s{stride}", channel, kernel=3, no_bias=False, weight=weight, bias=bias)
            x = relu(self._normalize(x, f"{name}_bn_s{stride}"), f"{name}_relu_s{stride}")
        if self.p.fp16 and self.p.head.fp32_predict:
            x = cast(x, "float32", f"{subnet}_fp32_s{stride}")
        weight, bias = weights[pred]
        return conv(x, f"{pred}_s{stride}", filter, kernel=3, no_bias=False, weight=weight, bias=bias)

    def get_output(self, feat: Features) -> tuple[list[Symbol], list[Symbol]]:
        """Return logits (N, A*C, H, W) and deltas (N, A*4, H, W) of every level, in float32 with head.fp32_predict."""
        cls_weights = self._weights("cls", constant(-math.log((1 - PRIOR) / PRIOR)))
        bbox_weights = self._weights("bbox", ZERO)
        cls_logit, bbox_delta = [], []
        for level, stride in zip(feat, self.p.anchor_generate.stride, strict=True):
            num_cls, num_bbox = self.num_base_anchor * self.num_foreground, self.num_base_anchor * 4
            cls_logit.append(self._subnet(level, "cls", cls_weights, num_cls, stride))
            bbox_delta.append(self._subnet(level, "bbox", bbox_weights, num_bbox, stride))
        return cls_logit, bbox_delta

    def _flatten(self, feat: Features) -> tuple[Symbol, Symbol]:
        """Return logits (N, K, C) and deltas (N, 4A, P): levels by stride, anchors of a level in (A, H*W) order."""
        logits, deltas = [], []
        levels = zip(self.p.anchor_generate.stride, *self.get_output(feat), strict=True)
        for stride, logit, delta in levels:
            # (N, A*C, H, W) -> (N, A, C, H*W)
            shape = (0, self.num_base_anchor, self.num_foreground, -1)
            logit = reshape(logit, shape, f"cls_stride{stride}_reshape")
            # -> (N, A, H*W, C)
            logit = S.transpose(logit, axes=(0, 1, 3, 2), name=f"cls_stride{stride}_transpose")
            # -> (N, A*H*W, C)
            logits.append(reshape(logit, (0, -3, 0), f"cls_stride{stride}_transpose_reshape"))
            # (N, 4A, H, W) -> (N, 4A, H*W)
            deltas.append(reshape(delta, (0, 0, -1), f"bbox_stride{stride}_reshape"))
        return concat(logits, 1, "cls_logit_concat"), concat(deltas, 2, "bbox_delta_concat")

    def get_loss(self, feat: Features, cls_label: Symbol, reg_target: Symbol, reg_weight: Symbol) -> list[Symbol]:
        """Return [cls_loss, reg_loss], focal loss and smooth L1.

        Each is divided by the device's foreground count + 1; with sync_loss by rpn_fg_count, the count averaged over
        all devices.
        """
        p = self.p
        logit, delta = self._flatten(feat)
        difference = S.elemwise_sub(delta, reg_target, name="bbox_difference")
        if not p.sync_loss:
            difference = S._contrib_BBoxNorm(difference, cls_label, name="bbox_norm")
        smooth = S.smooth_l1(difference, scalar=math.sqrt(1 / SMOOTH_L1_BETA), name="bbox_loss")
        reg_loss = S.elemwise_mul(reg_weight, smooth, name="bbox_weighted_loss")
        focal = {"alpha": p.focal_loss.alpha, "gamma": p.focal_loss.gamma}
        if not p.sync_loss:
            cls_loss = S._contrib_FocalLoss(logit, cls_label, normalization="valid", name="cls_loss", **focal)
            return [cls_loss, S.MakeLoss(reg_loss, name="reg_loss")]
        # all images of the batch have the same average: take the first, as (1, 1, 1)
        count = S.slice_axis(var("rpn_fg_count", shape=(0,)), axis=0, begin=0, end=1, name="fg_count")
        count = reshape(count, (1, 1, 1), "fg_count_reshape")
        cls_loss = S._contrib_FocalLoss(logit, cls_label, out_grad=True, name="cls_focal_loss", **focal)
        cls_loss = S.broadcast_div(cls_loss, count, name="cls_loss_mean")
        reg_loss = S.broadcast_div(reg_loss, count, name="reg_loss_mean")
        return [S.MakeLoss(cls_loss, name="cls_loss"), S.MakeLoss(reg_loss, name="reg_loss")]

    def get_prediction(self, feat: Features, im_info: Symbol) -> list[Symbol]:
        """Return [cls_score, bbox_xyxy]: the pre_nms_top_n best candidates per level, decoded, before NMS."""
        p = self.p
        boxes, scores = [], []
        coarsest = max(p.anchor_generate.stride)
        for stride, logit, delta in zip(p.anchor_generate.stride, *self.get_output(feat), strict=True):
            if p.fp16 and not p.head.fp32_predict:
                logit = cast(logit, "float32", f"cls_logit_fp32_s{stride}")
                delta = cast(delta, "float32", f"bbox_delta_fp32_s{stride}")
            score = sigmoid(logit, f"cls_score_stride{stride}")
            anchors = S._contrib_GenAnchor(
                score,
                scales=p.anchor_generate.scale,
                ratios=p.anchor_generate.ratio,
                feature_stride=stride,
                name=f"anchor_stride{stride}",
            )
            proposal = S._contrib_GenProposalRetina(
                score,
                delta,
                im_info,
                anchors,
                num_anchors=self.num_base_anchor,
                feature_stride=stride,
                rpn_pre_nms_top_n=p.proposal.pre_nms_top_n,
                rpn_min_size=0,
                # no threshold on the coarsest level, so that every image has candidates
                thresh=0.0 if stride == coarsest else p.proposal.min_det_score,
                name=f"proposal_stride{stride}",
            )
            boxes.append(proposal[0])
            scores.append(proposal[1])
        return [concat(scores, 1, "cls_score"), concat(boxes, 1, "bbox_xyxy")]
