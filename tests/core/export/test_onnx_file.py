"""An exported detector against torch's, on images: the demo's network with random weights and statistics."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from config.load import load_config
from config.schema import Config
from core.export.certificate import Certificate, Run, match
from core.export.detector_graph import detector_model, write_nms
from core.export.images import Images, of_folder, of_image_set
from core.export.onnx_file import CERTIFICATE_SUFFIX, certify_onnx, export_onnx, require_packages
from core.export.runners import onnx_run, openvino_run, torch_run
from core.inference import apply_nms
from models.record import Batch
from symbol.onnx_backend import Writer
from tests.core.conftest import noise
from tests.small_config import DEMO, SMALL_NETWORK
from utils.benchmark_export import random_weights as benchmark_weights

CLASSES = ("circle", "cross", "ring", "square", "star", "triangle")
MANY = "RpnParam.proposal.min_det_score=0.02"


def load(*overrides: str) -> Config:
    return load_config(DEMO, False, ["DatasetParam.data_root=none", "NormalizeParam.momentum=0.5", *overrides])


def random_weights(config: Config) -> dict[str, Tensor]:
    """Return weights of a network whose scores and boxes differ from place to place, and overlap within a class."""
    images = Images("noise", [batch_of(config, 1, seed=10 + i) for i in range(4)], None)
    weights = benchmark_weights(config, images)
    return weights | {name: 8 * weights[name] for name in ("cls_pred_weight", "bbox_pred_weight")}


def batch_of(config: Config, N: int, seed: int = 0, portrait: bool = False) -> Batch:
    """Return a batch of noise of several sizes and scales, padded to the input."""
    rng = np.random.default_rng(seed)
    short, long = config.ResizeParam.short, config.ResizeParam.long
    H, W = (long, short) if portrait else (short, long)
    image, im_info = np.zeros((N, H, W, 3), np.uint8), np.empty((N, 3), np.float32)
    for i in range(N):
        height, width = (H, W) if i == 0 else (int(rng.integers(H // 2, H)), W)
        coarse = noise(height // 16 + 1, width // 16 + 1, seed + i)  # blocks, which deep layers tell apart
        image[i, :height, :width] = coarse.repeat(16, 0).repeat(16, 1)[:height, :width]
        im_info[i] = height, width, rng.uniform(0.3, 2.5)
    return {
        "files": [f"{i}.png" for i in range(N)],
        "im_id": torch.arange(N),
        "image": torch.from_numpy(image),
        "im_info": torch.from_numpy(im_info),
    }


def exported(config: Config, weights: dict[str, Tensor], **options: bool) -> bytes:
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    return detector_model(config, arrays, CLASSES, **options).SerializeToString()


def require_same(a: Run, b: Run, batch: Batch) -> list[int]:
    """Compare the detections of each image; return their numbers."""
    counts = []
    for one, other in zip(a(batch), b(batch), strict=True):
        assert one.im_id == other.im_id
        rows = np.array(match(one, other)).reshape(-1, 2)
        assert len(rows) == len(one.score) == len(other.score)  # one to one
        np.testing.assert_allclose(one.bbox[rows[:, 0]], other.bbox[rows[:, 1]], rtol=0, atol=0.01)
        np.testing.assert_allclose(one.score[rows[:, 0]], other.score[rows[:, 1]], rtol=0, atol=1e-4)
        counts.append(len(rows))
    return counts


def compute(engine: str, content: bytes, fed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Return the outputs of a graph."""
    if engine == "onnxruntime":
        return list(onnxruntime.InferenceSession(content).run(None, fed))
    openvino = pytest.importorskip("openvino")
    model = openvino.Core().compile_model(openvino.Core().read_model(io.BytesIO(content)), "CPU")
    names = [output.name for output in onnx.load_from_string(content).graph.output]
    answer = model(fed)
    return [answer[name] for name in names]


def openvino_or_skip(config: Config, content: bytes) -> Run:
    pytest.importorskip("openvino")
    return openvino_run(config, content)


ENGINES = pytest.mark.parametrize("engine", [onnx_run, openvino_or_skip], ids=["onnxruntime", "openvino"])
Engine = Callable[[Config, bytes], Run]


@ENGINES
@pytest.mark.parametrize("raw", [False, True], ids=["detections", "raw"])
def test_detections_are_those_of_torch(engine: Engine, raw: bool) -> None:
    config = load(MANY)
    weights = random_weights(config)
    run = engine(config, exported(config, weights, raw=raw))
    reference = torch_run(config, weights, "random")
    for N in (1, 3):
        counts = require_same(run, reference, batch_of(config, N, seed=N))
        assert min(counts) > 10, counts


@ENGINES
def test_fewer_candidates_than_detections(engine: Engine) -> None:
    """5 levels of 3 candidates, of which max_det_per_image wants 100: the rest is padding."""
    config = load(*SMALL_NETWORK, MANY, "RpnParam.proposal.pre_nms_top_n=3")
    weights = random_weights(config)
    content = exported(config, weights)
    counts = require_same(engine(config, content), torch_run(config, weights, "random"), batch_of(config, 2))
    assert 0 < max(counts) <= 15


@ENGINES
def test_no_detection_at_all(engine: Engine) -> None:
    config = load(*SMALL_NETWORK, "TestParam.min_det_score=0.999")
    content = exported(config, random_weights(config))
    assert [len(found.score) for found in engine(config, content)(batch_of(config, 2))] == [0, 0]


def test_padding_of_the_outputs_and_the_order_of_detections() -> None:
    config = load(*SMALL_NETWORK, MANY, "TestParam.max_det_per_image=700", "RpnParam.proposal.pre_nms_top_n=100")
    session = onnxruntime.InferenceSession(exported(config, random_weights(config)))
    batch = batch_of(config, 2)
    fed = {"image": batch["image"].numpy(), "im_info": batch["im_info"].numpy()}
    boxes, scores, classes, count = session.run(["boxes", "scores", "classes", "count"], fed)
    assert (boxes.shape, scores.shape, classes.shape, count.shape) == ((2, 700, 4), (2, 700), (2, 700), (2,))
    assert {str(one.dtype) for one in (classes, count)} == {"int64"}
    for i, k in enumerate(count):
        assert 0 < k < 700
        assert (np.diff(scores[i]) <= 0).all()
        assert (scores[i, :k] > 0).all()
        assert set(classes[i, :k]) <= set(range(6))
        assert (classes[i, k:] == -1).all()
        assert not boxes[i, k:].any()
        assert not scores[i, k:].any()
        height, width, scale = fed["im_info"][i]
        assert (boxes[i, :k, 2:] - boxes[i, :k, :2] > 0).all()
        # inclusive corners end at width - 1 of the input: the exclusive one is a pixel of the file further
        assert boxes[i, :k, 2].max() <= (width - 1) / scale + 1 + 1e-3
        assert boxes[i, :k, 3].max() <= (height - 1) / scale + 1 + 1e-3


def test_portrait_and_landscape_of_an_input_that_is_not_square() -> None:
    config = load(*SMALL_NETWORK, MANY, "ResizeParam.short=128", "ResizeParam.long=256")
    weights = random_weights(config)
    reference = torch_run(config, weights, "random")
    for portrait, size in ((False, (128, 256)), (True, (256, 128))):
        content = exported(config, weights, portrait=portrait)
        shape = onnx.load_from_string(content).graph.input[0].type.tensor_type.shape
        assert [side.dim_value for side in shape.dim] == [0, *size, 3]
        require_same(onnx_run(config, content), reference, batch_of(config, 2, portrait=portrait))


def test_half_precision_settings_do_not_matter() -> None:
    config = load(*SMALL_NETWORK, MANY)
    weights = random_weights(config)
    half = load(*SMALL_NETWORK, MANY, "General.fp16=True")
    assert exported(half, weights) == exported(config, weights)
    assert half.General.fp16
    require_same(torch_run(half, weights, "random"), torch_run(config, weights, "random"), batch_of(config, 1))
    assert half.General.fp16


def test_soft_nms_is_refused_unless_raw() -> None:
    config = load(*SMALL_NETWORK, MANY, "TestParam.nms.type='soft_linear'")
    weights = random_weights(config)
    with pytest.raises(ValueError, match=r"soft_linear.*export with --raw"):
        exported(config, weights)
    run = onnx_run(config, exported(config, weights, raw=True))
    reference, batch = torch_run(config, weights, "random"), batch_of(config, 1)
    a, b = run(batch)[0], reference(batch)[0]
    np.testing.assert_allclose(a.score, b.score, atol=1e-4)


def test_raw_maps_are_named_by_their_stride() -> None:
    config = load(*SMALL_NETWORK)
    model = onnx.load_from_string(exported(config, random_weights(config), raw=True))
    strides = (8, 16, 32, 64, 128)
    assert [output.name for output in model.graph.output] == [
        *(f"cls_prob_s{stride}" for stride in strides),
        *(f"bbox_delta_s{stride}" for stride in strides),
    ]
    assert [entry.name for entry in model.graph.input] == ["image", "im_info"]
    assert "NonMaxSuppression" not in {node.op_type for node in model.graph.node}


def test_metadata_says_how_to_use_the_file() -> None:
    config = load(*SMALL_NETWORK, "TestParam.nms.thr=0.6")
    model = onnx.load_from_string(exported(config, random_weights(config)))
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["class_names"]) == list(CLASSES)
    assert json.loads(metadata["input_size"]) == {"height": 128, "width": 128}
    assert json.loads(metadata["mean"]) == list(config.NormParam.mean)
    assert json.loads(metadata["nms"])["iou_threshold"] == 0.6
    assert "im_info is its scaled height and width" in metadata["resize"]
    assert metadata["program"].startswith("necklace ")
    onnx.checker.check_model(model, full_check=True)


@pytest.fixture
def export(data_root: Path, tmp_path: Path) -> Callable[..., tuple[Certificate, Path]]:
    """Export a small network, certified on four images of the demo's."""

    def export(spoil: float = 0.0, **options: Any) -> tuple[Certificate, Path]:
        config = load(*SMALL_NETWORK, MANY, f"DatasetParam.data_root={data_root}")
        weights = random_weights(config)
        other = {name: tensor + spoil if name == "bbox_pred_bias" else tensor for name, tensor in weights.items()}
        images = of_image_set(config, "demo_val", False, 50)
        out = tmp_path / "made" / "detector.onnx"
        certificate = export_onnx(
            config,
            other,
            out,
            certificate=lambda content: certify_onnx(config, weights, "random", images, content),
            **options,
        )
        assert certificate is not None
        return certificate, out

    return export


@pytest.mark.parametrize("raw", [False, True])
def test_an_export_writes_the_file_and_its_certificate(
    export: Callable[..., tuple[Certificate, Path]], raw: bool
) -> None:
    certificate, out = export(raw=raw)
    assert certificate.problems == []
    assert certificate.num_image == 4
    assert certificate.num_exported == certificate.num_reference == certificate.num_matched > 100
    assert certificate.ap_exported is not None
    assert certificate.ap_exported == pytest.approx(certificate.ap_reference, abs=1e-4)
    text = Path(f"{out}{CERTIFICATE_SUFFIX}").read_text()
    assert text == certificate.text()
    assert text.rstrip().endswith("met")
    metadata = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert json.loads(metadata["certificate"])["num_matched"] == certificate.num_matched
    assert json.loads(metadata["class_names"]) == list(CLASSES)
    assert sorted(path.name for path in out.parent.iterdir()) == ["detector.onnx", f"detector.onnx{CERTIFICATE_SUFFIX}"]


def test_a_file_that_detects_otherwise_does_not_get_a_certificate(
    export: Callable[..., tuple[Certificate, Path]],
) -> None:
    certificate, out = export(spoil=0.002)
    assert certificate.num_matched > 0
    assert any(problem.startswith("boxes differ by") for problem in certificate.problems)
    assert "NOT MET: " in Path(f"{out}{CERTIFICATE_SUFFIX}").read_text()


def test_nothing_is_written_for_an_export_that_fails(tmp_path: Path) -> None:
    config = load(*SMALL_NETWORK)
    weights = random_weights(config)
    weights["conv0_weight"] = weights["conv0_weight"][:, :2]
    with pytest.raises(ValueError, match=r"needs bn0_weight \(8, 3, 7, 7\), got \(8, 2, 7, 7\)"):
        export_onnx(config, weights, tmp_path / "made" / "detector.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named() -> None:
    with pytest.raises(ValueError, match="pip install not_a_package"):
        require_packages("onnx", "not_a_package")


def test_images_of_a_folder(tmp_path: Path) -> None:
    from PIL import Image

    config = load(*SMALL_NETWORK, "ResizeParam.short=128", "ResizeParam.long=256")
    with pytest.raises(FileNotFoundError, match="give a folder of images"):
        of_folder(config, tmp_path / "none", False, 5)
    with pytest.raises(ValueError, match="has no image"):
        of_folder(config, tmp_path, False, 5)
    for name, size in {"a.png": (60, 40), "b.jpg": (40, 60), "c.png": (90, 30)}.items():
        Image.fromarray(noise(size[1], size[0])).save(tmp_path / name)
    found = of_folder(config, tmp_path, False, 5)
    assert [Path(batch["files"][0]).name for batch in found.batches] == ["a.png", "c.png"]
    assert [tuple(batch["image"].shape) for batch in found.batches] == [(1, 128, 256, 3)] * 2
    assert found.score is None
    assert [Path(b["files"][0]).name for b in of_folder(config, tmp_path, True, 5).batches] == ["b.jpg"]
    assert len(of_folder(config, tmp_path, False, 1).batches) == 1
    (tmp_path / "a.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"a\.png"):
        of_folder(config, tmp_path, False, 5)


# OpenVINO suppresses a box also at the threshold, and leaves the order of equal scores open; no IoU here is 0.47
@pytest.mark.parametrize("engine, thr", [("onnxruntime", 0.5), ("onnxruntime", 0.47), ("openvino", 0.47)])
@pytest.mark.parametrize("max_det", [5, 40, 100])
def test_nms_is_that_of_testing_to_the_order_of_equal_scores(engine: str, thr: float, max_det: int) -> None:
    """Scores have two decimals and boxes whole corners, so that scores and IoUs are equal, also to the 0.5."""
    limits = [f"TestParam.max_det_per_image={max_det}", "TestParam.min_det_score=0.2", f"TestParam.nms.thr={thr}"]
    config = load(*SMALL_NETWORK, *limits)
    N, M, C = 3, 60, 2
    rng = np.random.default_rng(max_det)
    corner = rng.integers(0, 12, (N, M, 2))
    bbox = np.concatenate([corner, corner + rng.choice([1, 2, 4, 9], (N, M, 2))], axis=2).astype(np.float32)
    score = rng.integers(0, 100, (N, M)).astype(np.float32) / 100
    cls_score = np.zeros((N, M, C + 1), np.float32)
    np.put_along_axis(cls_score, rng.integers(1, C + 1, (N, M, 1)), score[..., None], axis=2)
    im_info = np.array([[60, 60, 1], [60, 60, 2], [60, 60, 0.5]], np.float32)

    writer = Writer()
    inputs = {"cls_score": (-1, M, C + 1), "bbox": (-1, M, 4), "im_info": (-1, 3)}
    write_nms(writer, config, *(writer.input(name, "float32", shape) for name, shape in inputs.items()))
    fed = {"cls_score": cls_score, "bbox": bbox, "im_info": im_info}
    boxes, scores, classes, count = compute(engine, writer.model("nms", {}).SerializeToString(), fed)

    box, expected_score, cls = apply_nms(config, torch.from_numpy(cls_score), torch.from_numpy(bbox))
    valid = cls.numpy() >= 0
    assert (count == valid.sum(1)).all()
    assert 0 < count.min() <= count.max() < (60 if max_det > 60 else max_det + 1)
    np.testing.assert_array_equal(scores, expected_score)
    number = np.where(valid, cls.numpy() - 1, -1)
    exclusive = box.numpy() / im_info[:, None, 2:] + np.array([0, 0, 1, 1], np.float32)
    got = np.concatenate([boxes, classes[..., None]], axis=2)
    expected = np.concatenate([np.where(valid[..., None], exclusive, 0), number[..., None]], axis=2)
    if engine == "onnxruntime":
        np.testing.assert_array_equal(got, expected)
    elif max_det == 100:  # none is cut off
        assert [sorted(image) for image in got.tolist()] == [sorted(image) for image in expected.tolist()]
