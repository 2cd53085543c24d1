"""A small NAS-FPN 2@64 at 128 that learns drawn shapes from scratch, on a CPU in minutes.

AP on demo_val: not measured yet.
Data:    python3 utils/make_demo_dataset.py --out data/demo
Command: python3 detection_train.py --config config/demo/retina_r18v1b_nasfpn_128_2@64_demo.py
"""

from config.NASFPN.recipe import retina_25epoch
from config.schema import Config


def get_config(is_train: bool) -> Config:
    config = retina_25epoch(is_train)
    config.General.fp16, config.General.batch_image = False, 16
    config.KvstoreParam.gpus = ()
    config.BackboneParam.depth, config.BackboneParam.num_filter = 18, 32
    config.NeckParam.dim_reduced, config.NeckParam.num_stage = 64, 2
    config.RpnParam.head.conv_channel, config.RpnParam.head.num_conv = 64, 2
    config.ModelParam.from_scratch, config.ModelParam.pretrain.fixed_param = True, ()
    config.DatasetParam.image_set = ("demo_train",) if is_train else ("demo_val",)
    config.TestParam.eval_epoch, config.TestParam.eval_image_set = 5, "demo_val"
    config.ResizeParam.short = config.ResizeParam.long = 128
    return config
