"""Benchmark of parity: differences between torch and MXNet 1.9.1 on the five published networks.

    make mxnet && OMP_NUM_THREADS=1 .venv-mxnet/bin/python utils/benchmark_parity.py

Ten training steps from the same weights with momentum, weight decay, a warm-up and a step of the learning rate, in
MXNet by its Module and its SGD; then the test graph with the resulting weights. Depth, stages, levels and anchors
are the published ones, widths and images are small.

The steps are in float64. A deep network with random weights amplifies rounding errors by a thousand and more per step,
and in float32 no two programs agree on its gradients: the last two columns show the difference between each engine's
float32 and float64, in the first step. For the same reason the residual branches start small, the rate is a tenth of
the published, and images are 256 x 256 in batches of 4: BatchNorm over the 4 cells that the coarsest level has at 128 x
128 amplifies by another factor of a thousand. MXNet stores rates and factors in float32 always: those here are sums of
powers of two. The test graph is in float32, since with moving statistics it does not amplify.

Errors are the largest difference of a tensor over its largest value, maximised over all tensors. A bias before a
BatchNorm has no gradient but rounding: it is compared with its convolution's weight, and means with variances.
"""

from __future__ import annotations

import argparse
import math
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import symbol as S
from config.load import load_config
from core.engine.optimizer import SGD, multipliers
from core.engine.schedule import LrSchedule
from core.engine_mxnet.graph import MxnetLrScheduler, bind_module, gradients_of, load_symbol, loss_values, state_of
from operator_cxx.mxnet_ops import load_mxnet
from symbol import Symbol

CONFIGS = sorted((Path(__file__).parents[1] / "config" / "NASFPN").glob("*@*.py"))
NUM_CLASS, TOP_N = 5, 100
SMALL = (
    "General.fp16=False",
    "NormalizeParam.type=localbn",
    "BackboneParam.num_filter=8",
    "RpnParam.head.conv_channel=16",
    f"RpnParam.num_class={NUM_CLASS}",
    f"RpnParam.proposal.pre_nms_top_n={TOP_N}",
    "RpnParam.proposal.min_det_score=0",
    "ResizeParam.short=256",
    "ResizeParam.long=256",
    "DatasetParam.data_root=none",
)
BATCH, SIDE, STEPS = 4, 256, 10
MOMENTUM, DECAY = 0.875, 2**-13
SCHEDULE = LrSchedule(
    lr=2**-10,
    iter_per_epoch=STEPS,
    end_epoch=1,
    lr_epoch=(0.7,),
    lr_factor=0.125,
    warmup_epoch=0.4,
    warmup_lr_factor=0.125,
)
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Parity:
    """Largest relative errors of a network. `update` is that of the changes of weights, not of weights. `torch_single`
    and `mxnet_single` are those of an engine's gradients in float32, relative to float64's.
    """

    name: str
    losses: float
    gradients: float
    statistics: float
    weights: float
    update: float
    maps: float
    scores: float
    boxes: float
    torch_single: float
    mxnet_single: float


@dataclass(frozen=True)
class Training:
    """Losses (steps, 2), the gradients of the first step, and weights and statistics after the last."""

    losses: np.ndarray
    gradients: Arrays
    state: Arrays


def error(ours: np.ndarray, theirs: np.ndarray, scale: np.ndarray | None = None) -> float:
    """Return the largest difference over the largest value, optionally of another array."""
    assert ours.shape == theirs.shape, f"shapes {ours.shape} and {theirs.shape}"
    assert np.isfinite(ours).all()
    assert np.isfinite(theirs).all()
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs if scale is None else scale).max(), 1e-30))


def worst(ours: Arrays, theirs: Arrays, instead: Mapping[str, str]) -> float:
    """Return the largest error of all tensors; `instead` maps a tensor to the one whose scale is used for it."""
    assert ours.keys() <= theirs.keys()
    return max(error(value, theirs[name], theirs[instead.get(name, name)]) for name, value in ours.items())


def biases_before_batch_norm(graph: Symbol) -> dict[str, str]:
    """Return biases of convolutions that feed only BatchNorms, each with its weight."""
    users: dict[Any, set[str]] = {}
    found: dict[str, tuple[str, set[str]]] = {}
    for node in graph.nodes():
        for child, _ in node.inputs:
            users.setdefault(child, set()).add(node.op)
    for node in graph.nodes():
        if node.op == "Convolution" and len(node.inputs) == 3:
            weight, bias = (child.name for child, _ in node.inputs[1:])
            found.setdefault(bias, (weight, set()))[1].update(users[node])
    return {bias: weight for bias, (weight, ops) in found.items() if ops == {"BatchNorm"}}


def make_batch(graph: Symbol, step: int, dtype: str) -> dict[str, np.ndarray]:
    """Return random images and labels: about 2 anchors of 100 are foreground, 5 are ignored."""
    random = np.random.RandomState(step)
    arguments = graph.infer_shape(data=(BATCH, 3, SIDE, SIDE))[0]
    shapes = dict(zip(graph.list_arguments(), arguments, strict=True))
    chance = random.random_sample(shapes["rpn_cls_label"])
    label = np.where(chance < 0.02, random.randint(1, NUM_CLASS, chance.shape), np.where(chance > 0.95, -1, 0))
    batch = {
        "data": random.standard_normal(shapes["data"]),
        "rpn_cls_label": label,
        "rpn_reg_target": 0.3 * random.standard_normal(shapes["rpn_reg_target"]),
        "rpn_reg_weight": random.random_sample(shapes["rpn_reg_weight"]) < 0.02,
    }
    if "rpn_fg_count" in shapes:
        batch["rpn_fg_count"] = np.full(BATCH, (label >= 1).sum() + 1)
    return {name: value.astype(np.float32 if name == "rpn_cls_label" else dtype) for name, value in batch.items()}


def first_value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return random weights and statistics, seeded by the name, similar to those at the start of a training."""
    random = torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)).float()
    if name.endswith(("_gamma", "_moving_var")):
        return (0.3 if name.endswith("bn3_gamma") else 1.0) * (1 + 0.1 * random.abs())
    if name.endswith("_weight"):
        return random * math.sqrt((0.03 if "_pred_" in name else 1.5) / math.prod(shape[1:]))
    return 0.1 * random - (4 if name == "cls_pred_bias" else 0)


def new_module(graph: Symbol) -> nn.Module:
    """Return a module with its initial weights, which are the same every time."""
    module = S.lower(graph, data=(BATCH, 3, SIDE, SIDE))
    module.load_state_dict({name: first_value(name, tuple(p.shape)) for name, p in module.state_dict().items()})
    return module


def train_torch(graph: Symbol, module: nn.Module, dtype: str, steps: int) -> Training:
    """Train a module in place for some steps."""
    parameters = dict(module.named_parameters())
    optimizer = SGD(
        parameters.items(), *multipliers(graph.attr_dict(), parameters), momentum=MOMENTUM, wd=DECAY, clip_gradient=None
    )
    losses, gradients = [], {}
    module.train()
    for step in range(steps):
        outputs = module(**{name: torch.from_numpy(value) for name, value in make_batch(graph, step, dtype).items()})
        optimizer.zero_grad()
        torch.stack([loss.reshape(()) for loss in outputs]).sum().backward()
        losses.append([loss.item() for loss in outputs])
        if step == 0:
            gradients = {name: p.grad.numpy().copy() for name, p in parameters.items() if p.grad is not None}
        optimizer.step(SCHEDULE.lr_at(step))
    return Training(np.array(losses), gradients, {})


def train_mxnet(graph: Symbol, state: Arrays, dtype: str, steps: int) -> Training:
    """Train for some steps from the weights and statistics of `state`."""
    mx = load_mxnet()
    first = make_batch(graph, 0, dtype)
    module = bind_module(
        graph,
        {name: value.shape for name, value in first.items()},
        {name: value.astype(dtype) for name, value in state.items()},
        dtypes={name: str(value.dtype) for name, value in first.items()},
    )
    module.init_optimizer(
        kvstore="local",
        optimizer="sgd",
        optimizer_params={
            "learning_rate": SCHEDULE.lr,
            "momentum": MOMENTUM,
            "wd": DECAY,
            "rescale_grad": 1.0,
            "lr_scheduler": MxnetLrScheduler(SCHEDULE),
        },
    )
    losses, gradients = [], {}
    for step in range(steps):
        given = make_batch(graph, step, dtype)
        batch = {name: mx.nd.array(value, dtype=value.dtype) for name, value in given.items()}
        names = [name for name, *_ in module.label_shapes]
        module.forward(mx.io.DataBatch([batch["data"]], [batch[name] for name in names]), is_train=True)
        module.backward()
        losses.append(loss_values(graph, module, given["rpn_cls_label"]))
        if step == 0:
            gradients = {name: gradient.asnumpy() for name, gradient in gradients_of(module).items()}
        module.update()
    return Training(np.array(losses), gradients, state_of(module))


def compare_test(graph: Symbol, state: Mapping[str, torch.Tensor]) -> tuple[float, float, float]:
    """Return the errors of (probabilities and deltas of the levels, scores, boxes) of a test graph."""
    internals = graph.get_internals()
    proposals = [node for node in graph.nodes() if node.op == "_contrib_GenProposalRetina"]
    maps = [f"{child.name}_output" for node in proposals for child, _ in node.inputs[:2]]
    both = S.Group([graph, *(internals[name] for name in maps)])
    inputs = {"data": make_images(), "im_info": np.array([[SIDE, SIDE - 9, 1]] * BATCH, np.float32)}
    module = S.lower(both, data=(BATCH, 3, SIDE, SIDE)).eval()
    module.load_state_dict(dict(state))
    with torch.no_grad():
        ours = [out.numpy() for out in module(**{name: torch.from_numpy(value) for name, value in inputs.items()})]
    mx = load_mxnet()
    arrays = {name: mx.nd.array(value) for name, value in {**state, **inputs}.items()}
    auxiliary = {name: arrays.pop(name) for name in both.list_auxiliary_states()}
    executor = load_symbol(both).bind(mx.cpu(), arrays, aux_states=auxiliary, grad_req="null")
    theirs = [out.asnumpy() for out in executor.forward(is_train=False)]
    map_error = max(error(a, b) for a, b in zip(ours[2:], theirs[2:], strict=True))
    return map_error, *compare_candidates(ours[:2], theirs[:2])


def make_images() -> np.ndarray:
    return np.random.RandomState(STEPS).standard_normal((BATCH, 3, SIDE, SIDE)).astype(np.float32)


def compare_candidates(ours: list[np.ndarray], theirs: list[np.ndarray]) -> tuple[float, float]:
    """Return the errors of scores (N, M, C + 1) and boxes (N, M, 4) in input pixels.

    Candidates whose scores differ by rounding may be ordered differently: each of ours is compared with the nearest of
    its class among MXNet's, except at the end of a level's list, where it may have been replaced by another.
    """
    score_error = box_error = 0.0
    for image in range(len(ours[0])):
        for start in range(0, ours[0].shape[1], TOP_N):
            level = slice(start, start + TOP_N)
            (a, box_a), (b, box_b) = ((side[0][image, level], side[1][image, level]) for side in (ours, theirs))
            sorted_a, sorted_b = np.sort(a.max(1)), np.sort(b.max(1))
            score_error = max(score_error, error(sorted_a, sorted_b))
            for row in np.flatnonzero(a.max(1) > sorted_a[0] * (1 + 1e-4)):
                same = b.argmax(1) == a[row].argmax()
                box_error = max(box_error, float(np.abs(box_b[same] - box_a[row]).max(1).min() / SIDE))
    return score_error, box_error


def compare(config: Path, steps: int = STEPS) -> Parity:
    """Compare both engines on the network of a config file."""
    published = load_config(str(config), True, SMALL).NeckParam.dim_reduced
    overrides = (*SMALL, f"NeckParam.dim_reduced={published // 16}")
    train, test = (load_config(str(config), is_train, overrides).ModelParam for is_train in (True, False))
    graph = train.train_symbol
    first = {name: value.numpy() for name, value in new_module(graph).state_dict().items()}
    module = new_module(graph).double()
    ours = train_torch(graph, module, "float64", steps)
    theirs = train_mxnet(graph, first, "float64", steps)
    state = {name: value.numpy() for name, value in module.state_dict().items()}
    trained = list(dict(module.named_parameters()))
    noise = biases_before_batch_norm(graph)
    singles = [train_torch(graph, new_module(graph), "float32", 1), train_mxnet(graph, first, "float32", 1)]
    by_engine = [{name: single.gradients[name] for name in ours.gradients} for single in singles]
    weights = {name: state[name] for name in trained}
    statistics = {name: value for name, value in state.items() if name not in weights}
    moved, their_moved = ({name: side[name] - first[name] for name in trained} for side in (state, theirs.state))
    return Parity(
        config.stem.removesuffix("_25epoch"),
        error(ours.losses, theirs.losses),
        worst(ours.gradients, theirs.gradients, noise),
        worst(statistics, theirs.state, {name: name.replace("_mean", "_var") for name in statistics}),
        worst(weights, theirs.state, noise),
        worst(moved, their_moved, noise),
        *compare_test(test.test_symbol, {name: value.float() for name, value in module.state_dict().items()}),
        *(worst(gradients, ours.gradients, noise) for gradients in by_engine),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks whose name contains this")
    arguments = parser.parse_args()
    print(
        "| network | losses | gradients | statistics | weights after 10 steps | their change "
        "| test: maps | scores | boxes | float32 gradients: torch | MXNet |\n" + "|---" * 11 + "|"
    )
    for config in CONFIGS:
        if arguments.only in config.stem:
            row = compare(config)
            numbers = [value for value in vars(row).values() if isinstance(value, float)]
            print(f"| `{row.name}` | " + " | ".join(f"{value:.1e}" for value in numbers) + " |", flush=True)


if __name__ == "__main__":
    main()
