"""RetinaNet with NAS-FPN 7@256 at 1024, synchronised batch normalisation.

AP on COCO test-dev: 44.2 (published); not measured here.
Hardware: 8x GTX 1080 Ti, FP16, 4 images per GPU: 17 img/s, 9.1 GB per GPU (published); not measured here.
Command: python3 detection_train.py --config config/NASFPN/retina_r50v1b_nasfpn_1024_7@256_25epoch.py
"""

from config.NASFPN.recipe import retina_25epoch
from config.schema import Config


def get_config(is_train: bool) -> Config:
    config = retina_25epoch(is_train)
    config.General.batch_image = 4
    config.NormalizeParam.type = "syncbn"
    config.ResizeParam.short = config.ResizeParam.long = 1024
    return config
