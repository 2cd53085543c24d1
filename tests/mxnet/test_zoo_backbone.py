"""MXNet's Gluon ResNets as backbones: ours compute the same with their weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import symbol as S
from core.weights.pretrain import load_backbone
from models.backbone.resnet import resnet_v1, resnet_v1b
from symbol.layers import normalizer_factory

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MXNet uses names that NumPy has deprecated
    mx: Any = pytest.importorskip("mxnet", reason="MXNet 1.9.1 is not installed here")

CASES = [(50, resnet_v1, "v1"), (18, resnet_v1b, "v1b")]


def random_network(depth: int, pixels: np.ndarray) -> Any:
    """Return a network with biases, gammas, betas and statistics other than 0 and 1, so that errors show."""
    network = mx.gluon.model_zoo.vision.get_resnet(1, depth)
    network.initialize()
    network.hybridize()
    network(mx.nd.array(pixels))
    rng = np.random.default_rng(depth)
    for name, parameter in network.collect_params().items():
        low, high = {
            "bias": (-1, 1),
            "gamma": (0.3, 0.8),
            "beta": (-0.5, 0.5),
            "mean": (-0.5, 0.5),
            "var": (0.5, 2),
        }.get(name.rpartition("_")[2], (0, 0))
        if high:
            parameter.set_data(mx.nd.array(rng.uniform(low, high, size=parameter.shape)))
    return network


@pytest.mark.parametrize("depth, build, variant", CASES)
def test_c5_is_theirs(tmp_path: Path, depth: int, build: Any, variant: str) -> None:
    pixels = np.random.default_rng(0).normal(size=(1, 3, 64, 96)).astype(np.float32)
    theirs = random_network(depth, pixels)
    theirs.save_parameters(str(tmp_path / "saved.params"))
    theirs.export(str(tmp_path / "exported"))
    expected = mx.nd.array(pixels)
    for block in theirs.features[:8]:  # all but the pooling
        expected = block(expected)
    expected = expected.asnumpy()
    assert expected.std() > 1e-3

    graph = S.Group(build(depth, normalizer_factory("localbn"), False))
    module = S.lower(graph, data=pixels.shape).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for file in ("saved.params", "exported-0000.params"):
        tensors, line = load_backbone(tmp_path / file, shapes, variant)
        assert f"of ResNet-{depth} " in line
        module.load_state_dict(tensors)
        with torch.inference_mode():
            c5 = module(data=torch.from_numpy(pixels))[3].numpy()
        assert c5.shape == expected.shape == (1, 512 if depth == 18 else 2048, 2, 3)
        assert np.abs(c5 - expected).max() <= 1e-4 * np.abs(expected).max()
        for name in shapes:  # so that the next file starts without the loaded values
            module.state_dict()[name].zero_()


@pytest.mark.parametrize("file", ["saved.params", "exported-0000.params"])
def test_another_variant_is_refused(tmp_path: Path, file: str) -> None:
    network = random_network(50, np.zeros((1, 3, 32, 32), np.float32))
    network.save_parameters(str(tmp_path / "saved.params"))
    network.export(str(tmp_path / "exported"))
    with pytest.raises(ValueError, match=r"holds a ResNet v1, .*set ModelParam\.backbone = MSRAResNetV1FPN$"):
        load_backbone(tmp_path / file, {}, "v1b")
