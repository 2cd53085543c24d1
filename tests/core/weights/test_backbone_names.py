"""Conversion of tensor names from the layouts of pretrained ResNets to ours."""

from __future__ import annotations

import pytest

from core.weights.backbone_names import (
    depth_of,
    has_exported_bottlenecks,
    is_ignored,
    norm_after,
    rename,
    rename_exported,
    rename_layer,
    rename_zoo,
    rename_zoo_exported,
)
from tests.core.weights.test_pretrain import UNITS, expected_shapes


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("conv1.weight", "conv0_weight"),
        ("bn1.weight", "bn0_gamma"),
        ("bn1.bias", "bn0_beta"),
        ("bn1.running_mean", "bn0_moving_mean"),
        ("bn1.running_var", "bn0_moving_var"),
        ("layer1.0.conv1.weight", "stage1_unit1_conv1_weight"),
        ("layer3.22.bn3.running_var", "stage3_unit23_bn3_moving_var"),
        ("layer2.0.downsample.0.weight", "stage2_unit1_sc_weight"),
        ("layer2.0.downsample.1.weight", "stage2_unit1_sc_bn_gamma"),
        ("layer2.0.downsample.1.running_mean", "stage2_unit1_sc_bn_moving_mean"),
        ("bn1.num_batches_tracked", None),
        ("fc.weight", None),
        ("layer1.0.se.fc1.weight", None),
        ("layer1.0.downsample.2.weight", None),
        ("conv1.0.weight", None),
        ("conv1.bias", None),
        ("module.conv1.weight", None),
    ],
)
def test_names(theirs: str, ours: str | None) -> None:
    assert rename_layer(theirs) == ours


@pytest.mark.parametrize("depth", UNITS)
def test_the_depth_is_read_from_the_names(depth: int) -> None:
    assert depth_of(expected_shapes(depth)) == depth


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("resnetv1b_conv0_weight", "conv0_weight"),
        ("resnetv1b0_batchnorm0_running_mean", "bn0_moving_mean"),
        ("resnetv1b_layers3_conv17_weight", "stage3_unit6_conv3_weight"),
        ("resnetv1b_layers1_batchnorm3_beta", "stage1_unit2_bn1_beta"),
        ("resnetv1b_down4_conv0_weight", "stage4_unit1_sc_weight"),
        ("resnetv1b_down4_batchnorm0_gamma", "stage4_unit1_sc_bn_gamma"),
        ("resnetv1b_conv1_weight", None),
        ("resnetv1b_down4_conv1_weight", None),
        ("resnetv1b_conv0_bias", None),
        ("resnetv1b_batchnorm0_moving_mean", None),
        ("resnetv1c_conv0_weight", None),
        ("resnetv10_conv0_weight", None),
        (f"resnetv1b_layers{'1' * 5000}_conv0_weight", None),
    ],
)
def test_exported_names(theirs: str, ours: str | None) -> None:
    assert rename_exported(theirs, is_bottleneck=True) == ours


def test_basic_units_have_two_convolutions() -> None:
    assert rename_exported("resnetv1b_layers1_conv3_weight", is_bottleneck=False) == "stage1_unit2_conv2_weight"


def test_gluons_fields() -> None:
    assert rename_layer("layer1.0.downsample.1.gamma") == "stage1_unit1_sc_bn_gamma"
    assert rename_layer("bn1.beta") == "bn0_beta"
    assert rename_layer("conv1.gamma") is None


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("features.0.weight", "conv0_weight"),
        ("features.1.running_var", "bn0_moving_var"),
        ("features.4.0.body.0.bias", "stage1_unit1_conv1_bias"),
        ("features.4.0.body.1.gamma", "stage1_unit1_bn1_gamma"),
        ("features.6.22.body.3.weight", "stage3_unit23_conv2_weight"),
        ("features.7.2.body.7.running_mean", "stage4_unit3_bn3_moving_mean"),
        ("features.5.0.downsample.0.weight", "stage2_unit1_sc_weight"),
        ("features.5.0.downsample.1.beta", "stage2_unit1_sc_bn_beta"),
        ("features.0.gamma", None),  # a v2 network normalises its input
        ("features.4.0.body.2.weight", None),
        ("features.4.0.se.0.weight", None),
        ("features.3.0.weight", None),
        ("features.10.weight", None),
        ("output.weight", None),
    ],
)
def test_names_of_mxnets_own_resnets(theirs: str, ours: str | None) -> None:
    assert rename_zoo(theirs) == ours


@pytest.mark.parametrize(
    "theirs, bottleneck, basic",
    [
        ("resnetv10_conv0_weight", "conv0_weight", "conv0_weight"),
        ("resnetv1_batchnorm0_gamma", "bn0_gamma", "bn0_gamma"),
        ("resnetv10_stage1_conv2_weight", "stage1_unit1_conv3_weight", "stage1_unit2_conv1_weight"),
        ("resnetv10_stage1_conv3_bias", "stage1_unit1_sc_bias", "stage1_unit2_conv2_bias"),
        ("resnetv10_stage2_conv2_weight", "stage2_unit1_conv3_weight", "stage2_unit1_sc_weight"),
        ("resnetv10_stage2_batchnorm3_gamma", "stage2_unit1_sc_bn_gamma", "stage2_unit2_bn1_gamma"),
        ("resnetv10_stage2_batchnorm9_running_var", "stage2_unit3_bn3_moving_var", "stage2_unit5_bn1_moving_var"),
        ("resnetv10_conv1_weight", None, None),
        ("resnetv1b0_stage1_conv0_weight", None, None),
        ("resnetv20_stage1_conv0_weight", None, None),
        (f"resnetv10_stage1_conv{'1' * 5000}_weight", None, None),
    ],
)
def test_exported_names_of_mxnets_own_resnets(theirs: str, bottleneck: str | None, basic: str | None) -> None:
    assert rename_zoo_exported(theirs, is_bottleneck=True) == bottleneck
    assert rename_zoo_exported(theirs, is_bottleneck=False) == basic


@pytest.mark.parametrize(
    "theirs, expected",
    [
        ("layer1.0.conv3.weight", ("stage1_unit1_conv3_weight", "v1b")),
        ("resnetv1b_layers1_conv2_weight", ("stage1_unit1_conv3_weight", "v1b")),
        ("features.4.0.body.6.weight", ("stage1_unit1_conv3_weight", "v1")),
        ("resnetv10_stage1_conv2_weight", ("stage1_unit1_conv3_weight", "v1")),
        ("stage1_unit1_conv3_weight", ("stage1_unit1_conv3_weight", None)),
        ("fc.weight", None),
    ],
)
def test_a_layout_determines_the_variant(theirs: str, expected: tuple[str, str | None] | None) -> None:
    assert rename(theirs, is_bottleneck=True) == expected


@pytest.mark.parametrize(
    "name", ["fc.weight", "output.bias", "resnetv10_dense0_weight", "resnetv1b_dense0_bias", "bn1.num_batches_tracked"]
)
def test_classifiers_are_ignored(name: str) -> None:
    assert is_ignored(name)


def test_exported_bottlenecks_are_detected() -> None:
    assert has_exported_bottlenecks(["resnetv1b_conv0_weight", "resnetv1b_down1_conv0_weight"])
    assert has_exported_bottlenecks(["resnetv10_stage1_conv0_bias"])
    assert not has_exported_bottlenecks(["resnetv10_stage1_conv0_weight", "resnetv1b_down2_conv0_weight"])


@pytest.mark.parametrize(
    "bias, norm",
    [
        ("conv0_bias", "bn0"),
        ("stage2_unit1_sc_bias", "stage2_unit1_sc_bn"),
        ("stage1_unit4_conv1_bias", "stage1_unit4_bn1"),
    ],
)
def test_the_norm_after_a_bias(bias: str, norm: str) -> None:
    assert norm_after(bias) == norm
