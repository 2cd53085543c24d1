"""Images from anywhere, without annotations: files by name, and records of them as a test prepares them.

H, W: sides of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.record import Record

IMAGE_SUFFIXES = frozenset(Image.registered_extensions()) - {".pdf", ".mpg", ".mpeg"}


def files_below(folder: Path, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Return all files below a folder that have one of the suffixes, by name."""
    return [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in suffixes]


def picture_record(pixels: np.ndarray, number: int, transforms: Sequence[Any], path: str = "") -> Record:
    """Return the record of an image (H, W, 3) uint8 RGB after a test's sample transforms.

    number: its im_id. transforms: config.test_transform.sample, the first of which reads a file and is left out.
    """
    record: Record = {
        "image_path": path,
        "im_id": np.array(number, np.int64),
        "image": pixels,
        "h": pixels.shape[0],
        "w": pixels.shape[1],
        "gt_bbox": np.empty((0, 5), np.float32),
        "flipped": False,
    }
    for transform in transforms[1:]:
        transform.apply(record)
    return record
