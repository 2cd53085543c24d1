"""RetinaNet with NAS-FPN 7@384 at 1280, synchronised batch normalisation and loss.

AP on COCO test-dev: 45.3 (published); not measured here.
Hardware: 8x GTX 1080 Ti, FP16, 2 images per GPU: 10 img/s, 8.9 GB per GPU (published); not measured here.
Command: python3 detection_train.py --config config/NASFPN/retina_r50v1b_nasfpn_1280_7@384_25epoch.py
"""

from config.NASFPN.recipe import retina_25epoch
from config.schema import Config


def get_config(is_train: bool) -> Config:
    config = retina_25epoch(is_train)
    config.General.batch_image = 2
    config.NormalizeParam.type = "syncbn"
    config.RpnParam.sync_loss = True
    config.NeckParam.dim_reduced = 384
    config.ResizeParam.short = config.ResizeParam.long = 1280
    return config
