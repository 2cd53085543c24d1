"""Derived fields: each follows from the fields that it is derived from."""

from collections.abc import Callable
from pathlib import Path

import pytest

from config.load import load_config
from config.schema import Config


def load(path: Path, *overrides: str, is_train: bool = True) -> Config:
    return load_config(path, is_train, overrides)


def test_one_line_changes_the_input_size(write_config: Callable[..., Path], no_data: str) -> None:
    path = write_config("config.ResizeParam.short = config.ResizeParam.long = 1280")
    config = load(path, no_data)
    generate = config.AnchorTarget2DParam.generate
    assert (config.PadParam.short, config.PadParam.long) == (1280, 1280)
    assert generate.short == generate.long == (160, 80, 40, 20, 10)
    assert config.transform.sample[-1].p.short == 1280  # Pad2DImageBbox


def test_sides_that_differ(nasfpn_640: Path, no_data: str) -> None:
    config = load(nasfpn_640, "ResizeParam.short=384", no_data)
    assert config.AnchorTarget2DParam.generate.short == (48, 24, 12, 6, 3)
    assert config.AnchorTarget2DParam.generate.long == (80, 40, 20, 10, 5)


def test_one_line_changes_the_repeats(write_config: Callable[..., Path], no_data: str) -> None:
    config = load(write_config("config.NeckParam.num_stage = 3"), no_data)
    names = config.ModelParam.train_symbol.list_arguments()
    assert {name.split("_")[0] for name in names if name.startswith("S")} == {"S0", "S1", "S2", "S3"}


def test_anchors_are_stated_once(nasfpn_640: Path, no_data: str) -> None:
    config = load(nasfpn_640, "RpnParam.anchor_generate.scale=4", "RpnParam.anchor_generate.ratio=1,2", no_data)
    generate = config.AnchorTarget2DParam.generate
    assert (generate.scales, generate.aspects, generate.stride) == ((4.0,), (1.0, 2.0), (8, 16, 32, 64, 128))
    shapes = dict(
        zip(
            config.ModelParam.test_symbol.list_arguments(),
            config.ModelParam.test_symbol.infer_shape(data=(1, 3, 640, 640), im_info=(1, 3))[0],
            strict=True,
        )
    )
    assert shapes["bbox_pred_bias"] == (1 * 2 * 4,)
    assert shapes["cls_pred_bias"] == (1 * 2 * 80,)


def test_learning_rate_follows_from_images_per_step(nasfpn_640: Path, no_data: str) -> None:
    # 0.01 per 8 images
    assert load(nasfpn_640, no_data).OptimizeParam.optimizer.lr == pytest.approx(0.01 / 8 * 8 * 8)
    small = load(nasfpn_640, "General.batch_image=2", "KvstoreParam.gpus=0,1", no_data)
    assert small.OptimizeParam.optimizer.lr == pytest.approx(0.005)
    cpu = load(nasfpn_640, "General.batch_image=2", "KvstoreParam.gpus=cpu", no_data)
    assert cpu.OptimizeParam.optimizer.lr == pytest.approx(0.0025)
    assert load(nasfpn_640, "OptimizeParam.optimizer.lr=0.3", no_data).OptimizeParam.optimizer.lr == 0.3


def test_copies_name_and_precision(nasfpn_640: Path, no_data: str) -> None:
    config = load(nasfpn_640, "General.batch_image=3", "General.fp16=False", no_data)
    assert config.KvstoreParam.batch_image == 3
    sections = (config.KvstoreParam, config.BackboneParam, config.NeckParam, config.RpnParam)
    assert [section.fp16 for section in sections] == [False] * 4
    assert "Cast" not in {node.op for node in config.ModelParam.train_symbol.nodes()}
    assert config.General.name == nasfpn_640.stem
    assert config.TestParam.model.prefix == f"experiments/{nasfpn_640.stem}/checkpoint"
    named = load(nasfpn_640, "General.name=trial", "General.output_root=out", no_data)
    assert named.TestParam.model.prefix == "out/trial/checkpoint"


def test_normalizer_follows_from_type_devices_and_decay(nasfpn_640: Path, no_data: str) -> None:
    overrides = ["NormalizeParam.type=syncbn", "NormalizeParam.wd_mult=0.5", "KvstoreParam.gpus=0,1,2"]
    graph = load(nasfpn_640, *overrides, no_data).ModelParam.train_symbol
    normalizers = [node for node in graph.nodes() if "BatchNorm" in node.op]
    assert {(node.op, node.attrs["ndev"]) for node in normalizers} == {("_contrib_SyncBatchNorm", 3)}
    assert {node.hints["__wd_mult__"] for node in normalizers} == {"0.5"}


def test_inputs_follow_from_the_graph(nasfpn_640: Path, no_data: str) -> None:
    labels = {"rpn_cls_label", "rpn_reg_target", "rpn_reg_weight"}
    train = load(nasfpn_640, no_data)
    assert train.data_name == ("data",)
    assert set(train.label_name) == labels
    synced = load(nasfpn_640, "RpnParam.sync_loss=True", no_data)
    assert set(synced.label_name) == labels | {"rpn_fg_count"}
    test = load(nasfpn_640, no_data, is_train=False)
    assert (test.data_name, test.label_name) == (("data", "im_info"), ())


def test_transforms_by_phase(nasfpn_640: Path, no_data: str) -> None:
    def names(config: Config, part: str) -> list[str]:
        return [type(transform).__name__ for transform in getattr(config.transform, part)]

    train, test = load(nasfpn_640, no_data), load(nasfpn_640, no_data, is_train=False)
    sample = ["ReadRoiRecord", "RandResizeCrop2DImageBbox", "Flip2DImageBbox", "Pad2DImageBbox"]
    assert names(train, "sample") == sample
    batch = ["ConvertImageFromHwcToChw", "Norm2DImage", "PyramidAnchorTarget2D", "RenameRecord"]
    assert names(train, "batch") == batch
    assert names(test, "sample") == ["ReadRoiRecord", "ResizeCrop2DImageBbox", "Pad2DImageBbox"]
    assert names(test, "batch") == ["ConvertImageFromHwcToChw", "Norm2DImage", "RenameRecord"]
    between_epochs = [type(transform).__name__ for transform in train.test_transform.sample]
    assert between_epochs == names(test, "sample")
    synced = load(nasfpn_640, "RpnParam.sync_loss=True", no_data)
    assert names(synced, "batch") == [*batch[:3], "AverageFgCount", "RenameRecord"]


def test_classes_are_counted_in_the_annotations(nasfpn_640: Path, write_annotation: Callable[..., Path]) -> None:
    write_annotation("shapes_train", ["cross", "circle", "star"])
    root = f"DatasetParam.data_root={write_annotation('shapes_val', ['cross', 'circle', 'star'])}"
    sets = "DatasetParam.image_set=shapes_train,shapes_val"
    config = load(nasfpn_640, root, sets)
    assert config.DatasetParam.class_names == ("cross", "circle", "star")
    assert config.RpnParam.num_class == 4
    assert load(nasfpn_640, root, sets, "RpnParam.num_class=4").RpnParam.num_class == 4
    with pytest.raises(ValueError, match=r"num_class is 5, but .* have 3 classes: write 4 \(the background"):
        load(nasfpn_640, root, sets, "RpnParam.num_class=5")


@pytest.mark.parametrize(
    "classes, difference", [(["cross"], "circle"), (["circle", "cross"], "the same names in another order")]
)
def test_image_sets_of_different_classes(
    nasfpn_640: Path, write_annotation: Callable[..., Path], classes: list[str], difference: str
) -> None:
    write_annotation("shapes_train", ["cross", "circle"])
    root = f"DatasetParam.data_root={write_annotation('shapes_val', classes)}"
    with pytest.raises(ValueError, match=rf"shapes_train has 2 classes and shapes_val has .*{difference}"):
        load(nasfpn_640, root, "DatasetParam.image_set=shapes_train,shapes_val")
    evaluated = ["TestParam.eval_epoch=1", "TestParam.eval_image_set=shapes_val"]
    with pytest.raises(ValueError, match=rf"shapes_train has 2 classes and shapes_val has .*{difference}"):
        load(nasfpn_640, root, "DatasetParam.image_set=shapes_train", *evaluated)


def test_classes_without_annotations(nasfpn_640: Path, no_data: str) -> None:
    config = load(nasfpn_640, no_data)
    assert (config.RpnParam.num_class, config.DatasetParam.class_names) == (81, ())
    # annotations on disk take precedence, then RpnParam.num_class, then the published count
    assert load(nasfpn_640, no_data, "RpnParam.num_class=5").RpnParam.num_class == 5
    unknown = "DatasetParam.image_set=mine_train"
    with pytest.raises(FileNotFoundError, match=r"instances_train.json does not exist; .*--data-root"):
        load(nasfpn_640, no_data, unknown)
    assert load(nasfpn_640, no_data, unknown, "RpnParam.num_class=5").RpnParam.num_class == 5
