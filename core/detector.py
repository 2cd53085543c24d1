"""A trained detector to call from Python, on images from anywhere.

    from core.detector import Detector

    detector = Detector("experiments/birds")
    found = detector(["a.jpg", array])
    found[0].boxes, found[0].scores, found[0].names

D detections of an image of H x W pixels, K classes. Boxes are xyxy in pixels of the image, with exclusive corners: the
width of a box is x2 - x1. (Inside of the program corners are inclusive.)
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from PIL import Image

from config.load import load_config
from core.data.batch_reader import collate
from core.data.image import read_picture
from core.data.picture import picture_record
from core.engine.device import parse_device
from core.engine.engine import TorchEngine
from core.inference import detect
from core.report.draw import draw_detections
from core.report.evaluation import detections_to_coco
from core.tiles import Tile, cut, join
from core.trained import Trained, find_trained
from operator_cxx.build import usable_cpus

if TYPE_CHECKING:
    from config.schema import Config

Picture = str | Path | np.ndarray | Image.Image


@dataclass(frozen=True, eq=False)
class Found:
    """The detections of one image, best first."""

    path: str | None  # None for an image that was given as an array
    image: np.ndarray  # (H, W, 3) uint8 RGB
    # (D, 4) float32 xyxy, exclusive corners, pixels of the image; in an image that is enlarged to the input they end up
    # to a pixel behind its edge, as in the original system
    boxes: np.ndarray
    scores: np.ndarray  # (D,) float32
    class_ids: np.ndarray  # (D,) int64, 0..K-1: places in class_names
    class_names: tuple[str, ...]  # (K,) of the detector
    category_ids: tuple[int, ...]  # (K,) of the data set that it was trained on

    @property
    def names(self) -> np.ndarray:
        """(D,) class names."""
        return np.array([self.class_names[i] for i in self.class_ids], dtype=object)

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        best = f", best {self.names[0]} {self.scores[0]:.2f}" if len(self) else ""
        return f"<Found {len(self)} in {self.path or 'an array'}{best}>"

    def draw(self, min_score: float = 0.3) -> np.ndarray:
        """Return the image with its detections of at least `min_score` drawn, uint8 RGB, with a legend of classes."""
        rows = np.column_stack([self._inclusive, self.scores, self.class_ids + 1])  # (D, 6)
        return draw_detections(self.image, None, rows, self.class_names, min_score=min_score)

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """Return the detections as entries of COCO's result format: bbox is x, y, width, height."""
        return detections_to_coco(image_id, self._inclusive, self.scores, self.class_ids + 1, self.category_ids)

    @property
    def _inclusive(self) -> np.ndarray:
        """(D, 4) float64 boxes with inclusive corners."""
        return self.boxes.astype(np.float64) - (0, 0, 1, 1)


class FoundList(list[Found]):
    """The detections of several images, in the order of the images."""

    def draw(self, min_score: float = 0.3) -> list[np.ndarray]:
        """Return each image with its detections, as `Found.draw`."""
        return [found.draw(min_score) for found in self]

    def to_coco(self, image_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Return all detections as COCO's result format; image ids are 0, 1, ... unless given."""
        ids = range(len(self)) if image_ids is None else image_ids
        return [entry for found, image_id in zip(self, ids, strict=True) for entry in found.to_coco(image_id)]


class Detector:
    """A trained detector, called with images. It may be called from several threads; they take turns.

    source: an experiment's folder, whose newest checkpoint is used; one checkpoint file; or what
        `core.trained.find_trained` found, with which config, half and settings have no effect.
    config: the config file, which only checkpoints without a description of their detector need (MXNet's .params).
    device: such as "cpu" or "cuda:0"; None: the first GPU if there is one.
    half: whether to compute in the half type that the detector was trained in, where the device has it. A detector that
        was trained in float32 always computes in that.
    min_score: detections below it are left out.
    batch_image: images per forward pass; None: 8 on a GPU, 1 on a CPU.
    flip: detect in the mirrored images too, and merge (test-time augmentation).
    settings: `Section.field=value`, such as "TestParam.nms.thr=0.6", as --set of the command line.

    Raises FileNotFoundError and ValueError as `core.trained.find_trained` does, and ValueError for weights that do not
    fit and for a device that this machine does not have.
    """

    def __init__(
        self,
        source: str | Path | Trained,
        *,
        config: str | Path | None = None,
        device: str | torch.device | None = None,
        half: bool = True,
        min_score: float = 0.05,
        batch_image: int | None = None,
        flip: bool = False,
        settings: Sequence[str] = (),
    ) -> None:
        if not 0 <= min_score <= 1:
            raise ValueError(f"min_score: expected a number from 0 to 1, got {min_score}")
        if batch_image is not None and batch_image < 1:
            raise ValueError(f"batch_image: expected 1 or more images, got {batch_image}")
        overrides = [*settings, *([] if half else ["General.fp16=False", "General.bf16=False"])]
        trained = source if isinstance(source, Trained) else _find(source, config, overrides)
        weights, _, _ = trained.weights()
        self.config: Config = trained.config
        self.device = parse_device(device)
        self.class_names = trained.class_names
        self.category_ids = trained.category_ids
        self.min_score = min_score
        self.batch_image = batch_image or (8 if self.device.type == "cuda" else 1)
        self._network, _ = TorchEngine().build_detector(self.config, weights, self.device, trained.path)
        self._flip = flip
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        resize = self.config.ResizeParam
        return f"<Detector of {len(self.class_names)} classes, {resize.short} x {resize.long} on {self.device}>"

    @overload
    def __call__(self, images: Picture, *, tile: int | None = None, overlap: int = 64) -> Found: ...
    @overload
    def __call__(
        self, images: list[Any] | tuple[Any, ...], *, tile: int | None = None, overlap: int = 64
    ) -> FoundList: ...
    def __call__(
        self, images: Picture | list[Any] | tuple[Any, ...], *, tile: int | None = None, overlap: int = 64
    ) -> Found | FoundList:
        """Return the detections of one image, or those of each image of a sequence.

        images: paths, arrays (H, W, 3) or (H, W) uint8 RGB or grey, or Pillow's images; files are turned as their EXIF
            orientation says.
        tile: detect in tiles of this side too, in pixels of the image, that overlap by `overlap`; for images with
            objects that are small at the input's size.

        Raises FileNotFoundError for a missing file; ValueError, naming the image, for one that cannot be read, and for
        an array of another shape or type.
        """
        if isinstance(images, str | Path | np.ndarray | Image.Image):
            return next(self.stream([images], tile=tile, overlap=overlap))
        return FoundList(self.stream(images, tile=tile, overlap=overlap))

    def stream(
        self,
        images: Iterable[Picture],
        *,
        tile: int | None = None,
        overlap: int = 64,
        skip: Callable[[Picture, Exception], None] | None = None,
    ) -> Iterator[Found]:
        """Yield the detections of each image in turn, for any number of images; threads read files ahead.

        skip: called with each image that cannot be read, and the error, instead of raising it.
        """
        if tile is not None and not 0 <= overlap < tile:
            raise ValueError(f"expected an overlap from 0 to less than the tile's {tile} pixels, got {overlap}")
        waiting: list[tuple[str | None, np.ndarray]] = []
        for picture, read in _read_ahead(images, 2 * self.batch_image):
            try:
                pixels = read.result()
            except (ValueError, OSError) as error:
                if skip is None:
                    raise
                skip(picture, error)
                continue
            waiting.append((str(picture) if isinstance(picture, str | Path) else None, pixels))
            if len(waiting) == self.batch_image:
                yield from self._detect_images(waiting, tile, overlap)
                waiting = []
        yield from self._detect_images(waiting, tile, overlap)

    def _detect_images(
        self, images: Sequence[tuple[str | None, np.ndarray]], tile: int | None, overlap: int
    ) -> Iterator[Found]:
        parts = [cut(pixels.shape[0], pixels.shape[1], tile, overlap) for _, pixels in images]
        pieces = [part.of(pixels) for (_, pixels), tiles in zip(images, parts, strict=True) for part in tiles]
        rows = iter(self._detect_arrays(pieces))
        for (path, pixels), tiles in zip(images, parts, strict=True):
            yield self._found(path, pixels, [(part, next(rows)) for part in tiles])

    def _found(self, path: str | None, pixels: np.ndarray, parts: Sequence[tuple[Tile, np.ndarray]]) -> Found:
        """Return the detections of an image from those of its tiles, (D, 6) each: inclusive xyxy, score, class 1..K."""
        if len(parts) == 1:
            rows = parts[0][1]
        else:
            test = self.config.TestParam
            rows = join(parts, pixels.shape[:2], thr=test.nms.thr, max_det=test.max_det_per_image)
        rows = rows[rows[:, 4] >= self.min_score]
        boxes = rows[:, :4].copy()
        boxes[:, 2:] += 1
        classes = rows[:, 5].astype(np.int64) - 1
        return Found(path, pixels, boxes, rows[:, 4].copy(), classes, self.class_names, self.category_ids)

    def _detect_arrays(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the detections (D, 6) float32 of each image: inclusive xyxy, score, class 1..K."""
        transforms = self.config.test_transform.sample
        records = [picture_record(pixels, number, transforms) for number, pixels in enumerate(arrays)]
        records.sort(key=lambda record: record["image"].shape)  # a batch has one orientation
        found: dict[int, np.ndarray] = {}
        for _, group in groupby(records, key=lambda record: record["image"].shape):
            alike = list(group)
            batches = (alike[i : i + self.batch_image] for i in range(0, len(alike), self.batch_image))
            with self._lock:
                for image in detect(self.config, self._network, map(collate, batches), self.device, self._flip):
                    rows = np.column_stack([image.bbox, image.score, image.cls])
                    found[image.im_id] = rows.astype(np.float32).reshape(-1, 6)
        return [found[number] for number in range(len(arrays))]


def _find(source: str | Path, config: str | Path | None, overrides: Sequence[str]) -> Trained:
    given = None if config is None else load_config(config, is_train=False, overrides=overrides)
    return find_trained(source, given, overrides=overrides)


def _read_ahead(images: Iterable[Picture], ahead: int) -> Iterator[tuple[Picture, Future[np.ndarray]]]:
    """Yield each image with its pixels to come, while threads read up to `ahead` images further."""
    waiting: deque[tuple[Picture, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(min(4, usable_cpus())) as threads:
        try:
            for image in images:
                waiting.append((image, threads.submit(_pixels, image)))
                if len(waiting) > ahead:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for _, read in waiting:
                read.cancel()


def _pixels(image: Picture) -> np.ndarray:
    """Return an image as (H, W, 3) uint8 RGB."""
    if isinstance(image, str | Path | Image.Image):
        return read_picture(image)
    if not isinstance(image, np.ndarray):
        raise ValueError(f"an image: expected a path, an array or a Pillow image, got {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,)) or not image.size:
        raise ValueError(
            f"an image: expected uint8 (height, width, 3) RGB or (height, width) grey, got {image.dtype} {image.shape}"
        )
    grey = image if image.ndim == 3 else image[:, :, None]
    return np.ascontiguousarray(np.broadcast_to(grey, (*grey.shape[:2], 3)))
