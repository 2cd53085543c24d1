"""Every operator once on small tensors of the GPU, for a memory checker.

    python3 -m utils.acceptance.stage.small_operators

N images, A anchors per cell, C classes, G boxes of an image, M candidates.
"""

from __future__ import annotations

import torch

from operator_cxx.anchor import base_anchors, grid_anchors
from operator_cxx.anchor_target import pyramid_anchor_target
from operator_cxx.focal_loss import focal_loss, focal_loss_levels
from operator_cxx.nms import nms, soft_nms
from operator_cxx.retina_decode import retina_decode
from operator_cxx.smooth_l1 import smooth_l1_loss

N, A, C, SIDES = 2, 9, 5, (7, 3)  # odd sides: no block of threads is full


def losses(device: torch.device, dtype: torch.dtype) -> None:
    """Focal loss and smooth L1 with their gradients, in both layouts."""
    cells = sum(side * side for side in SIDES)
    label = torch.randint(-1, C + 1, (N, A * cells), device=device).float()
    target, weight = (torch.rand(N, 4 * A, cells, device=device) for _ in range(2))
    for layout in (torch.contiguous_format, torch.channels_last):
        maps = [torch.randn(N, A * C, side, side, device=device, dtype=dtype) for side in SIDES]
        maps = [one.contiguous(memory_format=layout).requires_grad_() for one in maps]
        focal_loss_levels(maps, label, num_class=C, alpha=0.25, gamma=2.0).backward()
        delta = [torch.randn(N, 4 * A, side, side, device=device) for side in SIDES]
        delta = [one.contiguous(memory_format=layout).requires_grad_() for one in delta]
        smooth_l1_loss(delta, target, weight, beta=0.11).backward()
    logit = torch.randn(N, A * cells, C, device=device, dtype=dtype).requires_grad_()
    focal_loss(logit, label, alpha=0.25, gamma=1.5).backward()


def boxes(device: torch.device) -> None:
    """Anchor targets, decoding and both kinds of NMS."""
    base = base_anchors(8, (1.0, 2.0, 4.0), (0.5, 1.0, 2.0))
    anchors = grid_anchors(SIDES[0], SIDES[0], 8, base, device)
    im_info = torch.tensor([[50.0, 55.0, 1.0]] * N, device=device)
    corner = torch.rand(N, 3, 2, device=device) * 30
    cls = torch.tensor([1.0, 2.0, -1.0], device=device).expand(N, 3)[..., None]
    gt_bbox = torch.cat([corner, corner + 5 + 15 * torch.rand(N, 3, 2, device=device), cls], dim=2)
    pyramid_anchor_target(gt_bbox, im_info, anchors, pos_thr=0.5, neg_thr=0.4, min_pos_thr=0.0, allowed_border=9999.0)
    prob = torch.rand(N, A * C, SIDES[0], SIDES[0], device=device)
    delta = torch.randn(N, 4 * A, SIDES[0], SIDES[0], device=device) * 0.3
    found = retina_decode(prob, delta, im_info, anchors, pre_nms_top_n=100, thresh=0.3, num_anchors=A)
    nms(*found, thr=0.5, max_det=20, min_score=0.0)
    soft_nms(*found, method="gaussian", thr=0.5, sigma=0.5, min_score=0.001, max_det=20)


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        losses(device, dtype)
    boxes(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"every operator ran on {device.type}")


if __name__ == "__main__":
    main()
