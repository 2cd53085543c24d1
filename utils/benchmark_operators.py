"""Benchmark the operators: the kernels in use, the plain torch references, and torchvision if it is installed.

    python3 utils/benchmark_operators.py                        on the CPU, with torch's number of threads
    python3 utils/benchmark_operators.py --device cuda --only focal

A row is the fastest of several runs. `bytes` is the number of bytes that must be read and written once; `of copy` the
time that a large copy of as many takes, as a share of the run's; `extra` the peak of memory above that before the run,
results included.

N images, K anchors of all levels, C classes, A anchors per cell, G boxes per image.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from operator_cxx import library
from operator_cxx.anchor import base_anchors, grid_anchors
from operator_cxx.anchor_target import pyramid_anchor_target
from operator_cxx.focal_loss import focal_loss, focal_loss_levels
from operator_cxx.nms import nms, soft_nms
from operator_cxx.retina_decode import retina_decode
from operator_cxx.smooth_l1 import smooth_l1_loss

try:
    import torchvision
except ImportError:
    torchvision = None

STRIDES = (8, 16, 32, 64, 128)
A, C = 9, 80
Work = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """An operator on an input: the functions to time, and the bytes that must be read and written."""

    name: str
    work: Work  # the kernels in use, or plain torch without any
    bytes: int
    peers: tuple[tuple[str, Work], ...] = ()  # other implementations, by name


def size_of(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def labels_of(N: int, K: int, device: torch.device) -> Tensor:
    """Return labels as in a batch: a few foreground anchors, some ignored."""
    draw = torch.rand(N, K, device=device, generator=torch.Generator(device).manual_seed(0))
    cls = 1 + (draw * 1e6).long() % C
    return torch.where(draw < 0.002, cls, torch.where(draw < 0.01, -1, 0)).float()


def eager_focal_loss(logit: Tensor, label: Tensor) -> Tensor:
    """Compute the formula with a sequence of torch operators, as detection libraries write it."""
    target = F.one_hot(label.clamp(min=0).long(), C + 1)[..., 1:].to(logit.dtype)
    p = torch.sigmoid(logit)
    cross_entropy = F.binary_cross_entropy_with_logits(logit, target, reduction="none")
    p_t = p * target + (1 - p) * (1 - target)
    loss = cross_entropy * (1 - p_t) ** 2 * (0.25 * target + 0.75 * (1 - target))
    return (loss * (label >= 0)[..., None]).sum() / ((label >= 1).sum() + 1)


def matched_by_matrix(gt_bbox: Tensor, anchors: Tensor) -> Tensor:
    """Assign anchors to boxes through the (G, K) matrix of overlaps, as detection libraries do."""
    lower = torch.maximum(gt_bbox[:, None, :2], anchors[None, :, :2])
    upper = torch.minimum(gt_bbox[:, None, 2:], anchors[None, :, 2:])
    inter = (upper - lower).clamp(min=0).prod(dim=2)
    area = [(box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) for box in (gt_bbox, anchors)]
    iou = inter / (area[0][:, None] + area[1] - inter)
    best, match = iou.max(dim=0)
    chosen = match.clone()
    chosen[best < 0.4] = -1
    chosen[(best >= 0.4) & (best < 0.5)] = -2
    forced = (iou == iou.max(dim=1, keepdim=True).values).nonzero()[:, 1]
    chosen[forced] = match[forced]
    return chosen


def focal_cases(device: torch.device) -> Iterator[Case]:
    N, sides = 8, [640 // s for s in STRIDES]
    K = sum(A * side * side for side in sides)
    label, random = labels_of(N, K, device), torch.Generator(device).manual_seed(0)
    logit = (torch.randn(N, K, C, device=device, generator=random) - 4).requires_grad_()
    moved = 2 * size_of(logit) + size_of(label)

    def of_anchors(logit: Tensor = logit) -> object:
        return torch.autograd.grad(focal_loss(logit, label, alpha=0.25, gamma=2.0), [logit])

    def formula(logit: Tensor = logit) -> object:
        return torch.autograd.grad(eager_focal_loss(logit, label), [logit])

    peers = (("eager formula", formula),)
    yield Case(f"focal loss ({N}, {K}, {C}), forward and backward", of_anchors, moved, peers)
    for name, layout in (("NCHW", torch.contiguous_format), ("channels-last", torch.channels_last)):
        maps = [torch.randn(N, A * C, side, side, device=device, generator=random) - 4 for side in sides]
        maps = [level.contiguous(memory_format=layout).requires_grad_() for level in maps]

        def of_levels(maps: list[Tensor] = maps) -> object:
            return torch.autograd.grad(focal_loss_levels(maps, label, num_class=C, alpha=0.25, gamma=2.0), maps)

        yield Case(f"focal loss of the levels' {name} maps", of_levels, moved)


def box_cases(device: torch.device) -> Iterator[Case]:
    N, random = 8, torch.Generator(device).manual_seed(0)
    shapes = [(N, 4 * A, 640 // s, 640 // s) for s in STRIDES]
    delta = [torch.randn(shape, device=device, generator=random).requires_grad_() for shape in shapes]
    cells = sum(shape[2] * shape[3] for shape in shapes)
    target, weight = (torch.rand(N, 4 * A, cells, device=device, generator=random) for _ in range(2))

    def work() -> object:
        return torch.autograd.grad(smooth_l1_loss(delta, target, weight, beta=0.11), delta)

    yield Case("smooth L1 of the levels' maps", work, 2 * size_of(*delta) + size_of(target, weight))


def decode_cases(device: torch.device) -> Iterator[Case]:
    for N in (1, 8):
        random = torch.Generator(device).manual_seed(0)
        im_info = torch.tensor([[640.0, 640.0, 1.0]] * N, device=device)
        levels = []
        for stride in STRIDES:
            side = 640 // stride
            logit = torch.randn(N, A * C, side, side, device=device, generator=random) * 1.5 - 6  # some 2 % above 0.05
            delta = torch.randn(N, 4 * A, side, side, device=device, generator=random) * 0.3
            base = base_anchors(stride, (4.0, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3)), (0.5, 1.0, 2.0))
            levels.append((logit.sigmoid(), delta, grid_anchors(side, side, stride, base, device), stride))

        def work(levels: list = levels, im_info: Tensor = im_info) -> object:
            found = [
                retina_decode(
                    prob,
                    delta,
                    im_info,
                    anchors,
                    pre_nms_top_n=1000,
                    thresh=0.0 if stride == STRIDES[-1] else 0.05,
                    num_anchors=A,
                )
                for prob, delta, anchors, stride in levels
            ]
            bbox, score, cls = (torch.cat(part, dim=1) for part in zip(*found, strict=True))
            return nms(bbox, score, cls, thr=0.5, max_det=100, min_score=0.0)

        moved = sum(size_of(prob, delta) for prob, delta, _, _ in levels)
        yield Case(f"decode and NMS, 640 input, {N} image{'s' * (N > 1)}", work, moved)


def nms_cases(device: torch.device) -> Iterator[Case]:
    M, random = 5000, torch.Generator(device).manual_seed(0)
    for name, span in (("spread", 1000.0), ("crowded", 100.0)):
        corner = torch.rand(M, 2, device=device, generator=random) * span
        bbox = torch.cat([corner, corner + 20 + 60 * torch.rand(M, 2, device=device, generator=random)], dim=1)
        score, one = torch.rand(M, device=device, generator=random), torch.ones(M, dtype=torch.int64, device=device)

        def work(bbox: Tensor = bbox, score: Tensor = score, one: Tensor = one) -> object:
            return nms(bbox[None], score[None], one[None], thr=0.5, max_det=M)

        peers: tuple[tuple[str, Work], ...] = ()
        if torchvision is not None:
            peers = (("torchvision.ops.nms", partial(torchvision.ops.nms, bbox, score, 0.5)),)
        yield Case(f"NMS of {M} boxes of one class, {name}", work, size_of(bbox, score, one), peers)

    def soft(bbox: Tensor = bbox, score: Tensor = score, one: Tensor = one) -> object:
        boxes = (bbox[None], score[None], one[None])
        return soft_nms(*boxes, method="gaussian", thr=0.5, sigma=0.5, min_score=0.001, max_det=100)

    yield Case(f"soft-NMS of {M} boxes, the best 100", soft, size_of(bbox, score, one))


def target_cases(device: torch.device) -> Iterator[Case]:
    size, G = 1280, 100
    anchors = []
    for stride in STRIDES:
        base = base_anchors(stride, (4.0, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3)), (0.5, 1.0, 2.0))
        level = grid_anchors(size // stride, size // stride, stride, base, device)
        anchors.append(level.reshape(-1, A, 4).transpose(0, 1).reshape(-1, 4))
    every = torch.cat(anchors)
    random = torch.Generator(device).manual_seed(0)
    corner = torch.rand(G, 2, device=device, generator=random) * size * 0.8
    side = 8 + size * 0.25 * torch.rand(G, 2, device=device, generator=random) ** 2
    box = torch.cat([corner, (corner + side).clamp(max=size - 1)], dim=1)
    gt_bbox = torch.cat([box, torch.ones(G, 1, device=device)], dim=1)[None]
    im_info = torch.tensor([[float(size), float(size), 1.0]], device=device)

    def work() -> object:
        thresholds = {"pos_thr": 0.5, "neg_thr": 0.4, "min_pos_thr": 0.0, "allowed_border": 9999.0}
        return pyramid_anchor_target(gt_bbox, im_info, every, **thresholds)

    peers: list[tuple[str, Work]] = [("matrix formula", lambda: matched_by_matrix(box, every))]
    if torchvision is not None:
        matcher = torchvision.models.detection._utils.Matcher(0.5, 0.4, allow_low_quality_matches=True)
        peers.append(("torchvision box_iou + Matcher", lambda: matcher(torchvision.ops.box_iou(box, every))))
    moved = size_of(every) + 5 * 4 * len(every)
    yield Case(f"anchor target at {size}, {len(every)} anchors, {G} boxes", work, moved, tuple(peers))


def best_time(work: Work, device: torch.device, budget: float) -> float:
    """Return the seconds of the fastest run, within about `budget` seconds after one run to warm up."""
    times: list[float] = []
    work()
    while len(times) < 3 or sum(times) < budget:
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return min(times)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def extra_memory(work: Work, device: torch.device) -> float:
    """Return the peak of bytes above those in use before; nan if the system does not report it."""
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return float("nan")
    reset.write_text("5")  # resets the peak to the resident memory
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """Return a field of this process's status on Linux, in bytes."""
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found.group(1)) * 1024


def copy_bandwidth(device: torch.device) -> float:
    """Return bytes per second of a large copy, reads and writes counted."""
    source = torch.ones(2**27, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_time(lambda: target.copy_(source), device, 1.0)


def by_reference(work: Work) -> Work:
    """Return the same function without the compiled kernels."""

    def plain() -> object:
        kernels = dict(library.loaded)
        library.loaded.clear()
        try:
            return work()
        finally:
            library.loaded.update(kernels)

    return plain


def report(case: Case, device: torch.device, bandwidth: float) -> None:
    ours = best_time(case.work, device, 1.0)
    used = case.bytes / ours
    print(case.name)
    extra = extra_memory(case.work, device) / 2**20
    print(
        f"  {'ours':<30} {1e3 * ours:9.2f} ms   {case.bytes / 1e6:.0f} MB, {used / 1e9:.1f} GB/s, "
        f"{100 * used / bandwidth:.0f} % of copy, extra {extra:.1f} MiB"
    )
    for name, work in (("reference", by_reference(case.work)), *case.peers):
        other = best_time(work, device, 0.5)
        print(f"  {name:<30} {1e3 * other:9.2f} ms   ours is {other / ours:.1f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the operators beside their references.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", default="", metavar="NAME", help="cases with this in their name")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    bandwidth = copy_bandwidth(device)
    torchvision_version = torchvision.__version__ if torchvision is not None else "not installed"
    print(f"{name}, torch {torch.__version__}, torchvision {torchvision_version}, copy {bandwidth / 1e9:.1f} GB/s")
    print("\n".join(library.notes))
    for cases in (focal_cases, box_cases, decode_cases, nms_cases, target_cases):
        for case in cases(device):
            if arguments.only in case.name:
                report(case, device, bandwidth)


if __name__ == "__main__":
    main()
