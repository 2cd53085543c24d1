"""The published NAS-FPN recipe: RetinaNet on ResNet-50 v1b, 25 epochs of COCO.

Ghiasi et al. 2019, "NAS-FPN: Learning Scalable Feature Pyramid Architecture for Object Detection"
(https://arxiv.org/abs/1904.07392), as trained by SimpleDet. All other settings are the defaults of
`config.schema`, which are the published ones.
"""

from __future__ import annotations

from typing import Any

from config.schema import Config, Transform
from core.detection_input import (
    ConvertImageFromHwcToChw,
    Flip2DImageBbox,
    Pad2DImageBbox,
    ReadRoiRecord,
    RenameRecord,
)
from models.NASFPN.builder import NASFPNNeck, ResNetV1bFPN, RetinaNetHeadWithBN
from models.NASFPN.input import RandResizeCrop2DImageBbox, ResizeCrop2DImageBbox
from models.record import BatchTransform
from models.retinanet.builder import RetinaNet
from models.retinanet.input import AverageFgCount, Norm2DImage, PyramidAnchorTarget2D
from models.retinanet.metric import FGAccMetric


def retina_25epoch(is_train: bool) -> Config:
    """Return the config of RetinaNet with NAS-FPN 7@256 at 640, for experiment files to modify."""
    config = Config()
    config.NormalizeParam.wd_mult = 1.0
    config.ModelParam.detector = RetinaNet
    config.ModelParam.backbone = ResNetV1bFPN
    config.ModelParam.neck = NASFPNNeck
    config.ModelParam.head = RetinaNetHeadWithBN
    config.DatasetParam.image_set = ("coco_train2017", "coco_val2017") if is_train else ("coco_test-dev2017",)
    config.get_transform = retina_transform
    config.get_metric = retina_metric
    return config


def retina_transform(config: Config, is_train: bool) -> Transform:
    """Return the input transforms: random crop, flip and anchor targets in training; resize to fit in testing."""
    resize = RandResizeCrop2DImageBbox if is_train else ResizeCrop2DImageBbox
    sample: list[Any] = [ReadRoiRecord(), resize(config.ResizeParam)]
    batch: list[BatchTransform] = [ConvertImageFromHwcToChw(), Norm2DImage(config.NormParam)]
    if is_train:
        sample.append(Flip2DImageBbox())
        batch.append(PyramidAnchorTarget2D(config.AnchorTarget2DParam))
        if config.RpnParam.sync_loss:
            batch.append(AverageFgCount("rpn_fg_count"))
    sample.append(Pad2DImageBbox(config.PadParam))
    batch.append(RenameRecord(config.RenameParam.mapping))
    return Transform(sample=sample, batch=batch)


def retina_metric(config: Config) -> list[Any]:
    """Return the training metrics: accuracy of the class logits on foreground anchors."""
    logits = [f"cls_pred_s{stride}_output" for stride in config.RpnParam.anchor_generate.stride]
    return [FGAccMetric("FGAcc", logits, ["rpn_cls_label"])]
