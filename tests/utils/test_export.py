"""The export program, and the example of doc/export.md on its file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from config.description import describe
from config.image_set import resolve
from config.load import load_config
from core.data.coco_index import open_index
from core.weights.checkpoint import Progress, epoch_stem, save_checkpoint
from symbol import lower
from tests.small_config import DEMO, SMALL_NETWORK
from utils import export
from utils.make_demo_dataset import make_demo_dataset

ROOT = Path(__file__).parents[2]
CLASSES = ("circle", "cross", "ring", "square", "star", "triangle")
SETTINGS = [*SMALL_NETWORK, "TestParam.max_det_per_image=10"]


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the arguments for an untrained experiment and its images, without --out."""
    monkeypatch.setenv("NECKLACE_CACHE", str(tmp_path / "cache"))
    make_demo_dataset(tmp_path / "data" / "demo", train=1, val=3, size=128, seed=3)
    places = [f"General.output_root={tmp_path}", "General.name=run", f"DatasetParam.data_root={tmp_path / 'data'}"]
    config = load_config(DEMO, False, [*SETTINGS, *places])
    module = lower(config.ModelParam.test_symbol, data=(1, 3, 128, 128))
    module.get_parameter("cls_pred_bias").data.fill_(1.0)  # scores of 0.7
    progress = Progress(epoch=2, step=5, seed=0, experiment="run", class_names=CLASSES)
    (tmp_path / "run").mkdir()
    training = load_config(DEMO, True, [*SETTINGS, *places])
    description = describe(training, [open_index(resolve("demo_train", str(tmp_path / "data")))], {"torch": "2"})
    save_checkpoint(tmp_path / "run", epoch_stem(2), module.state_dict(), {}, progress, description=description)
    return ["--config", str(DEMO), *(word for one in [*SETTINGS, *places] for word in ("--set", one))]


def test_the_newest_checkpoint_is_exported_beside_it(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main([*arguments, "--num-images", "2"]) == 0
    out = tmp_path / "run" / "checkpoint-0002.onnx"
    printed = capsys.readouterr().out
    certificate = Path(f"{out}.certificate.txt").read_text()
    assert certificate in printed
    assert "2 of demo_val, one at a time" in certificate
    metadata = onnxruntime.InferenceSession(out).get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == list(CLASSES)
    assert json.loads(metadata["certificate"])["problems"] == []


def test_an_experiment_needs_no_config(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "detector.onnx"
    images = str(tmp_path / "data" / "demo" / "images" / "val")
    assert export.main(["--experiment", str(tmp_path / "run"), "--images", images, "--out", str(out)]) == 0
    metadata = onnxruntime.InferenceSession(out).get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == list(CLASSES)
    assert json.loads(metadata["nms"])["max_detections"] == 10  # as it was trained
    provenance = json.loads(metadata["provenance"])
    assert provenance["checkpoint"] == "checkpoint-0002.safetensors"
    assert "trained on demo_train" in provenance
    with pytest.raises(ValueError, match="expected a trained detector"):
        export.main([])


def test_images_of_a_folder_and_another_file(arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "elsewhere" / "raw.onnx"
    images = str(tmp_path / "data" / "demo" / "images" / "val")
    assert export.main([*arguments, "--raw", "--out", str(out), "--images", images]) == 0
    text = Path(f"{out}.certificate.txt").read_text()
    assert f"3 of {images}, one at a time" in text
    assert "AP on these images            not computed" in text


def test_a_file_that_is_not_the_same_detector_ends_with_status_1(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from core.export import runners

    plain = runners.apply_nms  # of the torch detector in core.inference, and of raw files here
    monkeypatch.setattr(runners, "apply_nms", lambda config, score, bbox: plain(config, score, bbox + 0.1))
    assert export.main([*arguments, "--raw", "--num-images", "1"]) == 1
    captured = capsys.readouterr()
    assert re.search(r"NOT MET: boxes differ by 0\.\d+ pixels, more than 0.01", captured.out)
    assert "is not the same detector: boxes differ" in captured.err


@pytest.mark.parametrize(
    "more, expected",
    [
        (["--num-images", "0"], "--num-images: expected 1 or more"),
        (["--images", "none"], "no folder none"),
        (["--checkpoint", "none.safetensors"], "none.safetensors does not exist"),
        (["--set", "TestParam.nms.type=soft_gaussian"], "export with --raw"),
    ],
)
def test_a_bad_argument_is_one_message_and_writes_nothing(
    arguments: list[str], tmp_path: Path, more: list[str], expected: str
) -> None:
    before = sorted((tmp_path / "run").iterdir())
    with pytest.raises((ValueError, OSError), match=re.escape(expected)):
        export.main([*arguments, *more])
    assert sorted((tmp_path / "run").iterdir()) == before


def test_the_example_of_the_documentation_runs(arguments: list[str], tmp_path: Path) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "doc" / "export.md").read_text(), re.M | re.S)
    out, script = tmp_path / "detector.onnx", tmp_path / "example.py"
    script.write_text(example)
    assert export.main([*arguments, "--out", str(out), "--num-images", "1"]) == 0
    picture = next((tmp_path / "data" / "demo" / "images" / "val").iterdir())
    command = [sys.executable, "-W", "error", str(script), str(out), str(picture)]
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 10  # max_det_per_image: all have a score of 0.7
    for line in lines:
        match = re.fullmatch(r"(\w+) (0\.\d\d) at (\[.*\])", line)
        assert match is not None, line
        assert match[1] in CLASSES
        x1, y1, x2, y2 = json.loads(match[3])
        assert 0 <= x1 < x2 <= 128
        assert 0 <= y1 < y2 <= 128


def test_the_example_prepares_an_image_as_testing_does(arguments: list[str], tmp_path: Path) -> None:
    """The sizes and the scale, for pictures of awkward sizes; pixels differ by the filter."""
    from PIL import Image

    from core.export.images import of_folder

    config = load_config(DEMO, False, [*SETTINGS])
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(20):
        width, height = rng.integers(20, 700, 2)
        Image.new("RGB", (int(width), int(height))).save(folder / f"{i:02}.png")
    for batch in of_folder(config, folder, False, 20).batches:
        with Image.open(batch["files"][0]) as picture:
            scale = min(128 / picture.width, 128 / picture.height)
            width, height = int(picture.width * scale + 1e-6), int(picture.height * scale + 1e-6)
        np.testing.assert_allclose(batch["im_info"][0].numpy(), [height, width, scale], rtol=1e-6)
