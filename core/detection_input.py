"""Records and the transforms that every recipe shares.

A record is a dict. Sample transforms (`ReadRoiRecord` to `Pad2DImageBbox`) change the record of one image in
place:

    image_path, h, w    the file, and its height and width by the annotations
    image               (H, W, 3) uint8 RGB
    im_info             (3,) float32: height and width of the image before padding, input pixels per file pixel
    gt_bbox             (G, 5) float32: x1, y1, x2, y2, class 1..K
    flipped             whether this sample is the mirrored one
    rng                 np.random.Generator, the only source of randomness

Batch transforms change a batch: the same names, torch tensors with N first. Boxes are xyxy with inclusive
corners, in pixels of `image` as it is at that point.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from core.data.image import read_image

if TYPE_CHECKING:
    from config.schema import PadParam, ResizeParam

Record = dict[str, Any]


def input_sides(record: Record, short: int, long: int) -> tuple[int, int]:
    """Height and width of the input that holds this image: portrait (long, short) where the file's h >= w.

    The file decides, not the image as it is now: a random crop can turn a landscape image into a square one,
    and a batch holds one orientation. The image decides where the record does not know its file.
    """
    height, width = record["image"].shape[:2]
    return (long, short) if record.get("h", height) >= record.get("w", width) else (short, long)


def resize(record: Record, height: int, width: int, scale: float) -> None:
    """Resizes the image to (height, width), scales the boxes by `scale`, clips them and writes im_info."""
    record["image"] = cv2.resize(record["image"], (width, height), interpolation=cv2.INTER_LINEAR)
    record["im_info"] = np.array([height, width, scale], np.float32)
    box = record["gt_bbox"].astype(np.float32)
    box[:, :4] *= np.float32(scale)
    box[:, 0:4:2] = box[:, 0:4:2].clip(0, width - 1)
    box[:, 1:4:2] = box[:, 1:4:2].clip(0, height - 1)
    record["gt_bbox"] = box


class ReadRoiRecord:
    """Reads `image` (H, W, 3) uint8 RGB from image_path; h and w are the size that the annotations state.

    Raises FileNotFoundError or ValueError, naming the file, where it cannot be read.
    """

    def apply(self, record: Record) -> None:
        image = read_image(record["image_path"], record["h"], record["w"])
        record["image"] = image
        record["im_info"] = np.array([*image.shape[:2], 1.0], np.float32)


class Resize2DImageBbox:
    """Scales image and boxes by min(short / shorter side, long / longer side)."""

    def __init__(self, pResize: ResizeParam) -> None:
        self.p = pResize

    def apply(self, record: Record) -> None:
        height, width = record["image"].shape[:2]
        scale = min(self.p.short / min(height, width), self.p.long / max(height, width))
        resize(record, max(1, round(height * scale)), max(1, round(width * scale)), scale)


class Flip2DImageBbox:
    """Mirrors image and boxes left to right where `flipped` is set: x1' = w - 1 - x2, x2' = w - 1 - x1."""

    def apply(self, record: Record) -> None:
        if not record["flipped"]:
            return
        image, box = record["image"], record["gt_bbox"]
        last = image.shape[1] - 1
        record["image"] = cv2.flip(image, 1)
        record["gt_bbox"] = np.column_stack([last - box[:, 2], box[:, 1], last - box[:, 0], box[:, 3:]])


class Pad2DImageBbox:
    """Pads the image with 0 below and to the right to the input's sides, and gt_bbox with rows of -1 to
    max_num_gt.

    Of more boxes than max_num_gt the largest stay, in their order; of equal ones the first.
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


class ConvertImageFromHwcToChw:
    """(..., H, W, 3) to (..., 3, H, W): a view, which torch knows as channels_last. Takes tensors and
    arrays."""

    def apply(self, record: Record) -> None:
        image = record["image"]
        if isinstance(image, np.ndarray):
            record["image"] = np.moveaxis(image, -1, -3)
        else:
            record["image"] = image.movedim(-1, -3)


class RenameRecord:
    """Renames entries, {old: new}: from the names of the input to those of the graph.

    Raises ValueError for an entry that the record does not have.
    """

    def __init__(self, mapping: Mapping[str, str]) -> None:
        self.mapping = mapping

    def apply(self, record: Record) -> None:
        missing = [name for name in self.mapping if name not in record]
        if missing:
            raise ValueError(
                f"RenameParam.mapping: no {', '.join(missing)} in the record, which has {', '.join(record)}; "
                f"correct the mapping, or put the transform that makes it before RenameRecord"
            )
        for old, new in self.mapping.items():
            record[new] = record.pop(old)
