import math
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from operator_cxx import build, library, numpy_ops
from operator_cxx.anchor import base_anchors, grid_anchors
from operator_cxx.anchor_target import pyramid_anchor_target
from operator_cxx.focal_loss import focal_loss
from operator_cxx.nms import nms, soft_nms
from operator_cxx.reference.box import inclusive_area, inclusive_iou
from operator_cxx.retina_decode import retina_decode
from operator_cxx.smooth_l1 import smooth_l1_loss

ROOT = Path(__file__).parents[2]
ANCHORS = base_anchors(8, (2,), (0.5, 1.0, 2.0))


def boxes(*shape):
    """Return boxes with integer corners, so that overlaps and ties are common."""
    corner, size = np.random.default_rng(0).integers(0, 40, (2, *shape, 2))
    return np.concatenate([corner, corner + size], axis=-1).astype(np.float32)


def tensors(*arrays):
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]


def same(ours, theirs):
    """Return True if the results are equal bit for bit, with NaN equal to NaN."""
    assert len(ours) == len(theirs)
    for array, tensor in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(array, tensor.numpy(), strict=True)


@pytest.fixture(autouse=True)
def kernels_serve():
    assert "cpu" in library.loaded, library.notes


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bbox_overlaps(dtype):
    box, other = boxes(70).astype(dtype), boxes(9).astype(dtype)
    iou = numpy_ops.bbox_overlaps(box, other, threads=2)
    a, b = tensors(box, other)
    same([iou], [inclusive_iou(a[:, None], inclusive_area(a)[:, None], b, inclusive_area(b))])
    assert iou.dtype == dtype
    assert 0 < iou.max() <= 1


def test_bbox_overlaps_by_hand():
    # widths and heights of 2 against 2, shifted by one: 1 * 2 of 4 + 4 - 2
    assert numpy_ops.bbox_overlaps([[0, 0, 1, 1]], [[1, 0, 2, 1], [0, 0, 1, 1], [2, 0, 3, 1]]).tolist() == [
        [np.float32(1 / 3), 1, 0]
    ]
    assert numpy_ops.bbox_overlaps(np.zeros((0, 4)), boxes(3)).shape == (0, 3)
    assert numpy_ops.bbox_overlaps(boxes(3), np.zeros((0, 4))).shape == (3, 0)


def targets():
    cls = np.random.default_rng(1).integers(0, 5, (2, 6, 1))
    gt_bbox = np.concatenate([boxes(2, 6) * 1.5, cls], axis=2).astype(np.float32)
    return gt_bbox, np.array([[64, 80, 1], [50, 60, 1]], np.float32), grid_anchors(8, 10, 8, ANCHORS).numpy()


ASSIGN = {"pos_thr": 0.5, "neg_thr": 0.4, "min_pos_thr": 0.1, "allowed_border": 9.0}


def test_anchor_target():
    arrays = targets()
    label, delta = numpy_ops.anchor_target(*arrays, **ASSIGN)
    same([label, delta], pyramid_anchor_target(*tensors(*arrays), **ASSIGN))
    assert {-1, 0} < set(label.ravel().tolist())
    empty = numpy_ops.anchor_target(np.zeros((2, 0, 5)), arrays[1], np.zeros((0, 4)), **ASSIGN)
    assert [array.shape for array in empty] == [(2, 0), (2, 0, 4)]


def candidates():
    score, cls = np.random.default_rng(2).integers(0, [[[20]], [[3]]], (2, 3, 50))
    return boxes(3, 50), score.astype(np.float32) / 20, cls


@pytest.mark.parametrize("settings", [{}, {"inclusive": False}, {"min_score": 0.5}, {"max_det": 3}, {"max_det": 99}])
def test_nms(settings):
    settings = {"thr": 0.5, "max_det": 20, **settings}
    arrays = candidates()
    ours = numpy_ops.nms(*arrays, **settings)
    same(ours, nms(*tensors(*arrays), **settings))
    assert ours[0].dtype == np.int64
    assert ours[0].max() > 2


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms(method):
    settings = {"method": method, "thr": 0.3, "sigma": 0.5, "min_score": 0.05, "max_det": 30}
    arrays = candidates()
    ours = numpy_ops.soft_nms(*arrays, **settings)
    same(ours, soft_nms(*tensors(*arrays), **settings))
    assert np.setdiff1d(ours[1], arrays[1]).size > 0  # some scores were lowered


def test_nms_by_hand():
    # two boxes that share a column of pixels: IoU 2 / 6, or 0 with exclusive corners
    arrays = [[[0, 0, 1, 1], [1, 0, 2, 1], [0, 0, 1, 1]]], [[0.5, 0.75, 0.25]], [[1, 1, 2]]
    assert numpy_ops.nms(*arrays, thr=0.3, max_det=3)[0].tolist() == [[1, 2, -1]]
    index, score = numpy_ops.nms(*arrays, thr=0.3, max_det=3, inclusive=False)
    assert index.tolist() == [[1, 0, 2]]
    assert score.tolist() == [[0.75, 0.5, 0.25]]


def test_nms_of_nothing():
    index, score = numpy_ops.nms(np.zeros((2, 0, 4)), np.zeros((2, 0)), np.zeros((2, 0)), thr=0.5, max_det=3)
    assert index.tolist() == [[-1] * 3] * 2
    assert score.tolist() == [[0] * 3] * 2


def level():
    random = np.random.default_rng(3)
    prob, delta = random.random((2, 12, 5, 6), np.float32), random.standard_normal((2, 12, 5, 6), np.float32)
    return prob, delta, np.array([[40, 48, 1], [30, 30, 1]], np.float32), grid_anchors(5, 6, 8, ANCHORS).numpy()


@pytest.mark.parametrize("count, thresh", [(20, 0.5), (1000, 0.0), (50, 0.99)])
def test_retina_decode(count, thresh):
    settings = {"pre_nms_top_n": count, "thresh": thresh, "num_anchors": 3}
    arrays = level()
    ours = numpy_ops.retina_decode(*arrays, **settings)
    same(ours, retina_decode(*tensors(*arrays), **settings))
    assert ours[1].max() > 0.9


def logits(dtype):
    random = np.random.default_rng(4)
    return random.normal(0, 3, (2, 300, 7)).astype(dtype), random.integers(-1, 8, (2, 300)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("normalizer", [None, np.float32(3), np.array([2.0, 5.0], np.float32)])
def test_focal_loss(dtype, normalizer):
    logit, label = logits(dtype)
    loss, grad = numpy_ops.focal_loss(logit, label, alpha=0.25, gamma=2.0, normalizer=normalizer, with_grad=True)
    x, y = tensors(logit, label)
    x.requires_grad_()
    divisor = None if normalizer is None else torch.as_tensor(normalizer)
    expected = focal_loss(x, y, alpha=0.25, gamma=2.0, normalizer=divisor)
    expected.backward()
    same([dtype(loss), grad], [expected.detach(), x.grad])
    assert loss == numpy_ops.focal_loss(logit, label, alpha=0.25, gamma=2.0, normalizer=normalizer)
    assert type(loss) is float
    assert loss > 0


def test_focal_loss_by_hand():
    # p = 1/2: a positive adds alpha / 4 * log 2, a negative (1 - alpha) / 4 * log 2; divided by one positive + 1
    expected = (0.25 + 0.75 * 3) / 4 * math.log(2) / 2
    loss = numpy_ops.focal_loss(np.zeros((1, 3, 2)), [[1, 0, -1]], alpha=0.25, gamma=2.0)
    assert loss == pytest.approx(expected, rel=1e-12)
    assert numpy_ops.focal_loss(np.zeros((0, 3, 2)), np.zeros((0, 3)), alpha=0.25, gamma=2.0) == 0


def maps(cells, dtype):
    return tuple(np.random.default_rng(5).normal(0, 0.2, (3, 2, 8, cells)).astype(dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("normalizer", [None, np.float32(3), np.array([2.0, 5.0], np.float32)])
def test_smooth_l1_loss(dtype, normalizer):
    delta, target, weight = maps(300, dtype)
    settings = {"beta": 0.11, "normalizer": normalizer}
    loss, grad = numpy_ops.smooth_l1_loss(delta, target, weight, **settings, with_grad=True)
    x, y, w = tensors(delta, target, weight)
    x.requires_grad_()
    divisor = None if normalizer is None else torch.as_tensor(normalizer)
    expected = smooth_l1_loss([x], y, w, beta=0.11, normalizer=divisor)
    expected.backward()
    same([dtype(loss), grad], [expected.detach(), x.grad])
    assert loss == numpy_ops.smooth_l1_loss(delta, target, weight, **settings)


def test_smooth_l1_loss_by_hand():
    # 1/4 and 1 against beta 1/2: (1/4)^2 and 1 - 1/4; weights 1 and 2, divided by 4
    loss, grad = numpy_ops.smooth_l1_loss(
        [[[0.25, 1.0]]], [[[0, 0]]], [[[1, 2]]], beta=0.5, normalizer=4, with_grad=True
    )
    assert loss == (0.0625 + 2 * 0.75) / 4
    assert grad.tolist() == [[[0.5 / 4, 2 / 4]]]


def calls():
    """Return a call of every function: the function, its arrays and its settings."""
    soft = {"method": "gaussian", "thr": 0.5, "sigma": 0.5, "min_score": 0.1, "max_det": 9}
    return {
        "bbox_overlaps": ((boxes(300), boxes(30)), {}),
        "anchor_target": (targets(), ASSIGN),
        "nms": (candidates(), {"thr": 0.5, "max_det": 9}),
        "soft_nms": (candidates(), soft),
        "retina_decode": (level(), {"pre_nms_top_n": 20, "thresh": 0.3, "num_anchors": 3}),
        "focal_loss": (logits(np.float32), {"alpha": 0.25, "gamma": 1.5, "with_grad": True}),
        "smooth_l1_loss": (maps(3000, np.float32), {"beta": 0.1, "with_grad": True}),
    }


@pytest.fixture(params=calls())
def call(request):
    """Return a function, its arrays and its settings."""
    arrays, settings = calls()[request.param]
    return getattr(numpy_ops, request.param), arrays, settings


def flat(answer):
    return b"".join(np.asarray(part).tobytes() for part in (answer if isinstance(answer, tuple) else (answer,)))


def test_any_number_of_threads_gives_the_same(call):
    function, arrays, settings = call
    expected = flat(function(*arrays, **settings))
    assert all(flat(function(*arrays, **settings, threads=threads)) == expected for threads in (1, 2, 3, 64))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: flat(function(*arrays, **settings)), range(16)))
    assert set(answers) == {expected}


def test_threads_default_to_the_usable_cpus(call, monkeypatch):
    function, arrays, settings = call
    asked = []
    monkeypatch.setattr(numpy_ops, "usable_cpus", lambda: asked.append(1) or 2)
    function(*arrays, **settings, threads=3)
    assert not asked
    function(*arrays, **settings)
    assert asked


def test_any_layout_and_type(call):
    function, arrays, settings = call
    expected = flat(function(*arrays, **settings))
    strided = [np.repeat(array, 2, axis=0)[::2] for array in arrays]
    assert not any(array.flags.c_contiguous for array in strided if array.shape[0] > 1)
    fortran = [np.asfortranarray(array) for array in arrays]
    swapped = [array.astype(array.dtype.newbyteorder()) for array in arrays]
    for array in arrays:
        array.flags.writeable = False
    for other in (strided, fortran, swapped, arrays):
        assert flat(function(*other, **settings)) == expected


def test_arguments_stay_as_they_are(call):
    function, arrays, settings = call
    before = [array.copy() for array in arrays]
    function(*arrays, **settings)
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_wrong_shapes_are_refused(call):
    function, arrays, settings = call
    for i in range(len(arrays)):
        # the last axis is shortened, except that of logits: any number of classes is valid
        for wrong in (arrays[i][None], arrays[i][:, :-1] if function.__name__ == "focal_loss" else arrays[i][..., :-1]):
            changed = [*arrays[:i], wrong, *arrays[i + 1 :]]
            with pytest.raises(ValueError, match=rf"^{function.__name__}: expected .*, got .*\("):
                function(*changed, **settings)


def test_wrong_settings_are_refused():
    def refuses(name, message, **wrong):
        arrays, settings = calls()[name]
        with pytest.raises(ValueError, match=f"^{name}: expected {message}"):
            getattr(numpy_ops, name)(*arrays, **{**settings, **wrong})

    for name in calls():
        refuses(name, "threads >= 0, got -1", threads=-1)
    refuses("nms", "thr of 0 to 1, max_det of at least 1 and a min_score, got 1.5, 9", thr=1.5)
    refuses("nms", "thr of 0 to 1, .*, got 0.5, 0", max_det=0)
    refuses("nms", "thr of 0 to 1, .* nan$", min_score=math.nan)
    refuses("soft_nms", "method linear or gaussian and sigma > 0, got hard and 0.5", method="hard")
    refuses("soft_nms", "method linear or gaussian and sigma > 0, got gaussian and 0", sigma=0)
    refuses("retina_decode", "cls_prob .* with A = 5, got", num_anchors=5)
    refuses("retina_decode", "cls_prob .* with A = 0, got", num_anchors=0)
    refuses("retina_decode", "pre_nms_top_n >= 1 and thresh >= 0, got 0", pre_nms_top_n=0)
    refuses("retina_decode", "pre_nms_top_n >= 1 and thresh >= 0, got 20 and nan", thresh=math.nan)
    refuses("focal_loss", "gamma >= 0, got -1", gamma=-1)
    refuses("focal_loss", r"normalizer \(\) or \(2,\), got \(3,\)", normalizer=[1, 2, 3])
    refuses("smooth_l1_loss", "beta > 0, got 0", beta=0)
    refuses("smooth_l1_loss", r"normalizer \(\) or \(2,\), got \(1,\)", normalizer=[1])


def test_classes_are_integers():
    bbox, score, cls = candidates()
    with pytest.raises(ValueError, match="nms: expected cls of an integer type, got float32"):
        numpy_ops.nms(bbox, score, cls.astype(np.float32), thr=0.5, max_det=9)


def python(program):
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)


def test_torch_is_not_needed():
    done = python("import sys; from operator_cxx import numpy_ops; print('torch' in sys.modules, numpy_ops.__file__)")
    assert done.stdout.startswith("False "), done.stderr
    assert done.stdout.strip().endswith(".so")


def test_a_stale_extension_is_refused():
    done = python(
        "from operator_cxx import build; build.source_hash = lambda: 'new'; from operator_cxx import numpy_ops"
    )
    assert "ImportError: operator_cxx.numpy_ops was built from other sources: rebuild it with make ops" in done.stderr


def test_without_the_extension_the_import_says_what_to_do():
    with pytest.raises(ImportError, match="numpy_ops is not built for this Python: make ops"):
        runpy.run_path(str(build.HERE / "numpy_ops.py"))


def test_every_function_has_its_types():
    stubs = (build.HERE / "numpy_ops.pyi").read_text()
    public = {name for name, value in vars(numpy_ops).items() if type(value).__name__ == "cython_function_or_method"}
    assert public == set(calls())
    assert all(f"def {name}(" in stubs for name in public)
