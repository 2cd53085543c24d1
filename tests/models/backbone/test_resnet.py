"""ResNet v1 and v1b: equal names and shapes, different placement of the stride."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from config.load import load_config
from models.backbone.resnet import resnet_v1, resnet_v1b
from symbol import Group, Symbol, lower
from symbol.layers import normalizer_factory


def graph(build: Callable[..., tuple[Symbol, ...]], depth: int = 50) -> Symbol:
    return Group(build(depth, normalizer_factory("localbn"), False, 4))


def strided(symbol: Symbol) -> set[str]:
    """Convolutions that halve the sides."""
    nodes = [node for node in symbol.nodes() if node.op == "Convolution"]
    return {node.name for node in nodes if dict(node.attrs)["stride"] == (2, 2)}


@pytest.mark.parametrize("depth", [50, 101, 152])
def test_the_stride_is_all_that_differs(depth: int) -> None:
    v1, v1b = graph(resnet_v1, depth), graph(resnet_v1b, depth)
    shortcuts = {"conv0", *(f"stage{stage}_unit1_sc" for stage in (2, 3, 4))}
    assert strided(v1) == shortcuts | {f"stage{stage}_unit1_conv1" for stage in (2, 3, 4)}
    assert strided(v1b) == shortcuts | {f"stage{stage}_unit1_conv2" for stage in (2, 3, 4)}
    assert v1.infer_shape(data=(1, 3, 64, 96)) == v1b.infer_shape(data=(1, 3, 64, 96))
    assert (v1.list_arguments(), v1.list_auxiliary_states()) == (v1b.list_arguments(), v1b.list_auxiliary_states())
    plain = [re.sub(r'"stride": "\(\d, \d\)"', "", one.tojson()) for one in (v1, v1b)]
    assert plain[0] == plain[1]


def test_equal_weights_give_another_network() -> None:
    """C2 is before the first bottleneck that halves the sides."""
    data = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        v1, v1b = (
            lower(graph(build), seed=0, data=(1, 3, 64, 64)).eval()(data=data) for build in (resnet_v1, resnet_v1b)
        )
    assert torch.equal(v1[0], v1b[0])
    assert not any(torch.allclose(one, other, rtol=0.1) for one, other in zip(v1[1:], v1b[1:], strict=True))


@pytest.mark.parametrize("depth, hint", [(18, "; basic blocks have no variants: use the v1b backbone$"), (51, "$")])
def test_v1_has_bottlenecks(depth: int, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"expected one of 50, 101, 152 for ResNet v1, got {depth}{hint}"):
        graph(resnet_v1, depth)


def test_our_own_configs_may_use_it(tmp_path: Path) -> None:
    path = tmp_path / "a@1_x.py"
    path.write_text(
        "from config.NASFPN.recipe import retina_25epoch\n"
        "from models.retinanet.builder import MSRAResNetV1FPN\n\n\n"
        "def get_config(is_train):\n"
        "    config = retina_25epoch(is_train)\n"
        "    config.ModelParam.backbone = MSRAResNetV1FPN\n"
        "    return config\n"
    )
    config = load_config(path, True, [f"DatasetParam.data_root={tmp_path}", "NeckParam.num_stage=1"])
    assert "stage2_unit1_conv1" in strided(config.ModelParam.train_symbol)
    assert "stage2_unit1_conv2" not in strided(config.ModelParam.train_symbol)
