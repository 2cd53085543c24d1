"""Invalid combinations of fields are rejected with a remedy."""

import pytest

import config.schema as schema
from config.check import check
from config.NASFPN.recipe import retina_25epoch
from config.overrides import apply_overrides
from config.section import field_types, leaves

NUMBERS = {
    key: entry
    for key, section, entry in leaves(schema.Config())
    if field_types(type(section))[entry.name] in (int, float, int | None, float | None) and entry.init
}
UNBOUNDED = {"ResizeParam.scale_max", "TestParam.model.epoch"}  # above scale_min; the epoch of an existing checkpoint


def test_the_recipe_passes() -> None:
    check(retina_25epoch(is_train=True))
    check(retina_25epoch(is_train=False))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["ResizeParam.short=600"],
            "ResizeParam.short: expected a multiple of 128.* got 600; write 512 or 640",
        ),
        (
            ["ResizeParam.long=650"],
            "ResizeParam.long: expected a multiple of 128.* got 650; write 640 or 768",
        ),
        (["ResizeParam.short=64"], "ResizeParam.short: expected a multiple of 128.* got 64; write 128$"),
        (["ResizeParam.short=1024"], r"ResizeParam.short \(1024\) exceeds .*ResizeParam.long=1024"),
        (["ResizeParam.scale_min=1.5"], r"scale_min \(1.5\) exceeds ResizeParam.scale_max \(1.2\)"),
        (["ResizeParam.short=0"], "ResizeParam.short: expected at least 1, got 0"),
        (["ResizeParam.scale_min=0"], "ResizeParam.scale_min: expected more than 0, got 0.0"),
        (["General.batch_image=0"], "General.batch_image: expected at least 1, got 0"),
        (["General.loader_worker=-1"], "General.loader_worker: expected 0 or more, got -1"),
        (
            ["NormalizeParam.type=fixbn", "ModelParam.from_scratch=True"],
            "random weights would diverge; write NormalizeParam.type=localbn",
        ),
        (
            ["RpnParam.head.fp32_predict=False", "General.fp16=False"],
            "nothing is computed in a half type; write RpnParam.head.fp32_predict=True, or General.fp16=True",
        ),
        (["NormalizeParam.eps=0"], "NormalizeParam.eps: expected more than 0, got 0.0"),
        (["NormalizeParam.lr_mult=-1"], "NormalizeParam.lr_mult: expected 0 or more, got -1.0"),
        (["TestParam.nms.thr=1.5"], "TestParam.nms.thr: expected 0 to 1, got 1.5"),
        (["TestParam.nms.sigma=0"], "TestParam.nms.sigma: expected more than 0, got 0.0"),
        (["TestParam.nms.min_score=-0.1"], "TestParam.nms.min_score: expected 0 to 1, got -0.1"),
        (["OptimizeParam.optimizer.lr=0"], "OptimizeParam.optimizer.lr: expected more than 0, got 0.0"),
        (["General.name=''"], "General.name: expected a folder name or None"),
        (["KvstoreParam.gpus=0,0"], "KvstoreParam.gpus: expected distinct device numbers"),
        (["KvstoreParam.gpus=-1"], "KvstoreParam.gpus: expected distinct device numbers"),
        (["DatasetParam.image_set="], "DatasetParam.image_set: expected one or more distinct image sets"),
        (["DatasetParam.image_set=coco_a,coco_a"], "expected one or more distinct image sets"),
        (["DatasetParam.bad_image_limit=0"], "DatasetParam.bad_image_limit: expected at least 1, got 0"),
        (
            ["TestParam.eval_epoch=1"],
            "no image set to evaluate is given; set one, such as TestParam.eval_image_set=",
        ),
        (["NeckParam.S0_kernel=2"], "NeckParam.S0_kernel: expected an odd number"),
        (["RpnParam.anchor_generate.scale="], "anchor_generate.scale: expected positive numbers"),
        (["RpnParam.anchor_generate.ratio=0,1"], "anchor_generate.ratio: expected positive numbers"),
        (["RpnParam.anchor_generate.stride=4,8,16,32,64"], r"expected \(8, 16, 32, 64, 128\)"),
        (["RpnParam.num_class=1"], "RpnParam.num_class: expected the foreground classes"),
        (["AnchorTarget2DParam.assign.neg_thr=0.6"], r"assign.neg_thr \(0.6\) exceeds pos_thr \(0.5\)"),
        (["AnchorTarget2DParam.assign.min_pos_thr=0.6"], r"assign.min_pos_thr \(0.6\) exceeds pos_thr"),
        (["NormParam.std=1,0,1"], "NormParam.std: expected positive numbers"),
        (["RenameParam.mapping={'image': 'x'}"], "RenameParam.mapping: expected 'image' to be renamed to 'data'"),
        (["OptimizeParam.schedule.end_epoch=0"], "OptimizeParam.schedule.end_epoch: expected at least 1, got 0"),
        (["OptimizeParam.schedule.end_epoch=10"], r"between 0 and end_epoch \(10\), .* write for example 6,8"),
        (["OptimizeParam.schedule.lr_epoch=15,25"], r"between 0 and end_epoch \(25\), got \(15.0, 25.0\)"),
        (["OptimizeParam.schedule.lr_epoch=20,15"], "lr_epoch: expected increasing epochs"),
        (["OptimizeParam.warmup.epoch=16"], "warm-up that ends by epoch 15,"),
        (
            ["OptimizeParam.schedule.lr_epoch=", "OptimizeParam.warmup.epoch=26"],
            "warm-up that ends by epoch 25,",
        ),
    ],
)
def test_refusals(overrides: list[str], message: str) -> None:
    config = retina_25epoch(is_train=True)
    apply_overrides(config, overrides)
    with pytest.raises(ValueError, match=message):
        check(config)


def test_a_required_field_that_the_file_did_not_set() -> None:
    with pytest.raises(ValueError, match=r"ModelParam.detector is not set; set it in the config file, such as"):
        check(schema.Config())


def test_every_number_has_a_bound() -> None:
    assert {key for key, entry in NUMBERS.items() if "bound" not in entry.metadata} == UNBOUNDED
    assert len(NUMBERS) > 40


@pytest.mark.parametrize("key", sorted(NUMBERS.keys() - UNBOUNDED))
def test_a_bound_applies_wherever_the_field_is(key: str) -> None:
    config = retina_25epoch(is_train=True)
    apply_overrides(config, [f"{key}=-1"])
    with pytest.raises(ValueError, match=f"^{key}: expected .*, got -1"):
        check(config)


def test_none_is_within_the_bounds_of_a_field_that_accepts_it() -> None:
    config = retina_25epoch(is_train=True)
    apply_overrides(config, ["OptimizeParam.optimizer.lr=None", "RpnParam.num_class=None", "General.name=None"])
    check(config)
