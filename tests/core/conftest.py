"""Fixtures: small COCO data sets in a temporary folder, and training runs on one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from config.image_set import ImageSet
from config.load import format_config, load_config
from config.schema import Config
from core.detection_module import fit
from tests.small_config import DEMO, SMALL_TRAINING
from utils.make_demo_dataset import make_demo_dataset

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set a temporary cache, so that tests neither read nor write the user's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("NECKLACE_CACHE", str(folder))
    return folder


@pytest.fixture
def write_coco(tmp_path: Path) -> Callable[..., ImageSet]:
    """Write a data set: images as {file name: (height, width)}, boxes as (image, category id, bbox[, more])."""

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


Run = Callable[..., Config]


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_demo_dataset(root / "demo", train=9, val=4, size=128, seed=3)
    return root


@pytest.fixture
def load(data_root: Path, tmp_path: Path) -> Run:
    """Load the small config with overrides. 9 images twice in batches of 4: 5 steps per epoch."""

    def load(*overrides: str, name: str = "run") -> Config:
        places = [f"General.output_root={tmp_path}", f"General.name={name}", f"DatasetParam.data_root={data_root}"]
        return load_config(str(DEMO), is_train=True, overrides=[*SMALL_TRAINING, *places, *overrides])

    return load


@pytest.fixture
def run(load: Run) -> Run:
    """Train the small config with overrides; `resume` and `name` are keywords."""

    def train(*overrides: str, resume: bool = False, name: str = "run") -> Config:
        config = load(*overrides, name=name)
        fit(config, format_config(config), resume)
        return config

    return train
