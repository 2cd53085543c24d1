"""Fixtures: config files and annotations, without images on disk."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

NASFPN_640 = "retina_r50v1b_nasfpn_640_7@256_25epoch"


@pytest.fixture
def config_folder() -> Path:
    return Path(__file__).parents[2] / "config"


@pytest.fixture
def nasfpn_640(config_folder: Path) -> Path:
    return config_folder / "NASFPN" / f"{NASFPN_640}.py"


@pytest.fixture
def no_data(tmp_path: Path) -> str:
    """The override for a data root without data, independent of ./data."""
    return f"DatasetParam.data_root={tmp_path / 'none'}"


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[str], Path]:
    """A function that writes a config file whose get_config applies the given lines to the recipe."""

    def write(*lines: str) -> Path:
        head = [
            "from config.NASFPN.recipe import retina_25epoch",
            "def get_config(is_train):",
            "    config = retina_25epoch(is_train)",
        ]
        path = tmp_path / "small@1_test.py"
        path.write_text("\n".join([*head, *(f"    {line}" for line in lines), "    return config", ""]))
        return path

    return write


@pytest.fixture
def write_annotation(tmp_path: Path) -> Callable[[str, Sequence[str]], Path]:
    """A function that writes the annotation file of image set `name` with these classes and returns the data root."""

    def write(name: str, classes: Sequence[str]) -> Path:
        dataset, split = name.split("_")
        path = tmp_path / "data" / dataset / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        categories = [{"id": 10 * i, "name": one} for i, one in enumerate(classes, start=1)]
        path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
        return tmp_path / "data"

    return write
