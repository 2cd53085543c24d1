"""The table and the picture of a graph's JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import symbol as S
from models.backbone.resnet import resnet_v1b
from models.NASFPN.builder import NASFPNNeck, TopDownBottomUpFPNNeck
from models.retinanet.builder import RetinaNetNeck
from symbol.layers import normalizer_factory
from utils.inspect_symbol import Box, box_of, main, parse_shape, picture, table, wiring

SVG = "{http://www.w3.org/2000/svg}"


def small_graph() -> S.Symbol:
    """Return two layers that share a weight: 3 x 3 x 3 x 3 parameters, and a BatchNorm's 2 x 3."""
    weight = S.var("weight")
    layer: dict[str, Any] = {"weight": weight, "num_filter": 3, "kernel": (3, 3), "no_bias": True}
    x = S.Convolution(S.Convolution(S.var("data"), name="a", **layer), name="b", **layer)
    return S.BatchNorm(x, name="bn", output_mean_var=True)


def pyramid(neck_class: type, **changed: Any) -> S.Symbol:
    normalizer = normalizer_factory("localbn")
    values = {"num_stage": 2, "dim_reduced": 8, "S0_kernel": 1, "normalizer": normalizer} | changed
    return S.Group(neck_class(SimpleNamespace(**values)).get_rpn_feature(resnet_v1b(18, normalizer, False, 8)))


def test_the_table() -> None:
    assert table(small_graph(), {"data": (2, 3, 9, 9)}) == [
        "op           name  output                  parameters",
        "Convolution  a     (2, 3, 7, 7)                    81",
        "Convolution  b     (2, 3, 5, 5)",
        "BatchNorm    bn    (2, 3, 5, 5), (3), (3)           6",
        "3 operators, 87 parameters; inputs: data (2, 3, 9, 9)",
    ]


def test_an_unknown_size_is_a_question_mark() -> None:
    lines = table(small_graph(), {})
    assert [line.split() for line in lines[1:3]] == [["Convolution", "a", "?", "?"], ["Convolution", "b", "?"]]
    assert lines[-1] == "3 operators, ? (give --shape) parameters; inputs: data ?"
    assert table(small_graph(), {"data": (0, 3, 9, 9)})[1].split()[2:] == ["(?,", "3,", "7,", "7)", "81"]


def test_shapes_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="no argument 'image'"):
        table(small_graph(), {"image": (1, 3, 9, 9)})
    with pytest.raises(ValueError, match="Convolution 'b'"):
        table(small_graph(), {"data": (1, 3, 4, 4)})


def labelled(symbol: S.Symbol) -> dict[str, set[str]]:
    """Return boxes and their inputs as texts."""
    return {
        f"{box.title} {box.label}": {f"{s.title} {s.label}" for s in feeds} for box, feeds in wiring(symbol).items()
    }


def test_the_wiring_of_nas_fpn() -> None:
    """The seven merges of Ghiasi et al. 2019, figure 6, as the builder's docstrings name them."""
    edges = labelled(pyramid(NASFPNNeck))
    assert edges["backbone C5"] == {"backbone C4"}
    assert edges["backbone C7"] == {"backbone C5"}
    assert edges["S0 P4"] == {"backbone C4"}
    assert edges["S1 P4_1"] == {"S0 P6", "S0 P4"}
    assert edges["S1 P4_2"] == {"S0 P4", "S1 P4_1"}
    assert edges["S1 P3_3"] == {"S1 P4_2", "S0 P3"}
    assert edges["S1 P4_4"] == {"S1 P4_2", "S1 P3_3"}
    assert edges["S1 P5_5"] == {"S1 P4_4", "S1 P3_3", "S0 P5"}
    assert edges["S1 P7_6"] == {"S1 P5_5", "S1 P4_2", "S0 P7"}
    assert edges["S1 P6_7"] == {"S1 P7_6", "S1 P5_5"}  # not S0 P6, of which only the size is used
    assert edges["S2 P4_1"] == {"S1 P6_7", "S1 P4_4"}
    assert len(edges) == 6 + 5 + 2 * 7


def test_the_wiring_of_fpn() -> None:
    edges = labelled(pyramid(RetinaNetNeck))
    assert edges["FPN sum"] == {"FPN lateral", "FPN sum"}  # both levels
    levels = {
        (box.level, box.label): {(s.level, s.label) for s in feeds}
        for box, feeds in wiring(pyramid(RetinaNetNeck)).items()
    }
    assert levels[4, "sum"] == {(5, "lateral"), (4, "lateral")}
    assert levels[3, "sum"] == {(4, "sum"), (3, "lateral")}
    assert levels[6, "conv"] == {(5, "C5")}
    assert levels[7, "conv"] == {(6, "conv")}


@pytest.mark.parametrize(
    "name, box",
    [
        ("stage4_unit3_relu", Box(0, 0, 5, "C5", "backbone")),
        ("C6", Box(0, 0, 6, "C6", "backbone")),
        ("S0_P3", Box(1, 0, 3, "P3", "S0")),
        ("S12_P4_1_bn_neck", Box(13, 1, 4, "P4_1", "S12")),
        ("S1_P4_1_relu", Box(2, 1, 4, "P4_1", "S1")),
        ("P5_lateral", Box(1, 0, 5, "lateral", "FPN")),
        ("P7_conv_bn", Box(1, 2, 7, "conv", "FPN")),
        ("cls_conv1_bn_s128", Box(10_000, 0, 7, "head", "head")),
        ("bbox_pred_s8", Box(10_000, 0, 3, "head", "head")),
        ("S1_P4_2_to_P3", None),
        ("S1_gp_P6_0_P4_0_sum", None),
        ("conv0", None),
        (f"S1_P{'4' * 500}", None),
    ],
)
def test_boxes_by_name(name: str, box: Box | None) -> None:
    assert box_of(S.Node("Activation", name)) == box


@pytest.mark.parametrize("neck", [NASFPNNeck, TopDownBottomUpFPNNeck, RetinaNetNeck])
def test_the_picture(neck: type) -> None:
    """It is well-formed; levels are rows, the coarsest on top; all boxes and arrows are inside the picture."""
    feeds = wiring(pyramid(neck))
    root = ET.fromstring(picture(feeds))
    labels = [text for text in root.iter(f"{SVG}text") if not text.get("font-weight")]
    assert sorted(text.text or "" for text in labels) == sorted(box.label for box in feeds)
    y_of = {text.text: int(text.get("y", "")) for text in labels}
    assert y_of["C5"] < y_of["C4"] < y_of["C3"] < y_of["C2"]
    arrows = [path for path in root.iter(f"{SVG}path") if path.get("marker-end")]
    assert len(arrows) == sum(map(len, feeds.values()))
    places = {(text.get("x"), text.get("y")) for text in labels}
    assert len(places) == len(feeds)  # no box on another
    assert all(0 < int(x or 0) < int(root.get("width", "")) for x, _ in places)
    assert all(0 < int(y or 0) < int(root.get("height", "")) for _, y in places)


def test_a_graph_without_a_pyramid() -> None:
    with pytest.raises(ValueError, match="no pyramid to draw: expected operators named like S1_P4_1"):
        wiring(small_graph())


def test_more_boxes_than_fit() -> None:
    x = S.var("data")
    for i in range(999):
        x = S.Activation(x, act_type="relu", name=f"S{i}_P3_1")
    assert len(wiring(x)) == 999
    for i in range(2):
        x = S.Activation(x, act_type="relu", name=f"S{i}_P4_1")
    with pytest.raises(ValueError, match="the pyramid has 1001 boxes; expected 1000 at most"):
        wiring(x)


def test_the_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, svg = tmp_path / "a.json", tmp_path / "new" / "a.svg"
    file.write_text(pyramid(NASFPNNeck).tojson())
    main([str(file), "--shape", "data=1,3,128,256", "--svg", str(svg)])
    out = capsys.readouterr().out
    assert "Convolution    S1_P3_3" in out
    assert f"wrote {svg}" in out
    assert ET.parse(svg).getroot().tag == f"{SVG}svg"


@pytest.mark.parametrize("text", ["data", "data=", "=1,2", "data=1,,2", "data=1,-2", "data=1x2", f"data={'9' * 5000}"])
def test_malformed_shapes(text: str) -> None:
    with pytest.raises(ValueError, match="--shape: expected NAME=SIDE,SIDE"):
        parse_shape(text)


@pytest.mark.parametrize("content", [b"{}", b"\xff\xfe", b"[" * 100_000, b'{"nodes": [], "heads": [[0, 0]]}'])
def test_bad_files_are_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(SystemExit, match=f"error: {file}: "):
        main([str(file)])
    with pytest.raises(SystemExit, match=r"error: .*No such file"):
        main([str(file) + "x"])


def test_a_reader_that_stops_early(tmp_path: Path) -> None:
    """`| head` ends it without a message."""
    nodes: list[dict[str, Any]] = [{"op": "null", "name": "x"}]
    nodes += [{"op": "Cast", "name": f"n{i}", "attrs": {"dtype": "float32"}, "inputs": [[i, 0]]} for i in range(5000)]
    (tmp_path / "a.json").write_text(json.dumps({"nodes": nodes, "heads": [[5000, 0]]}))
    script = Path(__file__).parents[2] / "utils" / "inspect_symbol.py"
    command = [sys.executable, str(script), str(tmp_path / "a.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
