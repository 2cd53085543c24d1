"""Input transforms of RetinaNet, which run per batch on the training device.

A transform modifies a batch in place. A batch holds torch tensors: `image` uint8 RGB padded with zeros,
`im_info` (N, 3) = height, width, scale before padding, `gt_bbox` (N, G, 5) = x1, y1, x2, y2, class padded with rows
of -1. Boxes are xyxy in input pixels with inclusive corners.

Shapes: N images, G boxes per image, A anchors per cell, H x W cells of a level, K anchors of all levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from models.record import BatchTransform
from operator_cxx.anchor import base_anchors, grid_anchors
from operator_cxx.anchor_target import pyramid_anchor_target

if TYPE_CHECKING:
    from config.schema import AnchorTarget2DParam, NormParam


class Norm2DImage(BatchTransform):
    """Normalisation to (image - mean) / std in float32, with zeros in the padding beyond im_info.

    Takes (N, 3, height, width) or (N, height, width, 3) tensors, or one numpy image of either layout without N, and
    preserves the layout. A record without im_info has no padding.
    """

    def __init__(self, pNorm: NormParam) -> None:
        self.p = pNorm
        self._scale: dict[torch.device, tuple[Tensor, Tensor]] = {}  # mean and std (3,) by device, created on first use

    def apply(self, batch: Any) -> None:
        image = batch["image"]
        im_info = batch.get("im_info")
        if isinstance(image, np.ndarray):
            info = None if im_info is None else torch.as_tensor(np.asarray(im_info, np.float32))[None]
            batch["image"] = self._normalize(torch.as_tensor(image)[None], info)[0].numpy()
        else:
            batch["image"] = self._normalize(image, im_info)

    def _normalize(self, image: Tensor, im_info: Tensor | None) -> Tensor:
        last = _is_channel_last(image)
        if image.device not in self._scale:  # cached, because copying them per step would synchronise host and device
            mean, std = (torch.tensor(value, dtype=torch.float32) for value in (self.p.mean, self.p.std))
            self._scale[image.device] = mean.to(image.device), std.to(image.device)
        mean, std = (value.reshape((3,) if last else (3, 1, 1)) for value in self._scale[image.device])
        image = image.float().sub(mean).div_(std)
        if im_info is not None:
            padding = _padding(image.shape[1:3] if last else image.shape[2:4], im_info)
            image.masked_fill_(padding.unsqueeze(3 if last else 1), 0.0)
        return image


class PyramidAnchorTarget2D(BatchTransform):
    """Anchor targets: labels and regression targets of the losses.

    Reads `gt_bbox`, `im_info` and the shape of `image` (or `data`). Adds, with levels in the order of strides:
        rpn_cls_label   (N, sum of A*H*W)      -1 ignored, 0 background, else the class; per level (A, H, W)
        rpn_reg_target  (N, 4A, sum of H*W)    dx, dy, dw, dh of each foreground anchor, else 0
        rpn_reg_weight  (N, 4A, sum of H*W)    1 where the label is foreground, else 0
        rpn_fg_count    (N,)                   foreground anchors of each image, at least 1
    A single record of numpy arrays, without N, gets numpy arrays without N.

    A batch of images that are at least as high as wide has feature maps of long x short cells, else short x long.
    Without an image in the batch im_info gives the orientation; ValueError if the images of a batch differ in it.
    """

    def __init__(self, pAnchor: AnchorTarget2DParam) -> None:
        self.p = pAnchor
        self._base = [
            base_anchors(s, pAnchor.generate.scales, pAnchor.generate.aspects) for s in pAnchor.generate.stride
        ]
        self._anchors: dict[tuple[bool, torch.device], Tensor] = {}  # by orientation and device, created on first use

    def apply(self, batch: Any) -> None:
        gt_bbox = batch["gt_bbox"]
        if isinstance(gt_bbox, np.ndarray):
            im_info = torch.as_tensor(np.asarray(batch["im_info"], np.float32))[None]
            target = self._target(batch, torch.as_tensor(gt_bbox)[None], im_info)
            batch.update({name: value[0].numpy() for name, value in target.items()})
        else:
            batch.update(self._target(batch, gt_bbox, batch["im_info"]))

    def _target(self, batch: Any, gt_bbox: Tensor, im_info: Tensor) -> dict[str, Tensor]:
        portrait = _is_portrait(batch, im_info)
        assign = self.p.assign
        label, delta = pyramid_anchor_target(
            gt_bbox,
            im_info,
            self._all_anchors(portrait, gt_bbox.device),
            pos_thr=assign.pos_thr,
            neg_thr=assign.neg_thr,
            min_pos_thr=assign.min_pos_thr,
            allowed_border=assign.allowed_border,
        )
        foreground = label >= 1
        return {
            "rpn_cls_label": label,
            "rpn_reg_target": self._by_cell(delta, portrait),
            "rpn_reg_weight": self._by_cell(foreground[..., None].expand_as(delta), portrait),
            "rpn_fg_count": foreground.sum(dim=1).clamp(min=1).float(),
        }

    def _map_sizes(self, portrait: bool) -> list[tuple[int, int]]:
        """Return (H, W) of every level."""
        short, long = self.p.generate.short, self.p.generate.long
        return list(zip(long, short, strict=True) if portrait else zip(short, long, strict=True))

    def _all_anchors(self, portrait: bool, device: torch.device) -> Tensor:
        """Return all anchors (K, 4), per level in (A, H, W) order."""
        if (portrait, device) not in self._anchors:
            levels = []
            sizes = self._map_sizes(portrait)
            for (H, W), stride, base in zip(sizes, self.p.generate.stride, self._base, strict=True):
                anchors = grid_anchors(H, W, stride, base, device)  # (H*W*A, 4)
                levels.append(anchors.reshape(H * W, -1, 4).transpose(0, 1).reshape(-1, 4))  # (A*H*W, 4)
            self._anchors[portrait, device] = torch.cat(levels)
        return self._anchors[portrait, device]

    def _by_cell(self, value: Tensor, portrait: bool) -> Tensor:
        """Reorder values per anchor (N, K, 4) to float32 (N, 4A, sum of H*W)."""
        A = len(self._base[0])
        cells = [H * W for H, W in self._map_sizes(portrait)]
        out = value.new_empty(len(value), A, 4, sum(cells), dtype=torch.float32)
        levels = value.split([A * c for c in cells], dim=1)
        for level, place in zip(levels, out.split(cells, dim=3), strict=True):
            # (N, A*H*W, 4) -> (N, A, H*W, 4) -> (N, A, 4, H*W)
            place.copy_(level.unflatten(1, (A, -1)).transpose(2, 3))
        return out.flatten(1, 2)


class AverageFgCount(BatchTransform):
    """Average of the foreground counts (N,) over all devices, which the losses are divided by.

    Replaces the counts by the mean of the batch totals, over the devices and the batches accumulated for an update, and
    at least 1. The mean is repeated N times, at least once.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def apply_step(self, batches: Sequence[Any]) -> None:
        mean = torch.stack([batch[self.name].sum() for batch in batches]).mean()
        mean = _mean_over_devices(mean).clamp(min=1)
        for batch in batches:
            # one element also for a batch without images, whose losses are divided by it too
            batch[self.name] = mean.expand(max(1, len(batch[self.name]))).clone()


def _mean_over_devices(value: Tensor) -> Tensor:
    """Return the mean of a scalar over all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def _is_channel_last(image: Tensor) -> bool:
    """Return True for (N, height, width, 3), False for (N, 3, height, width). Raises ValueError for other shapes."""
    if image.dim() == 4 and image.shape[1] == 3:
        return False
    if image.dim() == 4 and image.shape[3] == 3:
        return True
    raise ValueError(
        f"expected images (N, 3, height, width) or (N, height, width, 3), got {tuple(image.shape)}: "
        "read them as RGB (ReadRoiRecord does)"
    )


def _padding(size: torch.Size, im_info: Tensor) -> Tensor:
    """Return the padding mask (N, height, width): pixels beyond the height and width of im_info (N, 3)."""
    row = torch.arange(size[0], device=im_info.device) >= im_info[:, :1]  # (N, height)
    column = torch.arange(size[1], device=im_info.device) >= im_info[:, 1:2]  # (N, width)
    return row[:, :, None] | column[:, None, :]


def _is_portrait(batch: Any, im_info: Tensor) -> bool:
    """Return True if the padded images of the batch are at least as high as wide."""
    image = batch.get("image", batch.get("data"))
    if image is not None:
        last = _is_channel_last(image if image.ndim == 4 else image[None])
        height, width = image.shape[-3:-1] if last else image.shape[-2:]
        return bool(height >= width)
    portrait = (im_info[:, 0] >= im_info[:, 1]).tolist()
    if len(set(portrait)) != 1:
        raise ValueError(
            "PyramidAnchorTarget2D: expected a batch of one orientation, got portrait and landscape: "
            f"height, width = {im_info[:, :2].tolist()}; batch them by orientation or use a square input"
        )
    return portrait[0]
