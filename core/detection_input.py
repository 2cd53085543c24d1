"""Input transforms that all recipes share; `models.record` documents records and batches.

`ReadRoiRecord` to `Pad2DImageBbox` modify the record of one image, in a loader worker; the others modify whole batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from core.data.image import read_image
from models.record import BatchTransform, Record, input_sides, resize

if TYPE_CHECKING:
    from config.schema import PadParam, ResizeParam


class ReadRoiRecord:
    """Read `image` (H, W, 3) uint8 RGB from image_path; h and w are the size that the annotations state.

    Raises FileNotFoundError or ValueError, naming the file, if it cannot be read.
    """

    def apply(self, record: Record) -> None:
        image = read_image(record["image_path"], record["h"], record["w"])
        record["image"] = image
        record["im_info"] = np.array([*image.shape[:2], 1.0], np.float32)


class Resize2DImageBbox:
    """Scale image and boxes by min(short / shorter side, long / longer side)."""

    def __init__(self, pResize: ResizeParam) -> None:
        self.p = pResize

    def apply(self, record: Record) -> None:
        height, width = record["image"].shape[:2]
        scale = min(self.p.short / min(height, width), self.p.long / max(height, width))
        resize(record, max(1, round(height * scale)), max(1, round(width * scale)), scale)


class Flip2DImageBbox:
    """Mirror image and boxes horizontally if `flipped` is set: x1' = w - 1 - x2, x2' = w - 1 - x1."""

    def apply(self, record: Record) -> None:
        if not record["flipped"]:
            return
        image, box = record["image"], record["gt_bbox"]
        last = image.shape[1] - 1
        record["image"] = cv2.flip(image, 1)
        record["gt_bbox"] = np.column_stack([last - box[:, 2], box[:, 1], last - box[:, 0], box[:, 3:]])


class Pad2DImageBbox:
    """Pad the image with 0 below and to the right to the input's sides, and gt_bbox with rows of -1 to max_num_gt.

    If there are more boxes than max_num_gt, the largest are kept, in their order; among equal ones the first.
    Raises ValueError for an image that is larger than the input.
    """

    def __init__(self, pPad: PadParam) -> None:
        self.p = pPad

    def apply(self, record: Record) -> None:
        image, box = record["image"], record["gt_bbox"]
        height, width = input_sides(record, self.p.short, self.p.long)
        if image.shape[0] > height or image.shape[1] > width:
            raise ValueError(
                f"Pad2DImageBbox: an image of {image.shape[0]} x {image.shape[1]} does not fit into the "
                f"input of {height} x {width}; put a transform that resizes to ResizeParam before it"
            )
        padded = np.zeros((height, width, 3), np.uint8)
        padded[: image.shape[0], : image.shape[1]] = image
        record["image"] = padded
        if len(box) > self.p.max_num_gt:
            area = (box[:, 2] - box[:, 0] + 1) * (box[:, 3] - box[:, 1] + 1)
            largest = np.argsort(-area, kind="stable")[: self.p.max_num_gt]
            box = box[np.sort(largest)]
        gt_bbox = np.full((self.p.max_num_gt, 5), -1, np.float32)
        gt_bbox[: len(box)] = box
        record["gt_bbox"] = gt_bbox


class ConvertImageFromHwcToChw(BatchTransform):
    """Permute (..., H, W, 3) to (..., 3, H, W): a view, in torch's channels_last format. Takes tensors and arrays."""

    def apply(self, batch: Any) -> None:
        image = batch["image"]
        batch["image"] = np.moveaxis(image, -1, -3) if isinstance(image, np.ndarray) else image.movedim(-1, -3)


class RenameRecord(BatchTransform):
    """Rename entries, {old: new}: from the names of the input to those of the graph.

    Raises ValueError for an entry that the record or batch does not have.
    """

    def __init__(self, mapping: Mapping[str, str]) -> None:
        self.mapping = mapping

    def apply(self, batch: Any) -> None:
        missing = [name for name in self.mapping if name not in batch]
        if missing:
            raise ValueError(
                f"RenameParam.mapping: no {', '.join(missing)} in the record, which has {', '.join(batch)}; "
                f"correct the mapping, or put the transform that adds it before RenameRecord"
            )
        for old, new in self.mapping.items():
            batch[new] = batch.pop(old)
