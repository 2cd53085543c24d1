"""RetinaNet with a plain FPN at 640, the baseline.

AP on COCO test-dev: 37.4 (published); not measured here.
Hardware: 8x GTX 1080 Ti, FP16, 8 images per GPU: 85 img/s, 6.6 GB per GPU (published); not measured here.
Command: python3 detection_train.py --config config/NASFPN/retina_r50v1b_fpn_640_1@256_25epoch.py
"""

from config.NASFPN.recipe import retina_25epoch
from config.schema import Config
from models.NASFPN.builder import RetinaNetNeckWithBN


def get_config(is_train: bool) -> Config:
    config = retina_25epoch(is_train)
    config.ModelParam.neck = RetinaNetNeckWithBN
    config.NeckParam.num_stage = 1
    config.NormalizeParam.wd_mult = 0.0  # the published baseline does not decay gamma and beta
    return config
