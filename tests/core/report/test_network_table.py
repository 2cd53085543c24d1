"""Counts computed by hand for a small graph; tests/models/test_golden.py has those of the published networks."""

from __future__ import annotations

import symbol as S
from core.report.network_table import network_table
from symbol.layers import conv, max_pool, normalizer_factory, relu


def small_graph() -> S.Symbol:
    norm = normalizer_factory("localbn")
    data = S.var("data")
    x = relu(norm(conv(data, "conv0", 4, kernel=3, stride=2), name="bn0"), "relu0")
    x = relu(norm(conv(x, "stage1_unit1_conv1", 8), name="stage1_unit1_bn1"), "stage1_unit1_relu1")
    coarse = max_pool(x, "C6", kernel=2, stride=2)
    weight, bias = S.var("cls_pred_weight"), S.var("cls_pred_bias")
    heads = [
        conv(level, f"cls_pred_s{stride}", 3, kernel=3, no_bias=False, weight=weight, bias=bias)
        for level, stride in ((coarse, 4), (x, 2))
    ]
    return S.Group(heads)


def test_parameters_and_multiply_adds_by_stage() -> None:
    table = network_table(small_graph(), data=(1, 3, 8, 8))
    rows = {stage.name: (stage.output, stage.num_parameter, stage.multiply_add) for stage in table.stages}
    assert rows["stem"] == ((1, 4, 4, 4), 4 * 27 + 8, 4 * 16 * 27)
    assert rows["backbone stage1"] == ((1, 8, 4, 4), 8 * 4 + 16, 8 * 16 * 4)
    # the weight shared by both levels counts once, the multiply-adds twice; the finest level's output is shown
    assert rows["head cls"] == ((1, 3, 4, 4), 3 * 72 + 3, 3 * (16 + 4) * 72)
    assert table.num_parameter == 116 + 48 + 219
    assert table.multiply_add == 1728 + 512 + 4320


def test_the_table_leaves_out_stages_without_parameters() -> None:
    lines = network_table(small_graph(), data=(1, 3, 8, 8)).lines()
    assert [line.split("  ")[0].strip() for line in lines] == ["stage", "stem", "backbone stage1", "head cls", "total"]
    assert lines[-1].split() == ["total", "383", "6,560"]


def test_losses_are_a_stage_of_their_own() -> None:
    difference = S.elemwise_sub(small_graph()[1], S.var("target"), name="difference")
    weighted = S.elemwise_mul(S.var("weight"), S.smooth_l1(difference, name="smooth"), name="weighted")
    table = network_table(S.MakeLoss(weighted, name="total"), data=(1, 3, 8, 8))
    outputs = {stage.name: stage.output for stage in table.stages}
    # a node whose name belongs to no stage would count as the stem
    assert outputs == {
        "stem": (1, 4, 4, 4),
        "backbone stage1": (1, 8, 4, 4),
        "head cls": (1, 3, 4, 4),
        "loss": (1, 3, 4, 4),
    }
