"""Detection in image files and videos: one json, and pictures or videos with the detections drawn.

The json is a list in COCO's result format with `file_name`, `category` and, for videos, `frame` beside COCO's fields.
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from core.data.picture import IMAGE_SUFFIXES, files_below
from core.detector import Detector, Found, Picture
from core.report.evaluation import write_result
from core.report.progress import progress
from core.run.atomic_file import atomic_file
from core.trained import Trained

RESULT = "detections.json"
VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})


def detect_files(
    trained: Trained,
    paths: Sequence[str],
    out: Path,
    device: torch.device,
    *,
    min_score: float,
    num_draw: int | None = None,
    tile: int | None = None,
    overlap: int = 64,
    flip: bool = False,
) -> int:
    """Detect in files, folders, patterns and videos, write the results into `out`, and print what was written.

    min_score: detections below are left out. num_draw: pictures to draw; None: all. tile, overlap: as in
    `core.detector.Detector`. Returns the exit status: 1 if a file was skipped because it could not be read, each of
    which is named.

    Raises FileNotFoundError for a path without images and ValueError for a video that cannot be decoded, before
    anything is written.
    """
    images, videos = find_files(paths)
    names = _picture_names(images)
    if taken := {(out / name).resolve() for name in names} & {path.resolve() for path in (*images, *videos)}:
        raise ValueError(f"--out {out}: a picture would overwrite the image {min(taken)}; name another folder")
    detector = Detector(trained, device=device, min_score=min_score, flip=flip)
    for line in trained.notes:
        print(line)
    print(f"detecting with {trained.path}")
    entries: list[dict[str, Any]] = []
    skipped: list[Path] = []

    def skip(picture: Picture, error: Exception) -> None:
        skipped.append(Path(str(picture)))
        print(f"skipped {picture}: {error}", file=sys.stderr)

    order = {str(path): number for number, path in enumerate(images)}
    drawn = 0
    for found in progress(detector.stream(images, tile=tile, overlap=overlap, skip=skip), len(images), "images"):
        assert found.path is not None
        number = order[found.path]
        entries += _entries(found, number, found.path)
        if num_draw is None or drawn < num_draw:
            _save(found.draw(min_score), out / names[number])
            drawn += 1
    for number, video in enumerate(videos, start=len(images)):
        entries += _detect_video(detector, video, number, out if num_draw != 0 else None, min_score, tile, overlap)
    write_result(out / RESULT, entries)
    print(f"wrote {out / RESULT}: {len(entries)} detections in {len(images) - len(skipped)} images")
    if drawn:
        print(f"wrote {drawn} pictures to {out}")
    if skipped:
        print(f"{len(skipped)} of {len(images)} images could not be read and were skipped", file=sys.stderr)
    return 1 if skipped else 0


def find_files(paths: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Return the images and the videos that paths name: files, folders (all below them) and glob patterns.

    Raises FileNotFoundError for a path that does not exist, and for a folder or a pattern without images.
    """
    images: dict[Path, None] = {}
    videos: dict[Path, None] = {}
    for given in paths:
        path = Path(given)
        if path.is_file():
            found = [path]
        elif path.is_dir():
            found = files_below(path, IMAGE_SUFFIXES | VIDEO_SUFFIXES)
        else:
            found = [p for p in map(Path, sorted(glob.glob(given, recursive=True))) if p.is_file()]
        if not found:
            what = "holds no images or videos" if path.is_dir() else "does not exist, nor does a file match it"
            raise FileNotFoundError(f"--images: {given} {what}; expected image files, folders, patterns or videos")
        for file in found:
            (videos if file.suffix.lower() in VIDEO_SUFFIXES else images)[file] = None
    for video in videos:
        _open(video).release()
    return list(images), list(videos)


def _picture_names(images: Sequence[Path]) -> list[str]:
    """Return a file name for the picture of each image; images of one name in different folders get a number."""
    names: dict[str, None] = {}
    for path in images:
        name, number = f"{path.stem}.jpg", 1
        while name in names:
            number += 1
            name = f"{path.stem}-{number}.jpg"
        names[name] = None
    return list(names)


def _entries(found: Found, image_id: int, file_name: str) -> Iterator[dict[str, Any]]:
    for entry, name in zip(found.to_coco(image_id), found.names, strict=True):
        yield {"file_name": file_name, "category": name, **entry}


def _save(picture: np.ndarray, path: Path) -> None:
    with atomic_file(path) as handle:
        Image.fromarray(picture).save(handle, "JPEG", quality=90)


def _open(path: Path) -> cv2.VideoCapture:
    video = cv2.VideoCapture(str(path))
    if not video.isOpened() or video.get(cv2.CAP_PROP_FRAME_WIDTH) < 1:
        raise ValueError(
            f"{path}: OpenCV has no decoder for this video, or it is damaged; convert it, for example to H.264 in mp4, "
            "or give its frames as images"
        )
    return video


def _frames(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while True:
        is_read, frame = video.read()
        if not is_read:
            return
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


def _detect_video(
    detector: Detector, path: Path, number: int, out: Path | None, min_score: float, tile: int | None, overlap: int
) -> list[dict[str, Any]]:
    """Return the detections of a video's frames; writes the video with them drawn into `out`, if given."""
    video = _open(path)
    count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    entries: list[dict[str, Any]] = []
    writer: cv2.VideoWriter | None = None
    target = None if out is None else out / f"{path.stem}-detected.mp4"
    frames = progress(detector.stream(_frames(video), tile=tile, overlap=overlap), max(count, 0) or None, path.name)
    for frame, found in enumerate(frames):
        entries += [{**entry, "frame": frame} for entry in _entries(found, number, str(path))]
        if target is not None:
            picture = found.draw(min_score)
            if writer is None:
                target.parent.mkdir(parents=True, exist_ok=True)
                sides = picture.shape[1] // 2 * 2, picture.shape[0] // 2 * 2
                writer = cv2.VideoWriter(
                    str(target), cv2.VideoWriter.fourcc(*"mp4v"), video.get(cv2.CAP_PROP_FPS) or 25.0, sides
                )
            writer.write(cv2.cvtColor(_fit(picture, sides), cv2.COLOR_RGB2BGR))
    video.release()
    if writer is not None:
        writer.release()
        print(f"wrote {target}")
    return entries


def _fit(picture: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """Return a picture cut or padded below to (width, height): the height of the legend varies."""
    fitted = np.full((sides[1], sides[0], 3), 250, np.uint8)
    part = picture[: sides[1], : sides[0]]
    fitted[: part.shape[0], : part.shape[1]] = part
    return fitted
