"""Detectors to be compared in a certificate, each as a `Run`: from a batch with uint8 images to detections."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from core.engine.engine import TorchEngine
from core.export.certificate import Run
from core.export.detector_graph import raw_maps
from core.inference import Detections, apply_nms, detect
from models.record import Batch
from symbol import Symbol, lower
from symbol.node import VARIABLE, Entry, Node
from symbol.passes import rewrite

if TYPE_CHECKING:
    from config.schema import Config

CPU = torch.device("cpu")


def torch_run(config: Config, weights: Mapping[str, Tensor], source: str | Path) -> Run:
    """Return the detector of a config and its weights, computing in float32 on the CPU.

    Raises ValueError, naming `source`, for weights of another network.
    """
    in_float32 = copy.copy(config)
    in_float32.General = copy.copy(config.General)
    in_float32.General.fp16 = in_float32.General.bf16 = False
    detector, _ = TorchEngine().build_detector(in_float32, weights, CPU, source)
    return lambda batch: list(detect(config, detector, [batch], CPU))


def onnx_run(config: Config, content: bytes) -> Run:
    """Return an ONNX file of `detector_graph` in onnxruntime on the CPU, with torch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    inputs, outputs = ([one.name for one in some] for some in (session.get_inputs(), session.get_outputs()))
    return _run(config, inputs, outputs, lambda fed: session.run(None, fed))


def openvino_run(config: Config, content: bytes) -> Run:
    """Return an ONNX file of `detector_graph` in OpenVINO on the CPU, in float32 with torch's number of threads."""
    import onnx
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = core.compile_model(core.read_model(io.BytesIO(content)), "CPU", settings)
    graph = onnx.load_from_string(content).graph  # OpenVINO gives a tensor the names of inner ones too
    inputs, outputs = ([one.name for one in some] for some in (graph.input, graph.output))

    def compute(fed: dict[str, np.ndarray]) -> list[np.ndarray]:
        answer = model(fed)
        return [answer[name] for name in outputs]

    return _run(config, inputs, outputs, compute)


def _run(
    config: Config,
    inputs: Sequence[str],
    outputs: Sequence[str],
    compute: Callable[[dict[str, np.ndarray]], Sequence[np.ndarray]],
) -> Run:
    """Return the detector that an engine computes, from inputs by name to outputs. Maps of a raw file are decoded by
    torch."""
    decode = _inclusive if "boxes" in outputs else _decoder(config)

    def run(batch: Batch) -> list[Detections]:
        fed = {name: value.numpy() for name, value in batch.items() if name in inputs and isinstance(value, Tensor)}
        return decode(batch, dict(zip(outputs, compute(fed), strict=True)))

    return run


def _inclusive(batch: Batch, outputs: Mapping[str, np.ndarray]) -> list[Detections]:
    """Return an exported detector's outputs in the terms of `Detections`: inclusive corners, classes from 1."""
    corner = np.array([0, 0, 1, 1], np.float32)
    found = []
    for i, count in enumerate(outputs["count"].tolist()):
        box, score, cls = (outputs[name][i, :count] for name in ("boxes", "scores", "classes"))
        found.append(Detections(int(batch["im_id"][i]), batch["files"][i], box - corner, score, cls + 1))
    return found


def _decoder(config: Config) -> Callable[[Batch, Mapping[str, np.ndarray]], list[Detections]]:
    """Return the part of the detector behind the maps of a raw file."""
    tail = _tail(config.ModelParam.test_symbol)
    module = lower(tail).eval()

    def decode(batch: Batch, maps: Mapping[str, np.ndarray]) -> list[Detections]:
        im_info = batch["im_info"]
        with torch.inference_mode():
            candidates = module(**{name: torch.from_numpy(array) for name, array in maps.items()}, im_info=im_info)
            bbox, score, cls = apply_nms(config, *candidates)
            bbox = bbox / im_info[:, None, 2:]
        kept = cls >= 0
        return [
            Detections(int(batch["im_id"][i]), path, *(one[i][kept[i]].numpy() for one in (bbox, score, cls)))
            for i, path in enumerate(batch["files"])
        ]

    return decode


def _tail(graph: Symbol) -> Symbol:
    """Return a test graph whose inputs are the maps of `raw_maps`, by their names, and im_info."""
    maps: dict[Entry, Entry] = {entry: (Node(VARIABLE, name), 0) for name, entry in raw_maps(graph).items()}

    def replace(node: Node, inputs: tuple[Entry, ...]) -> Node:
        entries = tuple(maps.get(old, new) for old, new in zip(node.inputs, inputs, strict=True))
        return Node(node.op, node.name, entries, node.attrs, node.hints)

    return rewrite(graph, replace)
