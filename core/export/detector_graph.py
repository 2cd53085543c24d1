"""A detector as one ONNX graph: normalisation, network, decoding and NMS around the test graph of a config.

N images (any number), H x W input size, M candidates and D = max_det_per_image detections of an image, C classes.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from onnx import ModelProto

from symbol import Symbol
from symbol.node import Node
from symbol.onnx_backend import Value, Writer, emit

if TYPE_CHECKING:
    from config.schema import Config

MAP_NAMES = ("cls_prob_s", "bbox_delta_s")  # of the raw outputs, before the stride
_RESIZE = (
    "scale the RGB image (bilinear) by the largest factor at which it fits into the input, its sides rounded down; put "
    "it at the top left of an input of zeros; im_info is its scaled height and width, and the factor"
)
_ROOT = Path(__file__).resolve().parents[2]


def detector_model(
    config: Config,
    weights: Mapping[str, np.ndarray],
    class_names: Sequence[str],
    *,
    raw: bool = False,
    portrait: bool = False,
) -> ModelProto:
    """Return the detector of a config as an ONNX model in float32, with its settings as metadata.

    Inputs: image (N, H, W, 3) uint8 RGB, resized and padded with 0 at the right and below; im_info (N, 3) float32, the
    height and width before padding and the scale (input pixels per file pixel). H x W is the config's input size,
    landscape or portrait.

    Outputs: boxes (N, D, 4) float32 xyxy with exclusive corners in pixels of the file, scores (N, D) float32 in
    descending order, classes (N, D) int64 from 0, and count (N,) int64, the number of detections. Rows beyond it are 0,
    their class -1.
    raw: the maps of the head instead, for each stride s: cls_prob_s<s> (N, A*C, H/s, W/s), anchor-major, and
    bbox_delta_s<s> (N, 4A, H/s, W/s); the metadata has the anchors.

    Raises ValueError for NMS and for operators that ONNX does not have, and where the weights are those of another
    network.
    """
    if not raw and config.TestParam.nms.type != "nms":
        raise ValueError(
            f"TestParam.nms.type is {config.TestParam.nms.type!r}, which ONNX has no operator for: export with --raw, "
            "and apply it to the maps, or set TestParam.nms.type=nms"
        )
    H, W = input_size(config, portrait)
    writer = Writer()
    image = writer.input("image", "uint8", (-1, H, W, 3))
    im_info = writer.input("im_info", "float32", (-1, 3))
    inputs = {"data": _normalized(writer, config, image, im_info), "im_info": im_info}
    graph = config.ModelParam.test_symbol
    if raw:
        maps = raw_maps(graph)
        outputs = emit(writer, Symbol(tuple(maps.values())), weights, {"data": inputs["data"]})
        for name, value in zip(maps, outputs, strict=True):
            writer.output(name, value)
    else:
        cls_score, bbox = emit(writer, graph, weights, inputs)
        writer.scope = "nms"
        write_nms(writer, config, cls_score, bbox, im_info)
    return writer.model(str(config.General.name), _metadata(config, class_names, (H, W), raw))


def input_size(config: Config, portrait: bool) -> tuple[int, int]:
    """Return the height and width of the input."""
    short, long = config.ResizeParam.short, config.ResizeParam.long
    return (long, short) if portrait else (short, long)


def raw_maps(graph: Symbol) -> dict[str, tuple[Node, int]]:
    """Return the entries that the decoders of a test graph read, probabilities then deltas, by the names of `MAP_NAMES`
    and the stride."""
    decoders = [node for node in graph.nodes() if node.op == "_contrib_GenProposalRetina"]
    return {
        f"{name}{node.full_attrs()['feature_stride']}": node.inputs[position]
        for position, name in enumerate(MAP_NAMES)
        for node in decoders
    }


def _normalized(writer: Writer, config: Config, image: Value, im_info: Value) -> Value:
    """Return data (N, 3, H, W), as `models.retinanet.input.Norm2DImage` computes it: 0 in the padding."""
    writer.scope = "normalize"
    _, H, W, _ = image.shape
    pixel = writer.op("Cast", image, to=1)
    pixel = writer.op("Sub", pixel, writer.constant(config.NormParam.mean))
    pixel = writer.op("Div", pixel, writer.constant(config.NormParam.std))  # (N, H, W, 3)
    height, width = (writer.op("Slice", im_info, writer.ints(i), writer.ints(i + 1), writer.ints(1)) for i in (0, 1))
    row = writer.op("Less", writer.constant(np.arange(H)), height)  # (N, H)
    column = writer.op("Less", writer.constant(np.arange(W)), width)  # (N, W)
    row, column = (writer.op("Unsqueeze", one, writer.ints(*axes)) for one, axes in ((row, (2, 3)), (column, (1, 3))))
    inside = writer.op("And", row, column)  # (N, H, W, 1)
    pixel = writer.op("Where", inside, pixel, writer.constant(0))
    return Value(writer.op("Transpose", pixel, perm=(0, 3, 1, 2)), (-1, 3, H, W))


def write_nms(writer: Writer, config: Config, cls_score: Value, bbox: Value, im_info: Value) -> None:
    """Write NMS per class and the outputs, from scores (N, M, C + 1), one class per row above 0, and boxes (N, M, 4).

    The same result as `core.inference.apply_nms`: boxes with inclusive corners have the areas and the IoU of the
    continuous boxes that end one pixel later, which NonMaxSuppression compares, also by "greater than"; of equal scores
    it and TopK take the lower index first.
    """
    test = config.TestParam
    M, D = bbox.shape[1], test.max_det_per_image
    K = min(M, D)
    zero = writer.constant(0)
    corner = writer.constant([0, 0, 1, 1])
    by_class = writer.op("Transpose", cls_score, perm=(0, 2, 1))  # (N, C + 1, M)
    by_class = writer.op("Slice", by_class, writer.ints(1), writer.ints(cls_score.shape[2]), writer.ints(1))
    thresholds = [writer.constant([value]) for value in (test.nms.thr, test.min_det_score)]
    exclusive = writer.op("Add", bbox, corner)
    kept = writer.op("NonMaxSuppression", exclusive, by_class, writer.ints(D), *thresholds)  # (S, 3) image, class, row

    # every candidate has one class, so that the kept ones of all classes fit into one row (N, M)
    place = writer.op("Gather", kept, writer.ints(0, 2), axis=1)  # (S, 2)
    best = writer.op("ReduceMax", cls_score, axes=[2], keepdims=0)  # (N, M)
    score = writer.op("Mul", best, zero)
    score = writer.op("ScatterND", score, place, writer.op("GatherND", best, place))
    score, top = writer.ops("TopK", 2, score, writer.ints(K), axis=1)  # (N, K)
    valid = writer.op("Greater", score, zero)
    cls = writer.op("ArgMax", cls_score, axis=2, keepdims=0)  # (N, M) from 1
    cls = writer.op("Sub", writer.op("GatherElements", cls, top, axis=1), writer.ints(1))
    cls = writer.op("Where", valid, cls, writer.ints(-1))
    index = writer.op("Tile", writer.op("Unsqueeze", top, writer.ints(2)), writer.ints(1, 1, 4))
    box = writer.op("GatherElements", bbox, index, axis=1)  # (N, K, 4)
    scale = writer.op("Slice", im_info, writer.ints(2), writer.ints(3), writer.ints(1))
    box = writer.op("Div", box, writer.op("Unsqueeze", scale, writer.ints(2)))
    box = writer.op("Add", box, corner)  # exclusive corners, in pixels of the file
    box = writer.op("Where", writer.op("Unsqueeze", valid, writer.ints(2)), box, zero)
    count = writer.op("ReduceSum", writer.op("Cast", valid, to=7), writer.ints(1), keepdims=0)
    if K < D:
        box = writer.op("Pad", box, writer.ints(0, 0, 0, 0, D - K, 0))
        score = writer.op("Pad", score, writer.ints(0, 0, 0, D - K))
        cls = writer.op("Pad", cls, writer.ints(0, 0, 0, D - K), writer.constant(-1, np.int64))
    writer.output("boxes", Value(box, (-1, D, 4)))
    writer.output("scores", Value(score, (-1, D)))
    writer.output("classes", Value(cls, (-1, D), "int64"))
    writer.output("count", Value(count, (-1,), "int64"))


def _metadata(config: Config, class_names: Sequence[str], size: tuple[int, int], raw: bool) -> dict[str, str]:
    anchor, test = config.RpnParam.anchor_generate, config.TestParam
    program = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    entries = {
        "class_names": list(class_names),
        "input_size": {"height": size[0], "width": size[1]},
        "mean": config.NormParam.mean,
        "std": config.NormParam.std,
        "anchors": {"stride": anchor.stride, "scale": anchor.scale, "ratio": anchor.ratio},
        "nms": {
            "type": test.nms.type,
            "iou_threshold": test.nms.thr,
            "min_score": test.min_det_score,
            "max_detections": test.max_det_per_image,
            "inside": not raw,
        },
    }
    texts = {
        "resize": _RESIZE,
        "program": f"{program['name']} {program['version']}",
        "experiment": str(config.General.name),
    }
    return {key: json.dumps(value) for key, value in entries.items()} | texts
