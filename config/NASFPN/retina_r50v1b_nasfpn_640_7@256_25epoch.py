"""RetinaNet with NAS-FPN 7@256 at 640, the unmodified recipe.

AP on COCO test-dev: 40.1 (published); not measured here.
Hardware: 8x GTX 1080 Ti, FP16, 8 images per GPU: 66 img/s, 7.8 GB per GPU (published); not measured here.
Command: python3 detection_train.py --config config/NASFPN/retina_r50v1b_nasfpn_640_7@256_25epoch.py
"""

from config.NASFPN.recipe import retina_25epoch
from config.schema import Config


def get_config(is_train: bool) -> Config:
    return retina_25epoch(is_train)
