"""A recipe for small objects and CPUs: a narrow ResNet-18 with a small pyramid at 128, trained from scratch."""

from __future__ import annotations

from config.NASFPN.recipe import retina_25epoch
from config.schema import Config


def small_retina(is_train: bool) -> Config:
    """Return the config of NAS-FPN 2@48 for objects of 16 to 100 pixels. The experiment file sets the image sets."""
    config = retina_25epoch(is_train)
    config.General.fp16, config.General.batch_image = False, 8
    config.General.loader_worker = 0  # on two cores a decoding process slows the step down
    config.KvstoreParam.gpus = ()
    config.NormalizeParam.momentum = 0.98  # P7 is one cell per image: 0.9 averages too few values
    config.BackboneParam.depth, config.BackboneParam.num_filter = 18, 32
    config.NeckParam.dim_reduced, config.NeckParam.num_stage = 48, 2
    config.RpnParam.head.conv_channel, config.RpnParam.head.num_conv = 48, 1
    config.RpnParam.anchor_generate.scale = (2.0, 2.0 * 2 ** (1 / 3), 2.0 * 2 ** (2 / 3))  # half the published sizes
    config.ModelParam.from_scratch = True
    config.OptimizeParam.optimizer.lr = 0.03
    config.OptimizeParam.schedule.end_epoch, config.OptimizeParam.schedule.lr_epoch = 10, (6, 9)
    config.OptimizeParam.warmup.epoch, config.OptimizeParam.warmup.lr_factor = 0.5, 0.3
    config.TestParam.batch_image = 16
    config.ResizeParam.short = config.ResizeParam.long = 128
    config.ResizeParam.scale_min, config.ResizeParam.scale_max = 0.9, 1.1
    return config
