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

from config.image_set import ImageSet, class_names, resolve
from core.data.coco_index import CocoIndex
from core.data.image import read_image
from core.data.loader import TestLoader, make_test_loader
from core.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from core.engine.device import to_device
from core.engine.out_of_memory import explain_out_of_memory
from core.engines import choose_engine
from core.protocol import EngineName
from core.report.draw import draw_detections
from core.report.evaluation import Evaluation, can_evaluate, detections_to_coco, evaluate, write_result, write_scores
from core.report.progress import progress as show_progress
from core.report.train_log import append_event
from core.trained import Trained
from core.weights.checkpoint import Progress, find_weights
from models.record import Batch
from operator_cxx.nms import nms, soft_nms

if TYPE_CHECKING:
    from config.schema import Config

Network = Callable[..., Sequence[Tensor]]  # a test graph: inputs by name to cls_score, bbox_xyxy


DRAW_SCORE = 0.3  # detections below are not drawn


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
    evaluation: Evaluation | None  # None: no annotations, or neither hotcoco nor pycocotools is installed
    detections: list[Detections]

    @property
    def not_evaluated(self) -> str:
        """Reason why `evaluation` is None, for the log."""
        if self.index.has_annotation and not can_evaluate():
            return f"{self.index.image_set.name} is not evaluated: pip install hotcoco, and test again"
        return f"{self.index.image_set.name} has no annotations: nothing to evaluate"


def detect(
    config: Config, network: Network, batches: Iterable[Batch], device: torch.device, flip: bool = False
) -> Iterator[Detections]:
    """Yield the detections of every image of the batches, after the batch transforms of config.test_transform.

    flip: detect in the mirrored images too; NMS takes the candidates of both.
    """
    for batch in batches:
        batch = to_device(batch, device)
        for transform in config.test_transform.batch:
            transform.apply(batch)
        with torch.inference_mode():
            cls_score, bbox_xyxy = network(data=batch["data"], im_info=batch["im_info"])
            if flip:
                mirrored = _mirror_images(batch["data"], batch["im_info"])
                other_score, other_bbox = network(data=mirrored, im_info=batch["im_info"])
                cls_score = torch.cat([cls_score, other_score], dim=1)
                bbox_xyxy = torch.cat([bbox_xyxy, _mirror_boxes(other_bbox, batch["im_info"])], dim=1)
            bbox, score, cls = apply_nms(config, cls_score, bbox_xyxy)
            bbox = bbox / batch["im_info"][:, None, 2:]
        bbox, score, cls, im_id = bbox.cpu(), score.cpu(), cls.cpu(), batch["im_id"].tolist()
        for i, path in enumerate(batch["files"]):
            kept = cls[i] >= 0
            yield Detections(im_id[i], path, bbox[i][kept].numpy(), score[i][kept].numpy(), cls[i][kept].numpy())


def _mirror_images(data: Tensor, im_info: Tensor) -> Tensor:
    """Return images (N, 3, H, W) mirrored within their widths of im_info (N, 3); the padding stays at the right."""
    column = torch.arange(data.shape[3], device=data.device)
    width = im_info[:, 1:2].long()
    source = torch.where(column < width, width - 1 - column, column)  # (N, W)
    mirrored = data.take_along_dim(source[:, None, None, :], dim=3)
    return mirrored.contiguous(memory_format=torch.channels_last)


def _mirror_boxes(bbox: Tensor, im_info: Tensor) -> Tensor:
    """Return boxes (N, M, 4) of mirrored images in the images: x1' = w - 1 - x2, x2' = w - 1 - x1."""
    x1, y1, x2, y2 = bbox.unbind(dim=2)
    last = im_info[:, 1:2] - 1
    return torch.stack([last - x2, y1, last - x1, y2], dim=2)


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
    network: Network,
    image_set: str | ImageSet,
    folder: Path,
    device: torch.device,
    group: ProcessGroup = SINGLE_PROCESS,
    *,
    checkpoint: str,
    flip: bool = False,
) -> TestResult | None:
    """Detect in every image and write `<image_set>_result.json` into `folder`; if there are annotations, evaluate and
    write `<image_set>_scores.json`, which names the `checkpoint`.

    Each rank detects in its share of the images; the main process gathers, writes and evaluates the detections, which
    equal those of a single process. The other ranks return None.
    """
    loader = make_test_loader(config, image_set, group.rank, group.world_size)
    (index,) = loader.dataset.indexes
    found = detect(config, network, loader, device, flip)
    detections = list(
        show_progress(found, len(loader.positions(group.rank)), index.image_set.name, group.is_main_process)
    )
    if group.world_size > 1:
        detections = gather_detections(loader, detections, device)
    if not group.is_main_process:
        return None
    path = folder / result_name(index, str(config.General.name))
    write_result(path, coco_entries(detections, index.category_ids))
    annotation = config.TestParam.coco.annotation or index.image_set.annotation
    evaluation = None
    if can_evaluate() and (config.TestParam.coco.annotation is not None or index.has_annotation):
        evaluation = evaluate(annotation, path, config.TestParam.max_det_per_image)
        write_scores(folder / f"{index.image_set.name}_scores.json", evaluation, index.image_set.name, checkpoint)
    return TestResult(index, path, evaluation, detections)


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
    trained: Trained,
    num_draw: int = 0,
    group: ProcessGroup = SINGLE_PROCESS,
    device: torch.device | None = None,
    engine: EngineName = "torch",
    *,
    draw_score: float = DRAW_SCORE,
    flip: bool = False,
    allow_mismatch: bool = False,
) -> list[TestResult]:
    """Test a checkpoint on every image set of its config and print the results; see `detection_test.py`.

    Results are written to `result_folder`, and the scores to the experiment's log too. The ranks of `group` share the
    images, each on its own `device` (None: the engine's choice); the main process writes, prints and returns the
    results. Raises FileNotFoundError and ValueError for weights or images that are missing or do not fit, and for
    images with other classes unless `allow_mismatch` is set; MemoryError for a batch that does not fit.
    """
    config, path = trained.config, trained.path
    chosen = choose_engine(engine)
    device = device or chosen.select_device(config, is_train=False)
    folder = result_folder(trained.folder, path)
    weights, progress, lines = trained.weights()
    for image_set in config.DatasetParam.image_set:
        if not allow_mismatch:
            _require_classes(trained, progress, resolve(image_set, config.DatasetParam.data_root))
    network, notes = chosen.build_detector(config, weights, device, path)
    folder.mkdir(parents=True, exist_ok=True)
    if group.is_main_process:
        for note in [*config.notes, *trained.notes, *lines, *notes]:
            print(note)
        print(f"testing {path} (epoch {progress.epoch}, step {progress.step})")
    results = []
    for image_set in config.DatasetParam.image_set:
        with explain_out_of_memory(config, device, "the test", is_test=True):
            tested = test_image_set(config, network, image_set, folder, device, group, checkpoint=path.name, flip=flip)
        if tested is None:
            continue
        print(f"wrote {tested.result}")
        if tested.evaluation is None:
            print(tested.not_evaluated)
        else:
            print(tested.evaluation.table)
            _log_scores(trained, progress, tested, flip)
        for picture in draw_results(tested, folder, num_draw, draw_score):
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


def _log_scores(trained: Trained, progress: Progress, tested: TestResult, flip: bool) -> None:
    """Add the scores of a test to the log of the experiment that the weights belong to."""
    assert tested.evaluation is not None
    append_event(
        trained.path.parent,
        "test",
        step=progress.step,
        epoch=progress.epoch,
        checkpoint=trained.path.name,
        image_set=tested.index.image_set.name,
        flip=flip,
        **tested.evaluation.scores,
    )


def _require_classes(trained: Trained, progress: Progress, image_set: ImageSet) -> None:
    """Raise ValueError if the images have other classes than those that the weights were trained on."""
    names = class_names(image_set) if Path(image_set.annotation).is_file() else ()
    known = progress.class_names
    if names and known and names != known:
        raise ValueError(
            f"{trained.path} was trained on the classes {_shorten(known)}; the images of {image_set.name} have "
            f"{_shorten(names)}: test on image sets with the categories that it was trained on, or add "
            "--allow-mismatch"
        )


def draw_results(tested: TestResult, folder: Path, num_draw: int, min_score: float = DRAW_SCORE) -> list[Path]:
    """Draw the first `num_draw` images, ground truth beside detections, to files in `folder`/draw_<image set>.

    Detections below min_score are left out; without annotations there is no ground truth beside them.
    """
    index = tested.index
    row_of = {int(im_id): row for row, im_id in enumerate(index.image_id)}
    out = folder / f"draw_{index.image_set.name}"
    pictures = []
    for image in tested.detections[:num_draw]:
        row = row_of[image.im_id]
        pixels = read_image(image.path, int(index.height[row]), int(index.width[row]))
        found = np.column_stack([image.bbox, image.score, image.cls])  # (D, 6)
        truth = index.gt_bbox(row) if index.has_annotation else None
        drawn = draw_detections(pixels, truth, found, index.class_names, min_score=min_score)
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
