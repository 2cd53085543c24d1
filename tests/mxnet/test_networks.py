"""The five published networks, trained and tested by both engines; doc/benchmarks/parity.md has the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mxnet", reason="MXNet 1.9.1 is not in this environment: make mxnet-test runs these")

import symbol as S
from config.load import load_config
from core.engine_mxnet.graph import load_symbol
from utils.benchmark_parity import CONFIGS, compare

NAMES = [config.stem for config in CONFIGS]


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_both_engines_agree(config: Path) -> None:
    parity = compare(config)
    for number in ("losses", "gradients", "statistics", "weights", "update", "maps", "scores"):
        assert 0 <= getattr(parity, number) < 1e-4, number
    assert 0 <= parity.boxes < 5e-4  # relative to the image's side: large anchors times the exponential of a delta
    # rounding of float32, in MXNet more than in torch; a wrong definition would differ by far more
    assert parity.torch_single < 0.5
    assert parity.mxnet_single < 0.5


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_json_of_the_published_graphs(config: Path, is_train: bool) -> None:
    """The published size and precision: names, shapes, and the round trip."""
    ours = load_config(str(config), is_train, ("DatasetParam.data_root=none", "RpnParam.num_class=81"))
    graph = ours.ModelParam.train_symbol if is_train else ours.ModelParam.test_symbol
    theirs = load_symbol(graph)
    assert theirs.list_arguments() == graph.list_arguments()
    assert theirs.list_auxiliary_states() == graph.list_auxiliary_states()
    assert theirs.list_outputs() == graph.list_outputs()
    given = {"data": (2, 3, ours.ResizeParam.short, ours.ResizeParam.long)}
    given |= {"rpn_fg_count": (2,)} if "rpn_fg_count" in graph.list_inputs() else {}
    shapes = [[tuple(shape) for shape in part] for part in theirs.infer_shape(**given)]
    assert shapes == [list(part) for part in graph.infer_shape(**given)]
    back = S.load_json(theirs.tojson())
    assert [(n.op, n.name, dict(n.attrs)) for n in back.nodes()] == [
        (n.op, n.name, dict(n.attrs)) for n in graph.nodes()
    ]
    assert back.attr_dict() == graph.attr_dict()
