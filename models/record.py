"""Records and batches: what the input transforms of every recipe work on, and the resizing that they share.

A sample transform changes the record of one image in place; a batch transform changes a batch, on the training device.
Boxes are xyxy with inclusive corners, in pixels of `image` as it is at that point.
N images, G boxes per image, H x W the image's sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import cv2
import numpy as np
from torch import Tensor


class Record(TypedDict, total=False):
    """One image with its boxes, while a worker prepares it."""

    image_path: str
    h: int  # height and width by the annotations
    w: int
    im_id: np.ndarray  # () int64
    flipped: bool  # this sample is the mirrored one
    rng: np.random.Generator  # the only source of randomness
    image: np.ndarray  # (H, W, 3) uint8 RGB
    im_info: np.ndarray  # (3,) float32: height and width of the image before padding, input pixels per file pixel
    gt_bbox: np.ndarray  # (G, 5) float32: x1, y1, x2, y2, class 1..K


class Batch(TypedDict, total=False):
    """The images of one forward pass, and after the batch transforms the inputs of the graph by its names.

    N is 0 where an epoch's last step has fewer images than there are processes.
    """

    files: list[str]
    skipped: list[tuple[str, str]]  # image files that others stand in for, each once, with the reason
    im_id: Tensor  # (N,) int64
    image: Tensor  # (N, H, W, 3) uint8 RGB, padded with 0
    im_info: Tensor  # (N, 3) float32, as in a record
    gt_bbox: Tensor  # (N, G, 5) float32, padded with rows of -1
    data: Tensor  # (N, 3, H, W) float32: the normalised images
    rpn_cls_label: Tensor  # see models.retinanet.input.PyramidAnchorTarget2D for these
    rpn_reg_target: Tensor
    rpn_reg_weight: Tensor
    rpn_fg_count: Tensor


def select(batch: Batch, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the batch's tensors of these names, which a config gives."""
    return {name: batch[name] for name in names}  # type: ignore[literal-required]


class BatchTransform:
    """Base of the transforms that run on whole batches: one gives `apply`, or `apply_step` where batches depend on
    each other."""

    def apply(self, batch: Any) -> None:
        """Change one batch in place."""
        self.apply_step([batch])

    def apply_step(self, batches: Sequence[Batch]) -> None:
        """Change all batches that an update is computed from, in place."""
        for batch in batches:
            self.apply(batch)


def input_sides(record: Record, short: int, long: int) -> tuple[int, int]:
    """Return height and width of the input that holds this image: portrait (long, short) where the file's h >= w.

    The file decides, not the image as it is now: a random crop can turn a landscape image into a square one,
    and a batch holds one orientation. The image decides where the record does not know its file.
    """
    height, width = record["image"].shape[:2]
    return (long, short) if record.get("h", height) >= record.get("w", width) else (short, long)


def resize(record: Record, height: int, width: int, scale: float) -> None:
    """Resize the image to (height, width), scale the boxes by `scale`, clip them and write im_info."""
    record["image"] = cv2.resize(record["image"], (width, height), interpolation=cv2.INTER_LINEAR)
    record["im_info"] = np.array([height, width, scale], np.float32)
    box = record["gt_bbox"].astype(np.float32)
    box[:, :4] *= np.float32(scale)
    box[:, 0:4:2] = box[:, 0:4:2].clip(0, width - 1)
    box[:, 1:4:2] = box[:, 1:4:2].clip(0, height - 1)
    record["gt_bbox"] = box
