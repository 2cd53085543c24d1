"""SimpleDet's RetinaNet files on ResNet v1: same format, other classes; one of them trains and tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import detection_test
import detection_train
from config.load import load_config
from core.weights.checkpoint import load_weights
from core.weights.params_file import write_params
from symbol import lower
from tests.config.simpledet_edits import DEMO
from tests.small_config import SMALL_NETWORK
from utils.make_demo_dataset import make_demo_dataset

SIDES = "(13, 7, 4, 2, 1)"  # 100 and 104 divided by the strides
EPOCHS = ["OptimizeParam.schedule.lr_epoch=", "OptimizeParam.warmup.epoch=0"]
V1 = {
    "from models.NASFPN.builder import NASFPNNeck as": "from models.retinanet.builder import RetinaNetNeck as",
    "from models.NASFPN.builder import ResNetV1bFPN as": "from models.retinanet.builder import MSRAResNet50V1FPN as",
    "from models.NASFPN.builder import RetinaNetHeadWithBN as": "from models.retinanet.builder import RetinaNetHead as",
    'normalizer_factory(type="localbn", ndev=len(KvstoreParam.gpus), wd_mult=1.0)': 'normalizer_factory(type="fixbn")',
    "        depth = 18\n": "",
    "        num_stage = 2\n        dim_reduced = 48\n        S0_kernel = 1\n": "",
    "fp16 = True": "fp16 = False",
    "from_scratch = True": "from_scratch = False",
    '"S2_P6_7_bn"': '"stage3_unit21_plus"',
    'f"pretrain_model/resnet{BackboneParam.depth}_v1b"': '"pretrain_model/resnet-v1-50"',
    'fixed_param = ["conv0"]': 'fixed_param = ["conv0", "stage1", "gamma", "beta"]',
    "end_epoch = 3": "end_epoch = 1",
    "mean = (123.688, 116.779, 103.939)": "mean = (122.7717, 115.9465, 102.9801)",
    "std = (58.393, 57.12, 57.375)": "std = (1.0, 1.0, 1.0)",
    "short = 128": "short = 100",
    "long = 128": "long = 104",
    "        scale_min = 0.8\n        scale_max = 1.2\n": "",
    "self.short = (16, 8, 4, 2, 1)": f"self.short = {SIDES}",
    "self.long = (16, 8, 4, 2, 1)": f"self.long = {SIDES}",
    "neg_thr = 0.5": "neg_thr = 0.4",
    "    from models.NASFPN.input import RandResizeCrop2DImageBbox, ResizeCrop2DImageBbox\n": "",
    "        Pad2DImageBbox,\n": "        Pad2DImageBbox,\n        Resize2DImageBbox,\n",
    "            RandResizeCrop2DImageBbox(": "            Resize2DImageBbox(",
    "            ResizeCrop2DImageBbox(ResizeParam),\n            Pad2DImageBbox(PadParam),\n": "            "
    "Resize2DImageBbox(ResizeParam),\n",  # it pads in training only
}


@pytest.fixture
def v1_file(tmp_path: Path) -> Path:
    """The demo's file, changed to SimpleDet's baseline on ResNet-50 v1."""
    text = DEMO.read_text()
    for old, new in V1.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = tmp_path / "retina_r50v1_fpn_demo.py"
    path.write_text(text)
    return path


def without_data(path: Path) -> list[str]:
    return [f"DatasetParam.data_root={path.parent / 'none'}", *EPOCHS]


def test_it_is_translated(v1_file: Path) -> None:
    config = load_config(v1_file, True, without_data(v1_file))
    model = config.ModelParam
    assert (model.backbone.__name__, model.neck.__name__) == ("MSRAResNetV1FPN", "RetinaNetNeck")
    assert config.BackboneParam.depth == 50
    assert model.pretrain.prefix is None  # the default of v1, so that it follows the depth
    strides = {node.name: node.attrs["stride"] for node in model.train_symbol.nodes() if node.op == "Convolution"}
    assert (strides["stage2_unit1_conv1"], strides["stage2_unit1_conv2"]) == ((2, 2), (1, 1))
    assert not any("is not read" in note for note in config.notes if "roidb" not in note)
    fixed = set(model.pretrain.fixed_param)
    assert {"conv0_weight", "stage1_unit1_conv1_weight", "stage4_unit3_bn3_beta"} <= fixed
    assert "stage2_unit1_conv1_weight" not in fixed


@pytest.mark.parametrize("name, depth", [("MSRAResNet101V1FPN", 101), ("MSRAResNet152V1FPN", 152)])
def test_deeper_ones(v1_file: Path, name: str, depth: int) -> None:
    v1_file.write_text(
        v1_file.read_text().replace("MSRAResNet50V1FPN", name).replace("resnet-v1-50", f"resnet-v1-{depth}")
    )
    config = load_config(v1_file, True, without_data(v1_file))
    assert (config.BackboneParam.depth, config.ModelParam.pretrain.prefix) == (depth, None)
    assert "stage3_unit23_conv1_weight" in config.ModelParam.train_symbol.list_arguments()


def test_basic_blocks_are_v1b(v1_file: Path) -> None:
    v1_file.write_text(v1_file.read_text().replace("MSRAResNet50V1FPN", "MSRAResNet18V1FPN"))
    with pytest.raises(ValueError, match=r"expected one of 50, 101, 152 for ResNet v1, got 18.*use the v1b backbone"):
        load_config(v1_file, True, without_data(v1_file))


def test_a_prefix_of_the_other_variant_stays(v1_file: Path) -> None:
    v1_file.write_text(v1_file.read_text().replace('"pretrain_model/resnet-v1-50"', '"pretrain_model/resnet50_v1b"'))
    config = load_config(v1_file, True, without_data(v1_file))
    assert config.ModelParam.pretrain.prefix == "pretrain_model/resnet50_v1b"


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ('"fix"', ("fixbn", 1.0, 0.9, 1e-5, 1.0)),  # the defaults are mxnext's
        ('type="localbn", wd_mult=0.5, mom=0.99', ("localbn", 0.5, 0.99, 1e-5, 1.0)),
        ('"local", eps=1e-3, lr_mult=0.1', ("localbn", 1.0, 0.9, 1e-3, 0.1)),
    ],
)
def test_the_normalizer_is_read(v1_file: Path, arguments: str, expected: tuple[str, float]) -> None:
    v1_file.write_text(v1_file.read_text().replace('type="fixbn"', arguments))
    config = load_config(v1_file, True, without_data(v1_file))
    names = ("type", "wd_mult", "momentum", "eps", "lr_mult")
    assert tuple(getattr(config.NormalizeParam, name) for name in names) == expected
    assert not any("normalizer_factory" in note for note in config.notes)


def test_it_trains_and_tests(
    v1_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The backbone file is found under SimpleDet's name and loaded; frozen parameters do not change."""
    folder = v1_file.parent
    make_demo_dataset(folder / "data" / "demo", train=9, val=2, size=96, seed=0)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NECKLACE_CACHE", str(folder / "cache"))
    graph = load_config(v1_file, True, [*SMALL_NETWORK, *without_data(v1_file)]).ModelParam.train_symbol
    features = graph.get_internals()["stage4_unit3_relu_output"]
    backbone = lower(features, seed=7, data=(1, 3, 64, 64)).state_dict()
    for name, tensor in backbone.items():  # random weights and fixed statistics: small, or the outputs overflow
        tensor.mul_(0.01 if name.endswith("_gamma") else 1)
    Path("pretrain_model").mkdir()
    write_params(Path("pretrain_model/resnet-v1-50-0000.params"), {**backbone, "fc1_weight": torch.ones(1)})

    arguments = ["--config", str(v1_file), "--gpus", "cpu", *(word for one in SMALL_NETWORK for word in ("--set", one))]
    detection_train.main(arguments)
    run = Path("experiments/retina_r50v1_fpn_demo")
    assert "tensors of ResNet-50 from pretrain_model/resnet-v1-50-0000.params, 1 others ignored" in (
        (run / "log.txt").read_text()
    )
    trained, _ = load_weights(run / "checkpoint-0001.safetensors")
    unchanged = {name for name, tensor in backbone.items() if torch.equal(trained[name], tensor)}
    assert {"conv0_weight", "stage1_unit1_conv1_weight", "stage4_unit1_bn1_gamma", "bn0_moving_mean"} <= unchanged
    assert "stage2_unit1_conv1_weight" not in unchanged
    capsys.readouterr()
    detection_test.main(arguments)
    assert "AP50" in capsys.readouterr().out
    assert (run / "demo_val_result.json").exists()
