"""Benchmark training and testing beside torchvision's and MMDetection's RetinaNet, by turns, on the same random images.

    pip install -e ".[peers]"                       in an environment of its own; without it only Necklace is timed
    python3 utils/benchmark_peers.py --rounds 10

A training step is forward, losses, backward and update; a test is forward to detections after NMS; both start from
uint8 images in memory. All weights are random. Each side takes one step per round, so that changes in the machine's
speed reach all sides alike. The peers compute in float32, their default, and with --peer-half under torch.autocast too.
Their networks, losses, targets and optimizers are their own: MMDetection's of the config files in its wheel,
torchvision's of `retinanet_resnet50_fpn` with SGD.

N images, G boxes per image.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from config.load import load_config
from core.cli import run
from core.engine.trainer import build_trainer
from core.engines import choose_engine
from core.inference import detect
from models.record import Batch, select
from operator_cxx import library
from utils.benchmark_step import random_batch, wait

ROOT = Path(__file__).parents[1]
CONFIGS = {
    "nasfpn": "config/NASFPN/retina_r50v1b_nasfpn_640_7@256_25epoch.py",
    "fpn": "config/NASFPN/retina_r50v1b_fpn_640_1@256_25epoch.py",
}
MMDET_CONFIGS = {
    "nasfpn": "nas_fpn/retinanet_r50_nasfpn_crop640-50e_coco.py",
    "fpn": "nas_fpn/retinanet_r50_fpn_crop640-50e_coco.py",
}
PRECISIONS = ("float32", "half")
PHASES = ("training", "test")
C = 80  # classes
LR = 1e-5  # small, so that random weights do not diverge; no time depends on it
INSTALL = 'pip install -e ".[peers]"'


class PeerMissingError(Exception):
    """A peer that cannot be imported; the message says how to install it."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison: functions that make a training step, and detect in the batch."""

    name: str
    training: Callable[[], object]
    test: Callable[[], int]  # returns the number of detections

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("Necklace")


def necklace_side(path: Path, precision: str, overrides: Sequence[str], device: torch.device) -> tuple[Side, Batch]:
    """Return Necklace's side in a precision, and its batch, for the peers."""
    common = [
        "ModelParam.from_scratch=True",
        f"RpnParam.num_class={C + 1}",
        "DatasetParam.data_root=none",  # the boxes are drawn: classes of annotations on this machine do not count
        f"General.fp16={precision == 'half'}",
        *overrides,
    ]
    # moving statistics equal the last batch's, near to those of a trained network; else activations grow by the layer
    trained = ["NormalizeParam.momentum=0", f"OptimizeParam.optimizer.lr={LR}"]
    config = load_config(path, is_train=True, overrides=[*common, *trained])
    trainer, _ = build_trainer(config, device, iter_per_epoch=1000, start=None)
    if precision == "half" and trainer.compute_dtype == "float32":
        raise ValueError("this processor has no half type: add --precision float32")
    batch = random_batch(config, device)
    test_config = load_config(path, is_train=False, overrides=common)
    images: Any = dict(select(batch, ["image", "im_info"]))
    images |= {"im_id": torch.arange(len(batch["image"])), "files": [""] * len(batch["image"])}
    trainer.step([batch.copy()], 0)  # for the moving statistics
    detector, _ = choose_engine("torch").build_detector(test_config, trainer.weights(), device, "random weights")

    def training() -> Tensor:
        return trainer.step([batch.copy()], 0).values[:-1]  # without the norm: gradients may overflow in float16

    def test() -> int:
        return sum(len(found.score) for found in detect(test_config, detector, [images.copy()], device))

    return Side(f"Necklace {trainer.compute_dtype}", training, test), batch


def autocast(device: torch.device, half: bool) -> AbstractContextManager[Any]:
    """Return the context of a peer: autocast in the device's half type, or nothing."""
    return torch.autocast(device.type, half_type(device)) if half else nullcontext()


def half_type(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.bfloat16


def peer_name(library_name: str, device: torch.device, half: bool) -> str:
    """Return the name of a peer's side, such as "torchvision autocast bfloat16"."""
    dtype = str(half_type(device)).removeprefix("torch.")
    return f"{library_name} autocast {dtype}" if half else f"{library_name} float32"


def move_peer(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a peer's network to the device; its moving statistics will equal the last batch's, as Necklace's do."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    return model.to(device)


def boxes_of(batch: Batch) -> list[Tensor]:
    """Return the boxes (G, 4) of every image, xyxy."""
    return [boxes[boxes[:, 4] > 0, :4] for boxes in batch["gt_bbox"]]


def import_torchvision() -> Any:
    """Return torchvision. Raises PeerMissingError if it is not installed or lacks its operators."""
    try:
        import torchvision
    except ImportError:
        raise PeerMissingError(f"torchvision is not installed: {INSTALL}") from None
    except RuntimeError:  # "operator torchvision::nms does not exist": its library was not loaded
        raise PeerMissingError(
            "torchvision cannot load its operators: it is for another build of torch; install both from one "
            "index of packages"
        ) from None
    return torchvision


def torchvision_side(batch: Batch, half: bool, device: torch.device) -> Side:
    """Return the side of torchvision's RetinaNet on ResNet-50 with FPN; all layers are trained."""
    torchvision = import_torchvision()
    sides = batch["image"].shape[1:3]
    model = torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=C, min_size=min(sides), max_size=max(sides), _skip_resize=True
    )
    move_peer(model, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=half and device.type == "cuda")
    targets = [
        {"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64).to(device)} for boxes in boxes_of(batch)
    ]

    def images() -> list[Tensor]:
        return [image.permute(2, 0, 1).float() / 255 for image in batch["image"]]

    def training() -> Tensor:
        model.train()
        with autocast(device, half):
            loss = sum(model(images(), [target.copy() for target in targets]).values())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    def test() -> int:
        model.eval()
        with torch.inference_mode(), autocast(device, half):
            return sum(len(found["scores"].cpu()) for found in model(images()))

    training()  # for the moving statistics, if no training is timed
    return Side(peer_name("torchvision", device, half), training, test)


class _Operators(ModuleType):
    """The compiled module of mmcv, which mmcv-lite lacks: NMS is torchvision's, all others raise an error when called.

    RetinaNet needs no other on a CPU.
    """

    def __init__(self) -> None:
        super().__init__("mmcv._ext")
        self.__spec__ = ModuleSpec("mmcv._ext", loader=None)  # without a loader, mmengine knows mmcv-lite by it

    def nms(self, boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
        assert offset == 0
        return import_torchvision().ops.nms(boxes, scores, iou_threshold)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> None:
            raise NotImplementedError(f"mmcv-lite has no {name}")

        return missing


def import_mmdet() -> tuple[Path, str]:
    """Import MMDetection; return the folder of its config files and a line on what was replaced in it.

    Raises PeerMissingError if it is not installed.
    """
    try:
        import mmcv
        import mmdet
        import mmengine
    except (ImportError, AssertionError) as error:  # AssertionError: a version of mmcv that it refuses
        raise PeerMissingError(f"MMDetection is not installed ({error}): {INSTALL}") from None
    replaced = ""
    try:
        import mmcv._ext
    except ImportError:
        import_torchvision()
        sys.modules["mmcv._ext"] = mmcv._ext = _Operators()
        replaced = ", mmcv-lite without operators: NMS is torchvision's, the focal loss MMDetection's formula in torch"
        from mmdet.models.losses import focal_loss

        def formula(pred: Tensor, target: Tensor, *arguments: Any, **options: Any) -> Tensor:
            one_hot = nn.functional.one_hot(target, pred.size(1) + 1)[:, :-1]
            return focal_loss.py_sigmoid_focal_loss(pred, one_hot, *arguments, **options)

        focal_loss.sigmoid_focal_loss = formula  # what MMDetection calls on a GPU; on a CPU it uses the formula itself
    versions = f"MMDetection {mmdet.__version__}, mmengine {mmengine.__version__}, mmcv {mmcv.__version__}"
    return Path(mmdet.__file__).parent / ".mim" / "configs", versions + replaced


def mmdet_side(row: str, batch: Batch, half: bool, device: torch.device) -> Side:
    """Return the side of MMDetection's network, optimizer and test settings in its config for this row."""
    folder, _ = import_mmdet()
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmengine.config import Config
    from mmengine.logging import MMLogger
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import init_default_scope
    from mmengine.structures import InstanceData

    config = Config.fromfile(folder / MMDET_CONFIGS[row])
    init_default_scope("mmdet")
    MMLogger.get_current_instance().setLevel("ERROR")  # or it lists every parameter
    config.model.backbone.init_cfg = None  # the ImageNet weights would be downloaded
    model: Any = MODELS.build(config.model)
    model.init_weights()
    move_peer(model, device)
    config.optim_wrapper.optimizer.lr = LR
    uses_scaler = half and device.type == "cuda"
    if uses_scaler:
        config.optim_wrapper |= {"type": "AmpOptimWrapper", "dtype": "float16", "loss_scale": "dynamic"}
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    images = [image.permute(2, 0, 1).contiguous() for image in batch["image"]]  # as its pipeline packs them

    def data() -> dict[str, Any]:
        samples = []
        for image, boxes in zip(images, boxes_of(batch), strict=True):
            shape = tuple(image.shape[1:])
            sample = DetDataSample(metainfo={"img_shape": shape, "ori_shape": shape, "scale_factor": (1.0, 1.0)})
            sample.gt_instances = InstanceData(bboxes=boxes, labels=boxes.new_zeros(len(boxes), dtype=torch.int64))
            samples.append(sample)
        return {"inputs": images, "data_samples": samples}

    def training() -> Tensor:
        model.train()
        with autocast(device, half and not uses_scaler):
            return model.train_step(data(), wrapper)["loss"].detach()

    def test() -> int:
        model.eval()
        with torch.inference_mode(), autocast(device, half):
            return sum(len(sample.pred_instances.scores.cpu()) for sample in model.test_step(data()))

    training()  # for the moving statistics, if no training is timed
    return Side(peer_name("MMDetection", device, half), training, test)


def peer_sides(row: str, batch: Batch, halves: Sequence[bool], device: torch.device) -> Iterator[Side]:
    """Yield the sides of the peers that are installed."""
    builders: list[Callable[[bool], Side]] = [lambda half: mmdet_side(row, batch, half, device)]
    if row == "fpn":
        builders.append(lambda half: torchvision_side(batch, half, device))
    for builder in builders:
        with suppress(PeerMissingError):  # describe_peers has said so
            yield from map(builder, halves)


def measure(sides: Sequence[Side], phase: str, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of every side's steps, one per round and side, after one step that is not timed."""
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(1 + rounds):
        for side in sides:
            wait(device)
            start = time.perf_counter()
            result = side.training() if phase == "training" else side.test()
            wait(device)
            if number > 0:
                seconds[side.name].append(time.perf_counter() - start)
            if isinstance(result, Tensor) and not result.isfinite().all():
                raise FloatingPointError(f"{side.name}: the losses of a training step are not finite: {result}")
    return seconds


def table(title: str, sides: Sequence[Side], seconds: dict[str, list[float]], images: int) -> list[str]:
    """Return a Markdown table: seconds per image, minimum and median, and both divided by each of Necklace's."""
    statistic = {name: (min(row) / images, statistics.median(row) / images) for name, row in seconds.items()}
    ours = [side.name for side in sides if side.is_ours]
    lines = [
        f"| {title} | s/image, minimum | median | {' | '.join(f'/ {name}' for name in ours)} |",
        f"|---|---|---|{'---|' * len(ours)}",
    ]
    for side in sides:
        minimum, median = statistic[side.name]
        ratios = [f"{minimum / statistic[name][0]:.2f}, {median / statistic[name][1]:.2f}" for name in ours]
        lines.append(f"| {side.name} | {minimum:.3f} | {median:.3f} | {' | '.join(ratios)} |")
    return lines


def describe_peers() -> list[str]:
    """Return a line for each peer: its version and what was replaced in it, or how to install it."""
    lines = []
    for describe in (lambda: f"torchvision {import_torchvision().__version__}", lambda: import_mmdet()[1]):
        try:
            lines.append(describe())
        except PeerMissingError as error:
            lines.append(str(error))
    return list(dict.fromkeys(lines))  # MMDetection may lack torchvision, which is said once


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time training and testing beside torchvision and MMDetection.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=2, help="images per step")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--only", choices=PHASES, help="training or test alone")
    parser.add_argument("--rows", default="nasfpn,fpn", help="networks: nasfpn, fpn or both, separated by commas")
    parser.add_argument("--precision", choices=PRECISIONS, help="Necklace's, instead of float32 and half")
    parser.add_argument("--peer-half", action="store_true", help="the peers under torch.autocast too")
    arguments = parser.parse_args(argv)
    arguments.rows = arguments.rows.split(",")
    if unknown := set(arguments.rows) - set(CONFIGS):
        raise ValueError(f"--rows: expected nasfpn, fpn or both, got {', '.join(sorted(unknown))}")
    for name in ("batch", "rounds"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name}: expected 1 or more, got {getattr(arguments, name)}")
    return arguments


def main(argv: Sequence[str] | None = None, overrides: Sequence[str] = ()) -> None:
    """Print one table per network and phase. overrides: of Necklace's configs, in the form of --set."""
    arguments = parse(argv)
    warnings.filterwarnings("ignore", module=r"(mm\w+|torchvision)\b")
    device = torch.device(arguments.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, {arguments.batch} images per step, {arguments.rounds} rounds")
    print("\n".join([*library.notes, *describe_peers()]))
    batch_size = [f"General.batch_image={arguments.batch}", f"TestParam.batch_image={arguments.batch}"]
    for row in arguments.rows:
        sides = []
        for precision in [arguments.precision] if arguments.precision else PRECISIONS:
            side, batch = necklace_side(ROOT / CONFIGS[row], precision, [*batch_size, *overrides], device)
            sides.append(side)
        sides.extend(peer_sides(row, batch, [False, True] if arguments.peer_half else [False], device))
        if device.type == "cuda":  # process-wide: the same for all sides
            torch.backends.cudnn.benchmark = True  # as MMDetection's configs
            torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]  # torch's default
        for phase in [arguments.only] if arguments.only else PHASES:
            seconds = measure(sides, phase, arguments.rounds, device)
            print("\n".join(["", *table(f"{phase}, {row}", sides, seconds, arguments.batch)]), flush=True)
            if phase == "test":
                print("detections:", ", ".join(f"{side.test()} {side.name}" for side in sides))


if __name__ == "__main__":
    run(main)
