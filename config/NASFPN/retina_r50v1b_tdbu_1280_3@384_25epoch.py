"""RetinaNet with a top-down bottom-up pyramid 3@384 at 1280, synchronised batch normalisation and loss.

AP on COCO test-dev: 44.7 (published); not measured here.
Hardware: 8x GTX 1080 Ti, FP16, 3 images per GPU: 12 img/s, 10.5 GB per GPU (published); not measured here.
Command: python3 detection_train.py --config config/NASFPN/retina_r50v1b_tdbu_1280_3@384_25epoch.py
"""

from config.NASFPN.recipe import retina_25epoch
from config.schema import Config
from models.NASFPN.builder import TopDownBottomUpFPNNeck


def get_config(is_train: bool) -> Config:
    config = retina_25epoch(is_train)
    config.General.batch_image = 3
    config.NormalizeParam.type = "syncbn"
    config.RpnParam.sync_loss = True
    config.ModelParam.neck = TopDownBottomUpFPNNeck
    config.NeckParam.dim_reduced, config.NeckParam.num_stage = 384, 3
    config.ResizeParam.short = config.ResizeParam.long = 1280
    return config
