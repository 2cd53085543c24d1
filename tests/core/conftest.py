"""Small COCO data sets in a temporary folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from core.image_set import ImageSet

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or fills the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("NECKLACE_CACHE", str(folder))
    return folder


@pytest.fixture
def write_coco(tmp_path: Path) -> Callable[..., ImageSet]:
    """Writes a data set: images as {file name: (height, width)}, boxes as (image, category id, bbox[, more])."""

    def write(
        sides: dict[str, tuple[int, int]],
        boxes: Sequence[tuple[Any, ...]] = (),
        name: str = "toy",
        **replaced: Any,
    ) -> ImageSet:
        folder = tmp_path / name
        (folder / "images").mkdir(parents=True)
        images = []
        for i, (file_name, (height, width)) in enumerate(sides.items()):
            images.append({"id": 100 + i, "file_name": file_name, "height": height, "width": width})
            (folder / "images" / file_name).parent.mkdir(exist_ok=True)
            Image.fromarray(noise(height, width, i)).save(folder / "images" / file_name)
        annotations = []
        for i, (image, category, bbox, *more) in enumerate(boxes):
            item = {"id": i, "image_id": 100 + image, "category_id": category, "bbox": bbox, "iscrowd": 0}
            annotations.append(item | {"area": bbox[2] * bbox[3]} | (more[0] if more else {}))
        content = {"images": images, "annotations": annotations, "categories": CATEGORIES} | replaced
        path = folder / "instances.json"
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        return ImageSet(name, str(path), str(folder / "images"))

    return write
