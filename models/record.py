"""Records and batches, which the input transforms of all recipes operate on, and the resizing that they share.

A sample transform modifies the record of one image in place; a batch transform modifies a batch on the training device.
Boxes are xyxy with inclusive corners, in pixels of the current `image`.
N images, G boxes per image, H x W image size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import cv2
import numpy as np
from torch import Tensor


class Record(TypedDict, total=False):
    """One image with its boxes, as prepared by a worker."""

    image_path: str
    h: int  # height and width according to the annotations
    w: int
    im_id: np.ndarray  # () int64
    flipped: bool  # this sample is the mirrored one
    rng: np.random.Generator  # the only source of randomness
    image: np.ndarray  # (H, W, 3) uint8 RGB
    im_info: np.ndarray  # (3,) float32: height and width of the image before padding, input pixels per file pixel
    gt_bbox: np.ndarray  # (G, 5) float32: x1, y1, x2, y2, class 1..K


class Batch(TypedDict, total=False):
    """The images of one forward pass; after the batch transforms, the inputs of the graph by name.

    N is 0 on some ranks if the last step of an epoch has fewer images than there are processes.
    """

    files: list[str]
    skipped: list[tuple[str, str]]  # replaced image files, each reported once, with the reason
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
    """Return the batch's tensors with these names, which come from a config."""
    return {name: batch[name] for name in names}  # type: ignore[literal-required]


class BatchTransform:
    """Base class of transforms on whole batches. A subclass overrides `apply`, or `apply_step` if the batches of a step
    depend on each other."""

    def apply(self, batch: Any) -> None:
        """Modify one batch in place."""
        self.apply_step([batch])

    def apply_step(self, batches: Sequence[Batch]) -> None:
        """Modify all batches of one update in place."""
        for batch in batches:
            self.apply(batch)


def input_sides(record: Record, short: int, long: int) -> tuple[int, int]:
    """Return the input's height and width for this image: portrait, (long, short), if the file's h >= w.

    The file's size is used, not the current image's: a random crop can turn a landscape image into a square one, and
    a batch has one orientation. Without h and w in the record, the image's size is used.
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
