"""Settings of a SimpleDet file that depend on overrides or the graph: sides, epochs, names; and their notes."""

from pathlib import Path

import pytest

from core.engine.schedule import build_schedule
from tests.config.simpledet_edits import COCO, NO_FLIP, SIDES_800_1333, Edit, Load, loader, network
from utils.make_demo_dataset import make_demo_dataset

LR, WARMUP = "OptimizeParam.schedule.lr_epoch", "OptimizeParam.warmup.epoch"
ON: Edit = ("memonger = False", "memonger = True")


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return loader(tmp_path)


def test_iterations_become_epochs_and_follow_the_devices(load: Load) -> None:
    config = load(*COCO, *network(8, 640, 256))
    iter_per_epoch = 3820  # 244436 samples, 64 per step
    epochs = (244436 * 15 // 64 / iter_per_epoch, 244436 * 20 // 64 / iter_per_epoch)
    assert config.OptimizeParam.schedule.lr_epoch == epochs
    assert [round(epoch * iter_per_epoch) for epoch in epochs] == [57289, 76386]
    assert config.OptimizeParam.warmup.epoch == 244436 // 64 / iter_per_epoch
    assert config.OptimizeParam.warmup.lr_factor == pytest.approx(0.1)
    assert config.notes[-2:] == [
        "OptimizeParam.schedule.lr_iter, at 64 images per step and 3820 steps per epoch: "
        "57289 is epoch 15, 76386 is epoch 20",
        "OptimizeParam.warmup.iter, at 64 images per step: 3819 is epoch 0.9997",
    ]
    one = load(*COCO, *network(8, 640, 256), overrides=["KvstoreParam.gpus=0", "General.batch_image=4"])
    assert one.OptimizeParam.schedule.lr_epoch == epochs
    assert one.OptimizeParam.optimizer.lr == pytest.approx(0.08 / 16)
    given = load(*COCO, overrides=[f"{LR}=3,4", f"{WARMUP}=0.5"])
    assert given.OptimizeParam.schedule.lr_epoch == (3.0, 4.0)
    assert given.OptimizeParam.warmup.epoch == 0.5


def test_iterations_from_the_end_and_beyond_it(load: Load) -> None:
    steps = "[244436 * epoch // images_per_step for epoch in (15, 20)]"
    config = load(*COCO, (steps, "[-30555, 10**6]"))  # 30555 steps of 8 images on each of 8 GPUs: two epochs
    assert config.OptimizeParam.schedule.lr_epoch == (25 - 30555 / 3820,)
    assert any(note.endswith("1000000 is after the end") for note in config.notes)
    short = load(*COCO, overrides=["OptimizeParam.schedule.end_epoch=1"], name="short")
    assert short.OptimizeParam.schedule.lr_epoch == ()
    assert short.OptimizeParam.warmup.epoch == 3819 / 3820
    long = load(*COCO, ("iter = 244436 //", "iter = 2 * 244436 //"), overrides=["OptimizeParam.schedule.end_epoch=1"])
    assert long.OptimizeParam.warmup.epoch == 1.0
    assert any(note.endswith("7638 is epoch 1.999, cut to 1") for note in long.notes)


def test_iterations_of_large_data_on_small_data(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 images with flips are 5 iterations: the file's schedule ends long after the training. The advice is valid."""
    monkeypatch.setenv("NECKLACE_CACHE", str(tmp_path / "cache"))
    make_demo_dataset(tmp_path / "none" / "demo", train=20, val=1, size=32, seed=0)
    edits = (("[2000 // images_per_step]", "[60000]"), ("iter = 400 // images_per_step", "iter = 500"))
    notes = load(*edits).notes
    *_, lr, warmup, advice = notes
    assert lr.endswith("at 8 images per step and 5 steps per epoch: 60000 is after the end")
    assert warmup.endswith("at 8 images per step: 500 is epoch 100, cut to 3")
    assert advice.endswith(f"set epochs with --set {LR}=1.8,2.4 --set {WARMUP}=0.12")
    advised = load(*edits, overrides=advice.partition("--set ")[2].split(" --set "))
    assert advised.OptimizeParam.schedule.lr_epoch == (1.8, 2.4)
    assert advised.OptimizeParam.warmup.epoch == 0.12
    *_, warmup, advice = load(*edits, overrides=[f"{LR}=2"]).notes
    assert warmup.endswith("cut to 2")
    assert advice.endswith(f"set epochs with --set {WARMUP}=0.12")


def test_as_many_iterations_without_a_flip(load: Load) -> None:
    """SimpleDet doubles the list of images, whether or not a transform flips the second half."""
    flipped, plain = load(*COCO), load(*COCO, NO_FLIP)
    assert (flipped.DatasetParam.flip, plain.DatasetParam.flip) == (True, False)
    assert (flipped.OptimizeParam.schedule.end_epoch, plain.OptimizeParam.schedule.end_epoch) == (25, 50)
    theirs = build_schedule(flipped, iter_per_epoch=3820)
    ours = build_schedule(plain, iter_per_epoch=1910)
    for step in (0, 3818, 3819, 57288, 57289, 76385, 76386, 25 * 3820 - 1):
        assert ours.lr_at(step) == pytest.approx(theirs.lr_at(step), rel=1e-9), step
    assert any("contains every image twice" in note and "25 epochs are 50 here" in note for note in plain.notes)
    assert not any("contains every image twice" in note for note in flipped.notes)
    three = load(*COCO, NO_FLIP, overrides=["OptimizeParam.schedule.end_epoch=3", f"{LR}=2", f"{WARMUP}=1"])
    assert three.OptimizeParam.schedule.end_epoch == 3
    assert not any("contains every image twice" in note for note in three.notes)


def test_an_override_without_a_flip(load: Load) -> None:
    config = load(*COCO, overrides=["DatasetParam.flip=False", f"{LR}=30,40", f"{WARMUP}=2"])
    assert config.OptimizeParam.schedule.end_epoch == 50
    assert load(*COCO, NO_FLIP, is_train=False).OptimizeParam.schedule.end_epoch == 25


def test_what_flips_and_what_is_normalised_may_come_from_either_module(load: Load) -> None:
    edits = (
        NO_FLIP,
        ("import Norm2DImage, ", "import "),
        ("        Pad2DImageBbox,\n", "        Pad2DImageBbox, Norm2DImage,\n"),
    )
    config = load(*COCO, *edits)
    assert not config.DatasetParam.flip
    assert any("at 64 images per step and 1910 steps per epoch" in note for note in config.notes)


def test_an_epoch_of_unknown_length(load: Load) -> None:
    message = (
        r"lr_iter: the number of iterations .* demo_train .*--data-root.*lr_epoch=1\.8,2\.4 --set .*warmup.epoch=0\.12$"
    )
    with pytest.raises(FileNotFoundError, match=message):
        load()


def test_the_2014_split_has_as_many_iterations_as_that_of_2017(load: Load) -> None:
    sets = ("coco_train2014", "coco_valminusminival2014", "coco_minival2014")
    assert (
        load(*COCO[1:], ('image_set = ("demo_train",) if', f"image_set = {sets} if")).OptimizeParam
        == load(*COCO).OptimizeParam
    )
    whole = ("coco_train2014", "coco_val2014")
    assert (
        load(*COCO[1:], ('image_set = ("demo_train",) if', f"image_set = {whole} if")).OptimizeParam
        == load(*COCO).OptimizeParam
    )


def test_a_warm_up_from_nothing(load: Load) -> None:
    config = load(*COCO, ("lr = 0.001 / 8 * images_per_step", "lr = 0"))
    assert config.OptimizeParam.warmup.lr_factor == 0.0
    schedule = build_schedule(config, 3820)
    assert [schedule.lr_at(step) for step in (0, 1)] == pytest.approx([0, schedule.lr / 3819])


def test_memonger(load: Load) -> None:
    assert load(*COCO).ModelParam.memonger_until is None  # it is off
    known = load(*COCO, ON, ('"S2_P6_7_bn"', '"stage4_unit1_relu"')).ModelParam
    assert (known.memonger, known.memonger_until) == (True, "stage4_unit1_relu")
    config = load(*COCO, ON, ('"S2_P6_7_bn"', '"S3_P6_7_bn"'))  # of two stages
    assert (config.ModelParam.memonger, config.ModelParam.memonger_until) == (True, None)
    assert any(note.startswith("ModelParam.memonger_until = 'S3_P6_7_bn' is not read") for note in config.notes)


def test_either_name_of_a_necks_norm(load: Load) -> None:
    config = load(*COCO, ON)
    assert config.ModelParam.memonger_until == "S2_P6_7_bn_neck"
    assert not any("memonger_until" in note for note in config.notes)


def test_memonger_switched_by_an_override(load: Load) -> None:
    stage: Edit = ('"S2_P6_7_bn"', '"stage4_unit1_relu"')
    assert load(*COCO, stage, overrides=["ModelParam.memonger=True"]).ModelParam.memonger_until == "stage4_unit1_relu"
    assert load(*COCO, ON, stage, overrides=["ModelParam.memonger=False"]).ModelParam.memonger_until is None
    free = load(*COCO, stage, overrides=["ModelParam.memonger=True", "ModelParam.memonger_until=None"])
    assert free.ModelParam.memonger_until is None


def test_a_file_of_800_x_1333_is_padded(load: Load) -> None:
    config = load(*COCO, *SIDES_800_1333)
    assert (config.ResizeParam.short, config.ResizeParam.long) == (896, 1408)
    resize, pad = config.transform.sample[1], config.transform.sample[-1]
    assert type(resize).__name__ == "Resize2DImageBbox"
    assert (resize.p.short, resize.p.long) == (800, 1333)
    assert (pad.p.short, pad.p.long) == (896, 1408)
    assert type(config.test_transform.sample[1]).__name__ == "Resize2DImageBbox"
    assert any("fit 800 x 1333 and padded to 896 x 1408" in note for note in config.notes)


@pytest.mark.parametrize(
    "given, fit, padded",
    [
        ((128, 256), (128, 256), (128, 256)),
        ((896, 1408), (896, 1408), (896, 1408)),
        ((600, 1000), (600, 1000), (640, 1024)),
    ],
)
def test_other_sides_by_overrides(
    load: Load, given: tuple[int, int], fit: tuple[int, int], padded: tuple[int, int]
) -> None:
    overrides = [f"ResizeParam.short={given[0]}", f"ResizeParam.long={given[1]}"]
    config = load(*COCO, *SIDES_800_1333, overrides=overrides)
    for transform in (config.transform, config.test_transform):
        resize, pad = transform.sample[1], transform.sample[-1]
        assert (resize.p.short, resize.p.long) == fit
        assert (pad.p.short, pad.p.long) == padded
    said = [note for note in config.notes if note.startswith("ResizeParam")]
    assert [f"fit {fit[0]} x {fit[1]} and padded to {padded[0]} x {padded[1]}" in note for note in said] == (
        [True] if fit != padded else []
    )


def test_annotations_of_other_images_are_not_read(load: Load) -> None:
    def said(*edits: Edit, overrides: tuple[str, ...] = ()) -> list[str]:
        notes = load(*edits, is_train=False, overrides=overrides).notes
        return [note for note in notes if "coco.annotation" in note]

    assert said() == []
    assert said(*COCO, overrides=("DatasetParam.image_set=coco_val2017",)) == []
    assert said(*COCO, overrides=("TestParam.coco.annotation=own.json",)) == []
    (none,) = said(*COCO)
    assert "instances_val2017.json' is not read: coco_test-dev2017 has no annotations" in none
    assert none.endswith("--set DatasetParam.image_set=coco_val2017")
    (other,) = said(*COCO, overrides=("DatasetParam.image_set=coco_minival2014",))
    assert "is not read: coco_minival2014 is evaluated with its own" in other


def test_fixed_parameters_are_found_anywhere_in_a_name(load: Load) -> None:
    pattern = '["conv0", "stage1", "gamma"]\n            excluded_param = ["stage1_unit2"]'
    config = load(*COCO, ('["conv0"]', pattern))
    fixed = config.ModelParam.pretrain.fixed_param
    assert {"conv0_weight", "stage1_unit1_conv1_weight", "stage4_unit1_bn1_gamma", "S1_P4_1_bn_neck_gamma"} <= set(
        fixed
    )
    assert not any("stage1_unit2" in name or "stage2_unit1_conv" in name for name in fixed)
    (note,) = [note for note in config.notes if "fixed_param" in note]
    assert f"{len(fixed)} of " in note
    assert "one of conv0, stage1, gamma and none of stage1_unit2 anywhere" in note
    plain = load(*COCO)
    assert plain.ModelParam.pretrain.fixed_param == ("conv0",)
    assert not any("fixed_param" in note for note in plain.notes)
    free = load(*COCO, ('["conv0"]', pattern), overrides=["ModelParam.pretrain.fixed_param=bn0"])
    assert free.ModelParam.pretrain.fixed_param == ("bn0",)
    scratch = load(*COCO, ('["conv0"]', pattern), overrides=["ModelParam.from_scratch=True"])
    assert scratch.ModelParam.pretrain.fixed_param == ("conv0", "stage1", "gamma")  # none is fixed
