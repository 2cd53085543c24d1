"""Publishing and fetching, against a stand-in of the hub's client that keeps repositories as folders."""

from __future__ import annotations

import fnmatch
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from config.description import describe
from config.image_set import resolve
from config.load import load_config
from core.data.coco_index import open_index
from core.detector import Detector
from core.trained import find_trained
from core.weights.checkpoint import Progress, save_checkpoint
from symbol import lower
from tests.small_config import DEMO, SMALL_NETWORK
from utils import hub
from utils.make_demo_dataset import make_demo_dataset


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NECKLACE_CACHE", str(tmp_path / "cache"))
    make_demo_dataset(tmp_path / "data" / "demo", train=1, val=1, size=128, seed=3)
    settings = [*SMALL_NETWORK, f"DatasetParam.data_root={tmp_path / 'data'}", "RpnParam.proposal.min_det_score=0.0"]
    config = load_config(DEMO, is_train=True, overrides=settings)
    index = open_index(resolve("demo_train", str(tmp_path / "data")))
    folder = tmp_path / "experiments" / "shapes"
    progress = Progress(epoch=3, step=15, seed=0, experiment="shapes", class_names=index.class_names)
    weights = lower(config.ModelParam.test_symbol).state_dict()
    save_checkpoint(
        folder, "checkpoint-0003", weights, {}, progress, description=describe(config, [index], {"torch": "2"})
    )
    (folder / "demo_val_scores.json").write_text(
        json.dumps({"checkpoint": "checkpoint-0003.safetensors", "stats": {"AP": 0.5, "AP50": 0.75}})
    )
    (folder / "other_scores.json").write_text('{"checkpoint": "checkpoint-0002.safetensors"}')
    (folder / "log.jsonl").write_text(
        '{"event": "eval", "epoch": 2, "AP": 0.55}\n{"event": "eval", "epoch": 3, "AP": 0.5}\n'
    )
    return folder


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace huggingface_hub; returns the folder of the repositories."""
    repositories = tmp_path / "hub"

    class HfApi:
        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
            (repositories / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            (repositories / repo_id / ".private").write_text(str(private))
            return f"hub/{repo_id}"

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
            assert commit_message
            shutil.copytree(folder_path, repositories / repo_id, dirs_exist_ok=True)

    def snapshot_download(repo_id: str, *, revision: str | None, local_dir: str, allow_patterns: list[str]) -> str:
        Path(local_dir).mkdir(parents=True, exist_ok=True)
        for path in (repositories / repo_id).iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, local_dir)
        return local_dir

    module: Any = SimpleNamespace(HfApi=HfApi, snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return repositories


def test_a_detector_comes_back_as_it_was_pushed(experiment: Path, client: Path, tmp_path: Path) -> None:
    assert hub.main(["push", "--experiment", str(experiment), "--repo", "me/shapes", "--private"]) == 0
    assert (client / "me/shapes/.private").read_text() == "True"
    out = tmp_path / "pulled"
    assert hub.main(["pull", "--repo", "me/shapes", "--out", str(out)]) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == ["README.md", "checkpoint-0003.safetensors", "checkpoint-symbol.json", "demo_val_scores.json"]
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    mine, theirs = (Detector(folder, device="cpu", min_score=0)(image) for folder in (experiment, out))
    assert len(mine) > 0
    np.testing.assert_array_equal(mine.boxes, theirs.boxes)


def test_the_card_tells_where_the_detector_comes_from(experiment: Path, tmp_path: Path) -> None:
    folder = tmp_path / "card"
    arguments = ["push", "--experiment", str(experiment), "--repo", "me/shapes", "--license", "mit"]
    assert hub.main([*arguments, "--dry-run", str(folder)]) == 0
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: necklace\n")
    trained_set = find_trained(experiment).description
    assert trained_set is not None
    for text in (
        "license: mit",
        "circle, cross, ring, square, star, triangle",
        "trained on demo_train | 1 images",
        trained_set.train_sets[0].sha256,
        "| 3 epochs, 15 steps, seed 0 |",
        "best AP while training | 0.550 after epoch 2",
        "| demo_val | 0.500 | 0.750 |",
        "python3 utils/hub.py pull --repo me/shapes",
    ):
        assert text in card


def test_what_cannot_be_pulled_is_one_message(experiment: Path, client: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has checkpoints already"):
        hub.main(["pull", "--repo", "me/shapes", "--out", str(experiment)])
    (client / "me/empty").mkdir(parents=True)
    with pytest.raises(ValueError, match="me/empty has no checkpoint of this program"):
        hub.main(["pull", "--repo", "me/empty", "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="expected USER/NAME, got 'shapes'"):
        hub.main(["pull", "--repo", "shapes"])


def test_without_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install -e \"\.\[hub\]\""):
        hub.hub()
