"""A config file in SimpleDet's format for the demo's images, as its users write them."""

# ruff: noqa (SimpleDet's style)

from models.NASFPN.builder import NASFPNNeck as Neck
from models.NASFPN.builder import ResNetV1bFPN as Backbone
from models.NASFPN.builder import RetinaNetHeadWithBN as Head
from models.retinanet.builder import RetinaNet as Detector
from mxnext.complicate import normalizer_factory


def get_config(is_train):
    class General:
        name = __name__.rsplit("/")[-1].rsplit(".")[-1]
        log_frequency = 20
        fp16 = True
        batch_image = 8 if is_train else 1

    class KvstoreParam:
        gpus = [0]
        kvstore = "nccl"
        batch_image = General.batch_image
        fp16 = General.fp16

    class NormalizeParam:
        normalizer = normalizer_factory(type="localbn", ndev=len(KvstoreParam.gpus), wd_mult=1.0)

    class BackboneParam:
        depth = 18
        fp16 = General.fp16
        normalizer = NormalizeParam.normalizer

    class NeckParam:
        num_stage = 2
        dim_reduced = 48
        S0_kernel = 1
        fp16 = General.fp16
        normalizer = NormalizeParam.normalizer

    class RpnParam:
        num_class = 1 + 6
        batch_image = General.batch_image
        fp16 = General.fp16
        normalizer = NormalizeParam.normalizer
        sync_loss = False

        class anchor_generate:
            stride = (8, 16, 32, 64, 128)
            scale = tuple(4 * 2 ** (i / 3) for i in range(3))
            ratio = (0.5, 1.0, 2.0)
            image_anchor = None

        class head:
            conv_channel = 256
            mean = None
            std = None

        class proposal:
            min_det_score = 0.05
            pre_nms_top_n = 1000
            post_nms_top_n = None
            nms_thr = None
            min_bbox_side = None

        class focal_loss:
            gamma = 2.0
            alpha = 0.25

    class RoiParam:
        fp16 = General.fp16
        normalizer = NormalizeParam.normalizer
        out_size = None
        stride = None

    class BboxParam:
        fp16 = General.fp16
        normalizer = NormalizeParam.normalizer
        batch_image = None
        image_roi = None
        num_class = None

    class DatasetParam:
        image_set = ("demo_train",) if is_train else ("demo_val",)

    detector = Detector()
    parts = Backbone(BackboneParam), Neck(NeckParam), Head(RpnParam)
    train_graph = detector.get_train_symbol(*parts) if is_train else None
    test_graph = None if is_train else detector.get_test_symbol(*parts)

    class ModelParam:
        train_symbol = train_graph
        test_symbol = test_graph
        random = True
        from_scratch = True
        memonger = False
        memonger_until = "S2_P6_7_bn"

        class pretrain:
            prefix = f"pretrain_model/resnet{BackboneParam.depth}_v1b"
            epoch = 0
            fixed_param = ["conv0"]

    images_per_step = len(KvstoreParam.gpus) * KvstoreParam.batch_image

    class OptimizeParam:
        class optimizer:
            type = "sgd"
            lr = 0.01 / 8 * images_per_step
            wd = 0.0001
            momentum = 0.9
            clip_gradient = None

        class schedule:
            begin_epoch = 0
            end_epoch = 3
            lr_iter = [2000 // images_per_step]

        class warmup:
            type = "gradual"
            lr = 0.001 / 8 * images_per_step
            iter = 400 // images_per_step

    class TestParam:
        process_roidb = lambda roidb: roidb
        process_output = lambda outputs, roidb: outputs
        max_det_per_image = 100
        min_det_score = 0

        class model:
            prefix = f"experiments/{General.name}/checkpoint"
            epoch = OptimizeParam.schedule.end_epoch

        class nms:
            type = "nms"
            thr = 0.5

        class coco:
            annotation = "data/demo/annotations/instances_val.json"

    class NormParam:
        mean = (123.688, 116.779, 103.939)
        std = (58.393, 57.12, 57.375)

    class ResizeParam:
        short = 128
        long = 128
        scale_min = 0.8
        scale_max = 1.2

    class PadParam:
        short = ResizeParam.short
        long = ResizeParam.long
        max_num_gt = 100

    class AnchorTarget2DParam:
        def __init__(self):
            self.generate = self._generate()

        class _generate:
            aspects = (0.5, 1.0, 2.0)
            scales = (4 * 2**0, 4 * 2 ** (1.0 / 3.0), 4 * 2 ** (2.0 / 3.0))

            def __init__(self):
                self.stride = (8, 16, 32, 64, 128)
                self.short = (16, 8, 4, 2, 1)
                self.long = (16, 8, 4, 2, 1)

        class assign:
            pos_thr = 0.5
            neg_thr = 0.5
            min_pos_thr = 0.0
            allowed_border = 9999

        class sample:
            image_anchor = None
            pos_fraction = None

    class RenameParam:
        mapping = dict(image="data")

    from core.detection_input import (
        ConvertImageFromHwcToChw,
        Flip2DImageBbox,
        Pad2DImageBbox,
        ReadRoiRecord,
        RenameRecord,
    )
    from models.NASFPN.input import RandResizeCrop2DImageBbox, ResizeCrop2DImageBbox
    from models.retinanet.input import Norm2DImage, PyramidAnchorTarget2D

    if is_train:
        transform = [
            ReadRoiRecord(None),
            Norm2DImage(NormParam),
            RandResizeCrop2DImageBbox(ResizeParam),
            Flip2DImageBbox(),
            Pad2DImageBbox(PadParam),
            ConvertImageFromHwcToChw(),
            PyramidAnchorTarget2D(AnchorTarget2DParam()),
            RenameRecord(RenameParam.mapping),
        ]
        data_name, label_name = ["data"], ["rpn_cls_label", "rpn_reg_target", "rpn_reg_weight"]
    else:
        transform = [
            ReadRoiRecord(None),
            Norm2DImage(NormParam),
            ResizeCrop2DImageBbox(ResizeParam),
            Pad2DImageBbox(PadParam),
            ConvertImageFromHwcToChw(),
            RenameRecord(RenameParam.mapping),
        ]
        data_name, label_name = ["data", "im_info", "im_id", "rec_id"], []

    from models.retinanet import metric

    metric_list = [metric.FGAccMetric("FGAcc", ["cls_loss_output"], ["rpn_cls_label"])]

    return (
        General,
        KvstoreParam,
        RpnParam,
        RoiParam,
        BboxParam,
        DatasetParam,
        ModelParam,
        OptimizeParam,
        TestParam,
        transform,
        data_name,
        label_name,
        metric_list,
    )
