"""The networks against what MXNet computed from the original's graphs; see tests/golden.

Both sides are float64 where gradients and losses are compared: `*.float64.json` has MXNet's, with every operator in
float64 on the float32 parameters and inputs. In float32 fifty layers of batch statistics carry the rounding of one
processor into the third digit of a gradient. The outputs (`*.npz`) and the moving statistics (`*.json`) are MXNet's in
float32; they are compared with ours in float64, so that all of the difference is MXNet's own rounding and is the same
on every processor.

N images, A = 9 anchors per cell, C classes, K anchors of all levels, P cells of all levels.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import symbol as S
from config.load import load_config
from config.schema import Config
from models.backbone.resnet import resnet_v1b
from models.retinanet.builder import RetinaNetHead
from symbol import Group, Symbol, var
from symbol.layers import normalizer_factory
from symbol.passes import fold_batch_norm, fuse_inference

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIGS = Path(__file__).parents[2] / "config" / "NASFPN"
FPN = "retina_r50v1b_fpn_640_1@256_25epoch"
NASFPN = "retina_r50v1b_nasfpn_640_7@256_25epoch"
NASFPN_1280 = "retina_r50v1b_nasfpn_1280_7@384_25epoch"
TDBU = "retina_r50v1b_tdbu_1280_3@384_25epoch"
CASES = {"fpn_128": FPN, "nasfpn_128x256": NASFPN, "tdbu_128": TDBU}
STRIDES = (8, 16, 32, 64, 128)
A = 9
EPS = 1e-5 + 1e-10  # of the original's BatchNorms


def load(name: str, *overrides: str) -> Config:
    """A shipped config, in float32 with local BN, whatever lies in ./data."""
    plain = ("General.fp16=False", "NormalizeParam.type=localbn", "RpnParam.sync_loss=False")
    return load_config(CONFIGS / f"{name}.py", True, ("DatasetParam.data_root=none", *plain, *overrides))


def value_of(name: str, shape: tuple[int, ...]) -> Tensor:
    """A parameter's value in the golden cases, which follows from its name."""
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    fan_in = math.prod(shape[1:])
    rules = (
        ("_bn3_gamma", 0.3 * (1 + 0.1 * z)),
        ("_gamma", 1 + 0.1 * z),
        ("_moving_var", 1 + 0.1 * np.abs(z)),
        ("_beta", 0.1 * z),
        ("_moving_mean", 0.1 * z),
        ("cls_pred_bias", -math.log(99) + 0.1 * z),
        ("_bias", 0.01 * z),
        ("cls_pred_weight", 0.05 * z / math.sqrt(fan_in / 576)),
        ("bbox_pred_weight", 0.05 * z / math.sqrt(fan_in / 576)),
        ("_weight", z * math.sqrt(1.5 / fan_in)),
    )
    return torch.from_numpy(next(value for ending, value in rules if name.endswith(ending)).astype(np.float32))


@dataclass
class Case:
    """A golden case, and what the network of our config says to it."""

    facts: dict[str, Any]
    float64: dict[str, Any]  # MXNet's losses and gradient norms, every operator in float64
    arrays: dict[str, np.ndarray]
    config: Config
    train: Symbol
    state: dict[str, Tensor]  # parameters and auxiliary states before the training forward
    evaluated: list[np.ndarray]  # logits (N, K, C), deltas (N, 4A, P), with the moving statistics
    trained: list[np.ndarray]  # the same with the batch's
    losses: list[float]
    gradient_norm: dict[str, float]
    statistic_norm: dict[str, float]

    @property
    def cells(self) -> list[int]:
        """Of every level."""
        height, width = self.facts["config"]["input"][2:]
        return [(height // stride) * (width // stride) for stride in STRIDES]


def expand_weight(label: np.ndarray, cells: list[int]) -> Tensor:
    """(N, K) labels, levels of (A, H*W) -> (N, 4A, P), 1 where the anchor is foreground."""
    levels = np.split(label >= 1, np.cumsum([A * cell for cell in cells])[:-1], axis=1)
    parts = [level.reshape(len(label), A, -1).repeat(4, axis=1) for level in levels]
    return torch.from_numpy(np.concatenate(parts, axis=2).astype(np.float32))


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    facts, float64 = (json.loads((GOLDEN / f"{request.param}{end}.json").read_text()) for end in ("", ".float64"))
    arrays = dict(np.load(GOLDEN / f"{request.param}.npz"))
    wanted = facts["config"]
    config = load(
        CASES[request.param],
        f"RpnParam.num_class={wanted['num_foreground_class'] + 1}",
        f"RpnParam.head.conv_channel={wanted['conv_channel']}",
        f"NeckParam.dim_reduced={wanted['dim_reduced']}",
        f"NeckParam.num_stage={wanted['num_stage']}",
        f"ResizeParam.short={min(wanted['input'][2:])}",
        f"ResizeParam.long={max(wanted['input'][2:])}",
        f"NormalizeParam.eps={EPS}",
    )
    train = config.ModelParam.train_symbol
    internals = train.get_internals()
    watched = [internals[f"{name}_concat_output"] for name in ("cls_logit", "bbox_delta")]
    module = S.lower(Group([*watched, train]))
    state = {name: value_of(name, tuple(p.shape)) for name, p in module.state_dict().items()}
    module.load_state_dict(state)
    module.double()
    case = Case(facts, float64, arrays, config, train, state, [], [], [], {}, {})
    inputs = {
        "data": torch.from_numpy(np.random.RandomState(0).standard_normal(wanted["input"]).astype(np.float32)),
        "rpn_cls_label": torch.from_numpy(arrays["label"]),
        "rpn_reg_target": torch.from_numpy(arrays["reg_target"]),
        "rpn_reg_weight": expand_weight(arrays["label"], case.cells),
    }
    inputs = {name: value.double() for name, value in inputs.items()}
    with torch.no_grad():
        case.evaluated = [out.numpy() for out in module.eval()(**inputs)[:2]]
    logit, delta, *losses = module.train()(**inputs)
    torch.stack(losses).sum().backward()
    case.trained = [logit.detach().numpy(), delta.detach().numpy()]
    case.losses = [loss.item() for loss in losses]
    case.gradient_norm = {name: p.grad.norm().item() for name, p in module.named_parameters() if p.grad is not None}
    case.statistic_norm = {name: b.norm().item() for name, b in module.named_buffers()}
    return case


def assert_close(ours: np.ndarray, golden: np.ndarray, tolerance: float) -> None:
    """Within a part of the largest value: single logits near 0 carry the rounding of the whole sum."""
    assert ours.shape == golden.shape
    np.testing.assert_allclose(ours, golden, rtol=0, atol=tolerance * np.abs(golden).max())


def test_names_order_and_shapes(case: Case) -> None:
    given = tuple(case.facts["config"]["input"])
    arguments, _, auxiliary = case.train.infer_shape(data=given)
    named = dict(zip(case.train.list_arguments(), arguments, strict=True))
    golden = {name: tuple(shape) for name, shape in case.facts["arguments"].items()}
    assert [item for item in named.items() if not item[0].startswith("rpn_")] == list(golden.items())
    golden = {name: tuple(shape) for name, shape in case.facts["auxiliary_states"].items()}
    assert list(zip(case.train.list_auxiliary_states(), auxiliary, strict=True)) == list(golden.items())


def test_inputs_have_the_shapes_of_the_labels(case: Case) -> None:
    given = tuple(case.facts["config"]["input"])
    named = dict(zip(case.train.list_arguments(), case.train.infer_shape(data=given)[0], strict=True))
    assert case.train.list_inputs() == ["data", "rpn_cls_label", "rpn_reg_weight", "rpn_reg_target"]
    assert named["rpn_cls_label"] == case.arrays["label"].shape
    assert named["rpn_reg_target"] == named["rpn_reg_weight"] == case.arrays["reg_target"].shape


def test_outputs_of_every_level(case: Case) -> None:
    internals = case.train.get_internals()
    names = [f"{subnet}_pred_s{stride}_output" for subnet in ("cls", "bbox") for stride in STRIDES]
    levels = Group([internals[name] for name in names])
    shapes = levels.infer_shape(data=tuple(case.facts["config"]["input"]))[1]
    assert [list(shape) for shape in shapes] == case.facts["outputs"]


def test_outputs_with_moving_statistics(case: Case) -> None:
    for ours, key in zip(case.evaluated, ("eval_cls", "eval_bbox"), strict=True):
        assert_close(ours, case.arrays[key], 1e-5)  # reached: 3e-6


def test_outputs_with_folded_batch_normalization(case: Case) -> None:
    """The folded and fused graph gives what the graph gives with moving statistics."""
    internals = case.train.get_internals()
    graph = Group([internals[f"{name}_concat_output"] for name in ("cls_logit", "bbox_delta")])
    weights = {name: tensor.numpy().astype(np.float64) for name, tensor in case.state.items()}
    folded, new = fold_batch_norm(graph, weights)
    kept = [node.name for node in folded.nodes() if node.op == "BatchNorm"]
    assert kept == (["P6_conv_bn"] if "P6_conv_weight" in weights else [])  # the raw P6 goes on to P7
    module = S.lower(fuse_inference(folded)).double().eval()
    module.load_state_dict({name: torch.from_numpy(array) for name, array in new.items()})
    data = np.random.RandomState(0).standard_normal(case.facts["config"]["input"]).astype(np.float32)
    with torch.no_grad():
        outputs = module(data=torch.from_numpy(data).double())
    for ours, theirs in zip(outputs, case.evaluated, strict=True):
        assert_close(ours.numpy(), theirs, 1e-12)


def test_outputs_with_batch_statistics(case: Case) -> None:
    for ours, key in zip(case.trained, ("train_cls", "train_bbox"), strict=True):
        assert_close(ours, case.arrays[key], 1e-4)  # reached: 4e-5


def test_losses(case: Case) -> None:
    expected = [case.float64["loss"][name] for name in ("cls", "reg")]
    assert case.losses == pytest.approx(expected, rel=1e-11)  # reached: 4e-13


def biases_before_batch_norm(graph: Symbol) -> dict[str, str]:
    """Biases of convolutions that feed nothing but BatchNorms, each with its weight."""
    convolutions: dict[str, tuple[str, list[str]]] = {}
    users: dict[Any, list[str]] = {}
    for node in graph.nodes():
        for child, _ in node.inputs:
            users.setdefault(child, []).append(node.op)
    for node in graph.nodes():
        if node.op == "Convolution" and len(node.inputs) == 3:
            weight, bias = (child.name for child, _ in node.inputs[1:])
            convolutions.setdefault(bias, (weight, []))[1].extend(users[node])
    return {bias: weight for bias, (weight, ops) in convolutions.items() if set(ops) == {"BatchNorm"}}


def test_gradients_of_biases_before_a_batch_norm(case: Case) -> None:
    """A BatchNorm subtracts its mean, and with it any bias before it: the gradient of such a bias is 0. It is not
    computed here; in MXNet it is the rounding of a sum that cancels, held against the weight's gradient."""
    zero = biases_before_batch_norm(case.train)
    assert len(zero) >= 8  # of the two subnets; the stacked necks and FPN's levels add their own
    golden = case.float64["grad_norm"]
    assert golden.keys() - case.gradient_norm.keys() == zero.keys()
    for bias, weight in zero.items():
        assert golden[bias] < 1e-12 * golden[weight], bias  # reached: 1e-15


def test_gradients(case: Case) -> None:
    """Reached: 2e-11 of every norm above 1e-5 of the whole gradient's, and 2e-14 of the whole for all. Where the batch
    statistics are those of two values (1 x 1, two images) BN gives +-1 whatever comes in: gradients behind it vanish
    but for a difference that cancels, and the absolute tolerance takes over."""
    golden = case.float64["grad_norm"]
    names = sorted(golden.keys() - biases_before_batch_norm(case.train).keys())
    assert names == sorted(case.gradient_norm)
    ours, theirs = (np.array([norms[name] for name in names]) for norms in (case.gradient_norm, golden))
    whole = np.linalg.norm(theirs)
    assert (theirs > 1e-5 * whole).mean() > 0.8
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12 * whole)


def test_moving_statistics_after_one_step(case: Case) -> None:
    golden = case.facts["aux_norm_after_one_train_forward"]
    assert case.statistic_norm == pytest.approx(golden, rel=2e-5)  # reached: 6e-6


def test_building_twice_gives_the_same_text(case: Case) -> None:
    model = case.config.ModelParam
    parts = (
        model.backbone(case.config.BackboneParam),
        model.neck(case.config.NeckParam),
        model.head(case.config.RpnParam),
    )
    again = model.detector().get_train_symbol(*parts)
    assert again.tojson() == case.train.tojson()
    assert S.load_json(case.train.tojson()).tojson() == case.train.tojson()
    test = model.detector().get_test_symbol(*parts)
    assert test.tojson() == model.test_symbol.tojson() == S.load_json(test.tojson()).tojson()


def test_the_test_graph_ranks_the_same_logits(case: Case) -> None:
    """Each level's rows are its highest probabilities above 0.05 (on the coarsest: all), in order, then zeros."""
    top_n = 1000
    module = S.lower(case.config.ModelParam.test_symbol).eval()
    module.load_state_dict(case.state)
    shape = case.facts["config"]["input"]
    data = np.random.RandomState(0).standard_normal(shape).astype(np.float32)
    im_info = torch.tensor([[shape[2], shape[3], 1.0]]).repeat(shape[0], 1)
    with torch.no_grad():
        score, bbox = module(data=torch.from_numpy(data), im_info=im_info)
    assert score.shape == (shape[0], 5 * top_n, 5)
    assert bbox.shape == (shape[0], 5 * top_n, 4)
    ends = np.cumsum([A * cell for cell in case.cells])
    for level, logit in enumerate(np.split(case.arrays["eval_cls"], ends[:-1], axis=1)):
        prob = 1 / (1 + np.exp(-logit.astype(np.float64))).reshape(shape[0], -1)  # (N, A*H*W*C)
        for image in range(shape[0]):
            rows = score[image, level * top_n : (level + 1) * top_n].max(1).values.numpy()
            expected = np.sort(prob[image][prob[image] > (0.05 if level < 4 else 0)])[::-1][:top_n]
            assert abs(np.count_nonzero(rows) - len(expected)) <= 1  # one may lie on the threshold
            both = min(np.count_nonzero(rows), len(expected))
            np.testing.assert_allclose(rows[:both], expected[:both], rtol=1e-3)


def parameter_count(graph: Symbol, side: int) -> int:
    arguments = zip(graph.list_arguments(), graph.infer_shape(data=(1, 3, side, side))[0], strict=True)
    inputs = graph.list_inputs()
    return sum(math.prod(shape) for name, shape in arguments if name not in inputs)


@pytest.mark.parametrize(
    "name, side, expected",
    [(FPN, 640, 37_991_732), (NASFPN, 640, 60_898_100), (NASFPN_1280, 1280, 98_617_140), (TDBU, 1280, 65_410_740)],
)
def test_parameter_counts_of_the_published_networks(name: str, side: int, expected: int) -> None:
    assert parameter_count(load(name, "RpnParam.num_class=81").ModelParam.train_symbol, side) == expected


@pytest.mark.parametrize(
    "depth, expected",  # torchvision's ResNets, without their last layer
    [(18, 11_176_512), (34, 21_284_672), (50, 23_508_032), (101, 42_500_160), (152, 58_143_808)],
)
def test_backbones_of_every_depth(depth: int, expected: int) -> None:
    features = Group(resnet_v1b(depth, normalizer_factory("localbn"), fp16=False))
    assert parameter_count(features, 64) == expected
    widths = (64, 128, 256, 512) if depth < 50 else (256, 512, 1024, 2048)
    shapes = features.infer_shape(data=(2, 3, 96, 160))[1]
    assert shapes == [(2, width, 96 // s, 160 // s) for width, s in zip(widths, (4, 8, 16, 32), strict=True)]


def test_a_backbone_of_no_known_depth() -> None:
    with pytest.raises(ValueError, match="expected one of 18, 34, 50, 101, 152, got 51"):
        resnet_v1b(51, normalizer_factory("localbn"), fp16=False)


def pyramid(name: str, *overrides: str) -> Group:
    """P3 to P7 of a shipped config, on the smallest backbone."""
    config = load(name, "BackboneParam.depth=18", "BackboneParam.num_filter=8", *overrides)
    backbone = config.ModelParam.backbone(config.BackboneParam)
    return Group(config.ModelParam.neck(config.NeckParam).get_rpn_feature(backbone.get_rpn_feature()))


@pytest.mark.parametrize("name", [FPN, NASFPN, TDBU])
@pytest.mark.parametrize("dim", [8, 40])
@pytest.mark.parametrize("num_stage", [1, 2, 3])
def test_necks_of_any_width_and_number_of_stages(name: str, dim: int, num_stage: int) -> None:
    levels = pyramid(name, f"NeckParam.dim_reduced={dim}", f"NeckParam.num_stage={num_stage}")
    for height, width in ((128, 128), (128, 640), (384, 256)):
        shapes = levels.infer_shape(data=(2, 3, height, width))[1]
        assert shapes == [(2, dim, height // stride, width // stride) for stride in STRIDES]
    stages = {argument.split("_")[0] for argument in levels.list_arguments() if argument.startswith("S")}
    assert stages == (set() if name == FPN else {f"S{stage}" for stage in range(num_stage + 1)})


@pytest.mark.parametrize("name, merges", [(NASFPN, 7), (TDBU, 8)])
def test_a_stage_adds_its_merges(name: str, merges: int) -> None:
    counts = [
        parameter_count(pyramid(name, "NeckParam.dim_reduced=16", f"NeckParam.num_stage={n}"), 128) for n in (1, 2, 3)
    ]
    merge = 16 * 16 * 9 + 16 + 2 * 16  # a 3x3 convolution with bias, gamma and beta
    assert [counts[1] - counts[0], counts[2] - counts[1]] == [merges * merge] * 2


@pytest.mark.parametrize("name", [FPN, NASFPN, TDBU])
def test_pyramids_compute_on_wide_and_tall_images(name: str) -> None:
    module = S.lower(pyramid(name, "NeckParam.dim_reduced=8", "NeckParam.num_stage=2"))
    for height, width in ((128, 384), (384, 256)):
        levels = module(data=torch.rand(1, 3, height, width))
        assert [level.shape for level in levels] == [(1, 8, height // s, width // s) for s in STRIDES]
        assert all(level.isfinite().all() and level.std() > 0 for level in levels)


def smooth_l1(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 0.11, x * x / 0.22, x.abs() - 0.055)


def focal_sum(logit: Tensor, label: Tensor) -> Tensor:
    """Lin et al. 2017, equation 5, with alpha 0.25 and gamma 2."""
    p = logit.sigmoid()
    is_positive = label[..., None] == torch.arange(1, logit.shape[2] + 1)
    loss = torch.where(is_positive, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log())
    return loss[label >= 0].sum()


@pytest.mark.parametrize("sync", [False, True])
def test_the_losses_of_the_head(sync: bool) -> None:
    """With sync_loss both losses are divided by the count averaged over the devices, else by the device's own + 1."""
    config = load(FPN, "RpnParam.num_class=4", "RpnParam.head.conv_channel=8", f"RpnParam.sync_loss={sync}")
    head: RetinaNetHead = config.ModelParam.head(config.RpnParam)
    levels = tuple(var(f"p{stride}") for stride in STRIDES)
    graph = Group(head.get_loss(levels, var("rpn_cls_label"), var("rpn_reg_target"), var("rpn_reg_weight")))
    assert ("rpn_fg_count" in graph.list_inputs()) == sync
    assert graph.list_outputs() == ["cls_loss_output", "reg_loss_output"]
    internals = graph.get_internals()
    watched = [internals[f"{subnet}_pred_s{stride}_output"] for subnet in ("cls", "bbox") for stride in STRIDES]
    module = S.lower(Group([graph, *watched])).double()

    random = torch.Generator().manual_seed(0)
    cells = [(128 // stride) ** 2 for stride in STRIDES]
    inputs = {f"p{stride}": torch.randn(2, 8, 128 // stride, 128 // stride, generator=random) for stride in STRIDES}
    label = torch.randint(-1, 4, (2, A * sum(cells)), generator=random).float()
    target = torch.randn(2, 4 * A, sum(cells), generator=random) * 0.2
    weight = expand_weight(label.numpy(), cells)
    inputs |= {"rpn_cls_label": label, "rpn_reg_target": target, "rpn_reg_weight": weight}
    inputs |= {"rpn_fg_count": torch.tensor([700.0, 700.0])} if sync else {}
    inputs = {name: value.double() for name, value in inputs.items()}
    cls_loss, reg_loss, *maps = module(**inputs)
    gradients = torch.autograd.grad(cls_loss + reg_loss, maps)

    divisor = 700 if sync else (label >= 1).sum() + 1
    label, target, weight = (inputs[f"rpn_{name}"] for name in ("cls_label", "reg_target", "reg_weight"))
    plain = [level.detach().requires_grad_() for level in maps]
    by_anchor = [level.reshape(2, A, 3, -1).transpose(2, 3).reshape(2, -1, 3) for level in plain[: len(STRIDES)]]
    logit, delta = torch.cat(by_anchor, 1), torch.cat([level.flatten(2) for level in plain[len(STRIDES) :]], 2)
    expected = [focal_sum(logit, label) / divisor, (weight * smooth_l1(delta - target)).sum() / divisor]
    torch.testing.assert_close([cls_loss, reg_loss], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(list(gradients), list(torch.autograd.grad(sum(expected), plain)), rtol=1e-9, atol=1e-15)


def test_half_precision_changes_no_parameter() -> None:
    small = ("RpnParam.num_class=5", "NeckParam.dim_reduced=16", "NeckParam.num_stage=1", "BackboneParam.depth=18")
    full, half = (load(NASFPN, *small, f"General.fp16={fp16}").ModelParam.train_symbol for fp16 in (False, True))
    assert half.list_arguments() == full.list_arguments()
    assert half.infer_shape(data=(1, 3, 128, 128)) == full.infer_shape(data=(1, 3, 128, 128))
    casts = [node.attrs["dtype"] for node in half.nodes() if node.op == "Cast"]
    assert sorted(casts) == ["float16"] + ["float32"] * 10  # the input; both subnets of five levels before they predict


def test_predictions_in_a_half_type() -> None:
    """Without fp32_predict no convolution computes in float32; the test graph casts what is decoded."""
    small = ("RpnParam.num_class=5", "NeckParam.dim_reduced=16", "NeckParam.num_stage=1", "BackboneParam.depth=18")
    full, half = (
        load(NASFPN, *small, "General.fp16=True", f"RpnParam.head.fp32_predict={fp32}").ModelParam
        for fp32 in (True, False)
    )
    assert half.train_symbol.list_arguments() == full.train_symbol.list_arguments()
    assert half.test_symbol.list_arguments() == full.test_symbol.list_arguments()
    assert [node.attrs["dtype"] for node in half.train_symbol.nodes() if node.op == "Cast"] == ["float16"]
    casts = [node for node in half.test_symbol.nodes() if node.op == "Cast" and node.attrs["dtype"] == "float32"]
    predicted = [node.inputs[0][0].name for node in casts]
    assert sorted(predicted) == sorted(f"{subnet}_pred_s{stride}" for subnet in ("cls", "bbox") for stride in STRIDES)
    users = {child: node.op for node in half.test_symbol.nodes() for child, _ in node.inputs if child in casts}
    assert sorted(users.values()) == ["Activation"] * 5 + ["_contrib_GenProposalRetina"] * 5
