"""Testing: weights and an image set in, a COCO result file and its evaluation out.

N images of a batch, M candidates and D detections of an image, C classes. Boxes are xyxy with inclusive corners.
"""

# ruff: noqa: PT028 (test and test_image_set are not pytest's)

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from config.image_set import ImageSet
from core.data.coco_index import CocoIndex
from core.data.image import read_image
from core.data.loader import TestLoader, make_test_loader
from core.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from core.engine.device import to_device
from core.engine.out_of_memory import explain_out_of_memory
from core.engines import choose_engine
from core.protocol import EngineName
from core.report.draw import draw_detections
from core.report.evaluation import Evaluation, can_evaluate, detections_to_coco, evaluate, write_result
from core.run.experiment import experiment_folder
from core.weights.checkpoint import find_weights
from core.weights.first_weights import load_given_weights
from core.weights.simpledet_weights import from_simpledet
from models.record import Batch
from operator_cxx.nms import nms, soft_nms

if TYPE_CHECKING:
    from config.schema import Config

Detector = Callable[..., Sequence[Tensor]]  # a test graph: inputs by name to cls_score, bbox_xyxy


@dataclass(frozen=True)
class Detections:
    """The detections of one image, best first."""

    im_id: int
    path: str
    bbox: np.ndarray  # (D, 4) xyxy, inclusive, pixels of the original image
    score: np.ndarray  # (D,)
    cls: np.ndarray  # (D,) 1..C


@dataclass(frozen=True)
class TestResult:
    """A finished test."""

    __test__ = False  # not pytest's

    index: CocoIndex  # of the images that were tested
    result: Path  # COCO's result format
    evaluation: Evaluation | None  # None: no annotations, or pycocotools is not installed
    detections: list[Detections]

    @property
    def not_evaluated(self) -> str:
        """Reason why `evaluation` is None, for the log."""
        if self.index.has_annotation and not can_evaluate():
            return f"{self.index.image_set.name} is not evaluated: pip install pycocotools, and test again"
        return f"{self.index.image_set.name} has no annotations: nothing to evaluate"


def detect(config: Config, detector: Detector, batches: Iterable[Batch], device: torch.device) -> Iterator[Detections]:
    """Yield the detections of every image of the batches, after the batch transforms of config.test_transform."""
    for batch in batches:
        batch = to_device(batch, device)
        for transform in config.test_transform.batch:
            transform.apply(batch)
        with torch.inference_mode():
            cls_score, bbox_xyxy = detector(data=batch["data"], im_info=batch["im_info"])
            bbox, score, cls = apply_nms(config, cls_score, bbox_xyxy)
            bbox = bbox / batch["im_info"][:, None, 2:]
        bbox, score, cls, im_id = bbox.cpu(), score.cpu(), cls.cpu(), batch["im_id"].tolist()
        for i, path in enumerate(batch["files"]):
            kept = cls[i] >= 0
            yield Detections(im_id[i], path, bbox[i][kept].numpy(), score[i][kept].numpy(), cls[i][kept].numpy())


def apply_nms(config: Config, cls_score: Tensor, bbox: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the detections among candidates cls_score (N, M, C + 1) and bbox (N, M, 4), best first: bbox (N, D, 4),
    score (N, D) and cls (N, D), padded with cls -1; D = max_det_per_image."""
    test = config.TestParam
    score, cls = cls_score.max(dim=2)  # each row has one class above 0
    thr, max_det, min_score = test.nms.thr, test.max_det_per_image, test.min_det_score
    if test.nms.type == "nms":
        index, score = nms(bbox, score, cls, thr=thr, max_det=max_det, min_score=min_score)
    else:
        method: Literal["linear", "gaussian"] = "linear" if test.nms.type == "soft_linear" else "gaussian"
        min_score = max(min_score, test.nms.min_score)
        index, score = soft_nms(
            bbox, score, cls, method=method, thr=thr, sigma=test.nms.sigma, min_score=min_score, max_det=max_det
        )
    row = index.clamp(min=0)
    return bbox.take_along_dim(row[..., None], 1), score, torch.where(index < 0, -1, cls.take_along_dim(row, 1))


def test_image_set(
    config: Config,
    detector: Detector,
    image_set: str | ImageSet,
    folder: Path,
    device: torch.device,
    group: ProcessGroup = SINGLE_PROCESS,
) -> TestResult | None:
    """Detect in every image, write the result file into `folder`, and evaluate if there are annotations.

    Each rank detects in its share of the images; the main process gathers, writes and evaluates the detections, which
    equal those of a single process. The other ranks return None.
    """
    loader = make_test_loader(config, image_set, group.rank, group.world_size)
    (index,) = loader.dataset.indexes
    detections = list(detect(config, detector, loader, device))
    if group.world_size > 1:
        detections = gather_detections(loader, detections, device)
    if not group.is_main_process:
        return None
    path = folder / result_name(index, str(config.General.name))
    write_result(path, coco_entries(detections, index.category_ids))
    annotation = config.TestParam.coco.annotation or index.image_set.annotation
    evaluated = can_evaluate() and (config.TestParam.coco.annotation is not None or index.has_annotation)
    return TestResult(index, path, evaluate(annotation, path) if evaluated else None, detections)


def gather_detections(loader: TestLoader, own: Sequence[Detections], device: torch.device) -> list[Detections]:
    """Return the detections of all ranks on the main process, in the order of a single process; nothing on the others.

    They are sent as tensors on `device`, the default group's: no process unpickles data of another.
    """
    counts = torch.tensor([len(image.score) for image in own], dtype=torch.int64)
    rows = np.concatenate(
        [np.empty((0, 6)), *(np.column_stack([image.bbox, image.score, image.cls]) for image in own)], dtype=np.float64
    )  # (sum of D, 6)
    all_counts = _gather(counts, device)
    all_rows = _gather(torch.from_numpy(rows), device)  # float64 holds every box, score and class exactly
    if loader.rank > 0:
        return []
    gathered: dict[int, Detections] = {}
    for rank, (rank_counts, rank_rows) in enumerate(zip(all_counts, all_rows, strict=True)):
        for i, image_rows in zip(loader.positions(rank), rank_rows.split(rank_counts.tolist()), strict=True):
            record = loader.dataset.record(0, loader.sample_at(i))
            bbox, score, cls = (column.numpy() for column in image_rows.split([4, 1, 1], dim=1))
            gathered[i] = Detections(
                im_id=int(record["im_id"]),
                path=record["image_path"],
                bbox=bbox.astype(np.float32),
                score=score[:, 0].astype(np.float32),
                cls=cls[:, 0].astype(np.int64),
            )
    return [gathered[i] for i in sorted(gathered)]


def _gather(own: Tensor, device: torch.device) -> list[Tensor]:
    """Return the tensors of all ranks, in their order. Lengths may differ, so they are sent padded."""
    lengths = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    lengths[dist.get_rank()] = len(own)
    dist.all_reduce(lengths)
    padded = own.new_zeros((int(lengths.max()), *own.shape[1:]), device=device)
    padded[: len(own)] = own.to(device)
    received = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(received, padded)
    return [tensor[:length].cpu() for tensor, length in zip(received, lengths.tolist(), strict=True)]


test_image_set.__test__ = False  # type: ignore[attr-defined]  # not pytest's


def test(
    config: Config,
    checkpoint: Path | None,
    epoch: int | None,
    num_draw: int,
    group: ProcessGroup = SINGLE_PROCESS,
    device: torch.device | None = None,
    engine: EngineName = "torch",
) -> list[TestResult]:
    """Test on every image set of the config and print the results; see `detection_test.py`.

    checkpoint: a weights file; None: the experiment's after `epoch` epochs, or its newest. Results are written to
    `result_folder`. The ranks of `group` share the images, each on its own `device` (None: the engine's choice); the
    main process writes, prints and returns the results. Raises FileNotFoundError and ValueError for weights or images
    that are missing or do not fit, MemoryError for a batch that does not fit.
    """
    chosen = choose_engine(engine)
    device = device or chosen.select_device(config, is_train=False)
    path = checkpoint or find_weights(experiment_folder(config), epoch)
    folder = result_folder(experiment_folder(config), path)
    weights, progress = load_given_weights(path)
    names = config.DatasetParam.class_names
    if names and progress.class_names and names != progress.class_names:
        raise ValueError(
            f"{path} was trained on the classes {_shorten(progress.class_names)}; the images have "
            f"{_shorten(names)}: test on image sets with the categories that it was trained on"
        )
    graph = config.ModelParam.test_symbol
    expected = {*graph.list_arguments(), *graph.list_auxiliary_states()}
    weights, lines = from_simpledet(weights, expected, config.NormalizeParam, path)
    detector, notes = chosen.build_detector(config, weights, device, path)
    folder.mkdir(parents=True, exist_ok=True)
    if group.is_main_process:
        for note in [*config.notes, *lines, *notes]:
            print(note)
        print(f"testing {path} (epoch {progress.epoch}, step {progress.step})")
    results = []
    for image_set in config.DatasetParam.image_set:
        with explain_out_of_memory(config, device, "the test", is_test=True):
            tested = test_image_set(config, detector, image_set, folder, device, group)
        if tested is None:
            continue
        print(f"wrote {tested.result}")
        if tested.evaluation is None:
            print(tested.not_evaluated)
        else:
            print(tested.evaluation.table)
        for picture in draw_results(tested, folder, num_draw):
            print(f"wrote {picture}")
        results.append(tested)
    return results


test.__test__ = False  # type: ignore[attr-defined]  # not pytest's


def result_folder(experiment: Path, weights: Path) -> Path:
    """Return the folder for the results of these weights.

    The experiment's folder has the results of its newest checkpoint; those of other weights are in subfolders, so that
    no test overwrites the result of other weights.
    """
    try:
        if find_weights(experiment).samefile(weights):
            return experiment
    except (OSError, ValueError):  # no checkpoint, or a damaged one: neither matters to a test of other weights
        pass
    parent = weights.parent.resolve()
    origin = "" if parent == experiment.resolve() else f"{parent.name}-"
    return experiment / f"tested-{origin}{weights.stem}"


def draw_results(tested: TestResult, folder: Path, num_draw: int) -> list[Path]:
    """Draw the first `num_draw` images, ground truth beside detections, to files in `folder`/draw_<image set>."""
    index = tested.index
    row_of = {int(im_id): row for row, im_id in enumerate(index.image_id)}
    out = folder / f"draw_{index.image_set.name}"
    pictures = []
    for image in tested.detections[:num_draw]:
        row = row_of[image.im_id]
        pixels = read_image(image.path, int(index.height[row]), int(index.width[row]))
        found = np.column_stack([image.bbox, image.score, image.cls])  # (D, 6)
        drawn = draw_detections(pixels, index.gt_bbox(row), found, index.class_names)
        out.mkdir(parents=True, exist_ok=True)
        pictures.append(out / f"{Path(image.path).stem}_{image.im_id}.png")
        Image.fromarray(drawn).save(pictures[-1])
    return pictures


def _shorten(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


def coco_entries(detections: Sequence[Detections], category_ids: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield entries of COCO's result format, in the order of the detections."""
    for image in detections:
        yield from detections_to_coco(image.im_id, image.bbox, image.score, image.cls, category_ids)


def result_name(index: CocoIndex, experiment: str) -> str:
    """Return `<image_set>_result.json`; without annotations the name that COCO's evaluation server requires,
    `detections_<split>_<algorithm>_results.json`."""
    name = index.image_set.name
    if index.has_annotation:
        return f"{name}_result.json"
    return f"detections_{name.removeprefix('coco_')}_{experiment}_results.json"
