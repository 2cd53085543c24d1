"""RetinaNet with a top-down bottom-up pyramid 3@384 at 640, with 3x3 pooling instead of the 2x2 pooling used at 1280.

AP on COCO test-dev: not published; not measured here.
Command: python3 detection_train.py --config config/NASFPN/retina_r50v1b_tdbu_640_3@384_25epoch.py
"""

from config.NASFPN.recipe import retina_25epoch
from config.schema import Config
from models.FPG.builder import PAFPNNeckP3P7


def get_config(is_train: bool) -> Config:
    config = retina_25epoch(is_train)
    config.NormalizeParam.wd_mult = 0.0
    config.ModelParam.neck = PAFPNNeckP3P7
    config.NeckParam.dim_reduced, config.NeckParam.num_stage = 384, 3
    return config
