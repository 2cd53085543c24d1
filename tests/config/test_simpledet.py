"""SimpleDet's config files: equal graphs, every field read or reported, and a whole run with one."""

import builtins
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import detection_test
import detection_train
from config.load import format_config, load_config
from tests.config.simpledet_edits import COCO, DEMO, Edit, Load, loader, network
from tests.small_config import SMALL_NETWORK
from utils.make_demo_dataset import make_demo_dataset

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted((ROOT / "config" / "NASFPN").glob("retina_*.py"))
SYNC_LOSS: tuple[Edit, ...] = (
    ("sync_loss = False", "sync_loss = True"),
    ('["rpn_cls_label", "rpn_reg_target"', '["rpn_cls_label", "rpn_fg_count", "rpn_reg_target"'),
    ("Norm2DImage, PyramidAnchorTarget2D\n", "AverageFgCount, Norm2DImage, PyramidAnchorTarget2D\n"),
    (
        '        data_name, label_name = ["data"], ',
        '        transform = {"sample": transform, "batch": [AverageFgCount("rpn_fg_count")]}\n'
        '        data_name, label_name = ["data"], ',
    ),
)
BN: Edit = ('type="localbn"', 'type="syncbn"')
PUBLISHED: dict[str, tuple[Edit, ...]] = {
    "retina_r50v1b_fpn_640_1@256_25epoch": (
        *network(8, 640, 256),
        ("import NASFPNNeck as", "import RetinaNetNeckWithBN as"),
        ("import ResNetV1bFPN as", "import MSRAResNet50V1bFPN as"),
        ("        num_stage = 7\n        dim_reduced = 256\n        S0_kernel = 1\n", ""),
        ("        depth = 50\n", ""),
        ("resnet{BackboneParam.depth}_v1b", "resnet50_v1b"),
        ("wd_mult=1.0", "wd_mult=0.0"),
    ),
    "retina_r50v1b_nasfpn_640_7@256_25epoch": network(8, 640, 256),
    "retina_r50v1b_nasfpn_1024_7@256_25epoch": (*network(4, 1024, 256), BN),
    "retina_r50v1b_nasfpn_1280_7@384_25epoch": (*network(2, 1280, 384), BN, *SYNC_LOSS),
    "retina_r50v1b_tdbu_1280_3@384_25epoch": (
        *network(3, 1280, 384, 3),
        BN,
        *SYNC_LOSS,
        ("import NASFPNNeck as", "import TopDownBottomUpFPNNeck as"),
    ),
    "retina_r50v1b_tdbu_640_3@384_25epoch": (
        *network(8, 640, 384, 3),
        ("from models.NASFPN.builder import NASFPNNeck as", "from models.FPG.builder import PAFPNNeckP3P7 as"),
        ("wd_mult=1.0", "wd_mult=0.0"),
    ),
}


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return loader(tmp_path)


@pytest.mark.parametrize("own", EXPERIMENTS, ids=lambda path: path.stem)
def test_the_published_experiments_are_the_same_as_ours(own: Path, load: Load, no_data: str) -> None:
    ours = load_config(own, True, [no_data])
    theirs = load(*COCO, *PUBLISHED[own.stem], name=own.stem)
    assert theirs.ModelParam.train_symbol.tojson() == ours.ModelParam.train_symbol.tojson()
    assert theirs.ModelParam.test_symbol.tojson() == ours.ModelParam.test_symbol.tojson()
    differing = set(format_config(theirs).splitlines()) ^ set(format_config(ours).splitlines())
    about = {line.split(" = ")[0] for line in differing if not line.startswith("# note: ")}
    # steps are whole iterations and logged less often; nccl becomes device; the data folders differ
    assert about <= {
        "OptimizeParam.schedule.lr_epoch",
        "OptimizeParam.warmup.epoch",
        "General.log_frequency",
        "KvstoreParam.kvstore",
        "DatasetParam.data_root",
    }
    assert theirs.OptimizeParam.schedule.lr_epoch == pytest.approx((15, 20), abs=5e-3)
    assert theirs.OptimizeParam.optimizer.lr == pytest.approx(ours.OptimizeParam.optimizer.lr, rel=1e-12)
    assert theirs.label_name == ours.label_name
    assert not any("is not read" in note for note in theirs.notes if "roidb" not in note)


@pytest.mark.parametrize("is_train", [True, False])
def test_transforms_and_inputs_are_ours(load: Load, is_train: bool) -> None:
    config = load(is_train=is_train, overrides=["OptimizeParam.schedule.lr_epoch=2", "OptimizeParam.warmup.epoch=1"])
    sample = [type(one).__name__ for one in config.transform.sample]
    resize = "RandResizeCrop2DImageBbox" if is_train else "ResizeCrop2DImageBbox"
    flip = ["Flip2DImageBbox"] if is_train else []
    assert sample == ["ReadRoiRecord", resize, *flip, "Pad2DImageBbox"]
    assert config.data_name == (("data",) if is_train else ("data", "im_info"))
    assert [type(one).__name__ for one in config.metric_list] == ["FGAccMetric"]
    assert config.General.name == "one@file"
    assert config.TestParam.model.epoch is None  # end_epoch is the newest


def test_none_says_nothing(load: Load) -> None:
    config = load(*COCO, ("begin_epoch = 0", "lr_factor = None"), ("conv_channel = 256", "conv_channel = None"))
    assert config.OptimizeParam.schedule.lr_factor == 0.1
    assert config.RpnParam.head.conv_channel == 256


@pytest.mark.parametrize(
    "edit, note",
    [
        (("max_det_per_image =", "max_det_per_imgae ="), r"imgae = 100 is not read.*mean max_det_per_image\?$"),
        (("num_stage = 2", "stem_width = 3"), r"NeckParam.stem_width = 3 is not read: there is no such setting$"),
        (("        class warmup:", "        class warm_up:"), r"OptimizeParam.warm_up.type = 'gradual' is not read"),
        (("out_size = None", "out_size = 7"), "RoiParam.out_size = 7 is not read"),
        (("fp16 = True", "fp16 = True\n        loader_collector = 2"), "General.loader_collector = 2 is not read"),
        (("wd_mult=1.0)", "wd_mult=1.0)\n        momentum = 0.99"), "NormalizeParam.momentum not read"),
        (("    class NormParam", "    class KDParam:\n        stage = 1\n\n    class NormParam"),
         "KDParam.stage not read"),
        (("roidb: roidb", "roidb: roidb * 2"), "TestParam.process_roidb is not called"),
        (("roidb: outputs", "roidb: [one['im_id'] for one in outputs]"), "TestParam.process_output is not called"),
        (("pos_fraction = None", "pos_fraction = 0.5"), "sample.pos_fraction = 0.5 is not read: no anchor is sampled"),
        (("scale_max = 1.2", "scale_max = 1.2\n        seed = 1"), "ResizeParam.seed = 1 is not read"),
        (("ReadRoiRecord(None),\n            Norm2DImage(NormParam),\n            Rand", "ReadRoiRecord(('gt',)), "
          "Norm2DImage(NormParam),\n            Rand"), "gt_select"),
        (("begin_epoch = 0", "begin_epoch = 6"), "begin_epoch = 6 is not read: --resume"),
        (('"localbn", ndev=len(KvstoreParam.gpus)', '"syncbn", ndev=8'), "ndev=8.*has 1 devices: .*all processes"),
        (("epoch = 0\n            fixed", "epoch = 7\n            fixed"), "pretrain.epoch = 7 is not read"),
        (('f"experiments/', 'f"runs/'), "TestParam.model.prefix 'runs/one@file/checkpoint' is not read"),
        (('label_name = ["data"], ["rpn', 'label_name = ["data"], ["gt_bbox", "rpn'), "label_name: gt_bbox not read"),
        (("[metric.FGAccMetric(", "[metric.Loss('loss'), metric.FGAccMetric("), "metric.Loss not computed"),
        (("fp16 = True", "fp16 = True"), "General.fp16: .* fixed 128; .*dynamic loss scaling"),
        (("random = True", "random = True"), "ModelParam.random: .* General.seed"),
        (("random = True", "random = True"), r"data/cache/\*.roidb is not read"),
    ],
)  # fmt: skip
def test_settings_that_differ_or_are_ignored_are_noted(load: Load, edit: Edit, note: str) -> None:
    epochs = ["OptimizeParam.schedule.lr_epoch=2", "OptimizeParam.warmup.epoch=1"]
    config = load(edit, overrides=epochs)
    assert any(re.search(note, one) for one in config.notes), config.notes
    lines = [line.removeprefix("# note: ") for line in format_config(config).splitlines()]
    assert lines[: len(config.notes)] == config.notes


def test_a_tests_notes_are_about_testing(load: Load) -> None:
    edits = (
        ("epoch = 0\n            fixed", "epoch = 7\n            fixed"),
        ("[metric.FGAccMetric(", "[metric.Loss('loss'), metric.FGAccMetric("),
    )
    training = load(*COCO, *edits).notes
    for about in ("nccl", "loss", "PyramidAnchorTarget2D", "General.seed", "pretrain.epoch", "metric.Loss"):
        assert any(about in note for note in training), about
    assert [note[:18] for note in load(*COCO, *edits, is_train=False).notes] == [
        "data/cache/*.roidb",
        "TestParam.coco.ann",
    ]


def test_a_function_that_is_not_called_is_named(load: Load) -> None:
    edits = (
        ("random = True", "random = True\n        process_weight = halve"),
        ("    class General:", "    def halve(*_): pass\n\n    class General:"),
    )
    assert "ModelParam.process_weight = halve is not read: there is no such setting" in load(*COCO, *edits).notes


def test_our_own_files_have_no_notes(nasfpn_640: Path, no_data: str) -> None:
    config = load_config(nasfpn_640, True, [no_data])
    assert config.notes == []
    assert "note" not in format_config(config)


@pytest.mark.parametrize(
    "edit, message",
    [
        (("aspects = (0.5, 1.0, 2.0)", "aspects = (0.5, 1.0, 3.0)"),
         r"AnchorTarget2DParam.generate.aspects is \(0.5, 1.0, 3.0\), but RpnParam.anchor_generate.ratio is"),
        (("scales = (4 * 2**0", "scales = (5 * 2**0"), "generate.scales is .* but RpnParam.anchor_generate.scale is"),
        (("self.short = (16, 8, 4, 2, 1)", "self.short = (16, 8, 4, 2, 2)"),
         r"AnchorTarget2DParam.generate.short is .*, but ResizeParam.short \(128\) divided by the strides is"),
        (("long = ResizeParam.long", "long = 256"), "PadParam.long is 256, but ResizeParam.long is 128"),
        (("S0_kernel = 1\n        fp16 = General.fp16", "fp16 = False"), "NeckParam.fp16 is False, but General.fp16"),
        (('kvstore = "nccl"\n        batch_image = General.batch_image', "batch_image = 2"),
         "KvstoreParam.batch_image is 2, but General.batch_image is 8"),
        (("S0_kernel = 1\n        fp16 = General.fp16\n        normalizer = NormalizeParam.normalizer",
          "normalizer = normalizer_factory('fixbn')"), "NeckParam.normalizer is .*, but RpnParam.normalizer is"),
        (("sync_loss = False", "sync_loss = True"), "sync_loss is True, but AverageFgCount is not in transform"),
        (('type="localbn"', 'type="gn"'), r"normalizer_factory\(type\): expected one of 'localbn', 'syncbn', 'fixbn'"),
        (("num_stage = 2", "num_stage = '2'"), "NeckParam.num_stage: expected an integer, such as 7; got '2'"),
        (("lr = 0.01 / 8 * images_per_step", "lr = 0"), "optimizer.lr: expected a number above 0, got 0"),
        (("lr = 0.001 / 8 * images_per_step", "lr = -1"), "warmup.lr: expected a number of 0 or more, got -1"),
        (('type = "sgd"', 'type = "adam"'), "OptimizeParam.optimizer.type: expected 'sgd'.*; got 'adam'"),
        (('type = "sgd"', 'type = "sgd"\n            lr_mode = "cosine"'), "lr_mode: expected 'step'"),
        (("[2000 // images_per_step]", "['a']"), r"lr_iter .*: expected numbers of iterations, got \['a'\]"),
        (('type = "nms"', "type = max"), "TestParam.nms.type: expected 'nms', .*, got a function"),
        (("Pad2DImageBbox(PadParam),\n            ConvertImageFromHwcToChw(),\n            Pyramid",
          "ConvertImageFromHwcToChw(), Pyramid"), "transform: Pad2DImageBbox is missing"),
        (("            RandResizeCrop2DImageBbox(ResizeParam),\n", ""), "one of RandResizeCrop.* is missing"),
        (("RandResizeCrop2DImageBbox(ResizeParam)", "RandResizeCrop2DImageBbox()"), "needs the argument ResizeParam"),
        (("            Flip2DImageBbox(),", "            ResizeCrop2DImageBbox(ResizeParam),"), "both .* are present"),
        (("            Flip2DImageBbox(),", "            ReadRoiRecord.apply,"), "has no attribute 'apply'"),
        (("import RandResizeCrop2DImageBbox,", "import RandCrop as RandResizeCrop2DImageBbox,"),
         "transform: models.NASFPN.input.RandCrop is not supported; supported are ReadRoiRecord"),
        (("get_train_symbol(*parts)", "get_train_symbol(*parts, 3)"), "train_symbol: expected RetinaNet"),
        (("train_symbol = train_graph", "train_symbol = 3"), r"expected RetinaNet\(\).get_train_symbol\("),
        (("Head(RpnParam)", "Head(NeckParam)"), "RpnParam: the head was built from a different class"),
        (("Neck(NeckParam)", "Neck()"), "expected one argument, NeckParam, got 0 arguments"),
        (("        data_name,\n        label_name,\n        metric_list,\n", ""), "expected the 13 values .*, got 10"),
        (("fp16 = True", "fp16 = Genral.fp16"), "line 16: NameError: name 'Genral'"),
    ],
)  # fmt: skip
def test_contradictions_and_mistakes(load: Load, edit: Edit, message: str) -> None:
    with pytest.raises(ValueError, match=rf"one@file\.py.*{message}"):
        load(edit, overrides=["OptimizeParam.schedule.lr_epoch=2", "OptimizeParam.warmup.epoch=1"])


@pytest.mark.parametrize(
    "edit, message",
    [
        (("            pos_thr = 0.5", "            pos_thr = 1.5"), "assign.pos_thr: expected 0 to 1, got 1.5"),
        (("            thr = 0.5", "            thr = -1"), "TestParam.nms.thr: expected 0 to 1, got -1.0"),
        (("alpha = 0.25", "alpha = 2"), "RpnParam.focal_loss.alpha: expected 0 to 1, got 2.0"),
    ],
)  # fmt: skip
def test_bounds_apply_to_translated_fields(load: Load, edit: Edit, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(edit, overrides=["OptimizeParam.schedule.lr_epoch=2", "OptimizeParam.warmup.epoch=1"])


@pytest.mark.parametrize(
    "edit, message",
    [
        (("from models.NASFPN.builder import NASFPNNeck", "from models.FPG.builder import FPGNeckP2P6"),
         "the neck models.FPG.builder.FPGNeckP2P6"),
        (("import RetinaNet as", "import FasterRcnn as"), "train_symbol: expected RetinaNet"),
        (("models.retinanet.builder import RetinaNet as", "symbol.builder import FasterRcnn as"), "symbol.builder"),
        (("import ResNetV1bFPN as", "import MSRAResNet50V2FPN as"), "the backbone models.*V2FPN"),
        (("import RetinaNetHeadWithBN as", "import MaskHead as"), "the head models.NASFPN.builder.MaskHead"),
        (("import NASFPNNeck as", "import BiFPNNeck as"), "the neck models.NASFPN.builder.BiFPNNeck"),
        (("import normalizer_factory", "import normalizer_factory, bn_count"), "mxnext.complicate.bn_count"),
        (("from mxnext.c", "import mxnext as X\n\nX.conv\nfrom mxnext.c"), "mxnext.conv is not supported"),
        (("\n\ndef get", "\n\nclass Mine(Neck):\n    pass\n\n\ndef get"), "derived from NASFPNNeck, is not supported"),
    ],
)  # fmt: skip
def test_what_is_not_here_is_named_with_what_is(load: Load, edit: Edit, message: str) -> None:
    with pytest.raises(ValueError, match=rf"one@file\.py.*{message}.*RetinaNet.*TopDownBottomUpFPNNeck"):
        load(edit)


def test_a_missing_module_of_others_is_pythons_matter(load: Load) -> None:
    with pytest.raises(ValueError, match=r"line 8: ModuleNotFoundError: No module named 'no_such_module'"):
        load(("from models.retinanet.builder", "import no_such_module\nfrom models.retinanet.builder"), name="a")


def test_classes_of_the_data_set_contradict(load: Load, write_annotation: Callable[..., Path]) -> None:
    root = write_annotation("demo_train", ["a", "b"])
    epochs = ["OptimizeParam.schedule.lr_epoch=2", "OptimizeParam.warmup.epoch=1"]
    with pytest.raises(ValueError, match="but the images of demo_train have 2 classes: write 3"):
        load(overrides=[f"DatasetParam.data_root={root}", *epochs])


def test_nothing_stays_behind_after_loading(load: Load) -> None:
    before, real = set(sys.modules), builtins.__import__
    load(*COCO)
    assert not any(name.partition(".")[0] in ("mxnext", "mxnet") for name in set(sys.modules) - before)
    assert builtins.__import__ is real
    from models.retinanet.builder import RetinaNet

    assert isinstance(RetinaNet, type)


def test_it_trains_and_tests_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_demo_dataset(tmp_path / "data" / "demo", train=9, val=2, size=96, seed=0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NECKLACE_CACHE", str(tmp_path / "cache"))
    small = [*SMALL_NETWORK, "OptimizeParam.schedule.end_epoch=1"]
    arguments = ["--config", str(DEMO), "--gpus", "cpu", *(word for one in small for word in ("--set", one))]
    detection_train.main(arguments)
    folder = Path("experiments/simpledet_demo")
    assert (folder / "checkpoint-0001.safetensors").exists()
    stored = (folder / "config.txt").read_text()
    assert "# note: data/cache/*.roidb is not read" in stored
    assert "is after the end" in stored  # 3 iterations per epoch, and lr_iter for the demo's 1000 samples
    capsys.readouterr()
    detection_test.main(arguments)
    assert "AP50" in capsys.readouterr().out
    assert (folder / "demo_val_result.json").exists()
