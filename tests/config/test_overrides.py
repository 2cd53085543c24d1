"""Overrides (--set): accepted values and error messages."""

import operator
from typing import Any

import pytest

import config.schema as schema
from config.image_set import ImageSet
from config.overrides import apply_overrides

DEMO = ImageSet("mine", "a.json", "images")


@pytest.mark.parametrize(
    "override, expected",
    [
        ("NeckParam.num_stage=3", 3),
        (" NeckParam.num_stage = 3 ", 3),
        ("RpnParam.head.conv_channel=64", 64),
        ("General.fp16=False", False),
        ("General.name=trial-1", "trial-1"),
        ("General.name=2024", "2024"),
        ("General.name=None", None),
        ("General.name='None'", "None"),
        ("DatasetParam.data_root=/data/a b=c", "/data/a b=c"),
        ("OptimizeParam.optimizer.wd=1", 1.0),
        ("OptimizeParam.optimizer.lr=1e-3", 0.001),
        ("OptimizeParam.schedule.lr_epoch=15,20", (15.0, 20.0)),
        ("OptimizeParam.schedule.lr_epoch=(15, 20)", (15.0, 20.0)),
        ("OptimizeParam.schedule.lr_epoch=15", (15.0,)),
        ("OptimizeParam.schedule.lr_epoch=", ()),
        ("OptimizeParam.schedule.lr_epoch=()", ()),
        ("KvstoreParam.gpus=0", (0,)),
        ("KvstoreParam.gpus=0,1", (0, 1)),
        ("KvstoreParam.gpus=cpu", ()),
        ("DatasetParam.image_set=coco_val2017", ("coco_val2017",)),
        ("DatasetParam.image_set=coco_train2017, coco_val2017", ("coco_train2017", "coco_val2017")),
        ("DatasetParam.image_set=('coco_val2017',)", ("coco_val2017",)),
        ("DatasetParam.image_set=ImageSet('mine', 'a.json', image_dir='images')", (DEMO,)),
        ("TestParam.eval_image_set=ImageSet(name='mine', annotation='a.json', image_dir='images')", DEMO),
        ("ModelParam.pretrain.fixed_param=conv0,stage1", ("conv0", "stage1")),
        ("RenameParam.mapping={'image': 'data', 'a': 'b'}", {"image": "data", "a": "b"}),
    ],
)
def test_values(override: str, expected: Any) -> None:
    config = schema.Config()
    apply_overrides(config, [override])
    value = operator.attrgetter(override.partition("=")[0].strip())(config)
    assert value == expected
    assert type(value) is type(expected)


def test_a_later_override_wins() -> None:
    config = schema.Config()
    apply_overrides(config, ["NeckParam.num_stage=3", "NeckParam.num_stage=5"])
    assert config.NeckParam.num_stage == 5


@pytest.mark.parametrize(
    "override, message",
    [
        ("ResizeParm.short=640", "unknown key 'ResizeParm.short'; nearest: ResizeParam.short"),
        ("ResizeParam.shrt=640", "unknown key 'ResizeParam.shrt'; nearest: ResizeParam.short"),
        ("OptimizeParam.lr=0.1", "unknown key 'OptimizeParam.lr'; nearest: OptimizeParam.optimizer.lr"),
        ("batch_image=4", "nearest: General.batch_image, TestParam.batch_image"),
        ("thr=0.6", "nearest: TestParam.nms.thr"),
        ("RpnParam.head.conv_chanel=4", "nearest: RpnParam.head.conv_channel"),
        ("RpnParam.haed.conv_channel=4", "nearest: RpnParam.head.conv_channel"),
        ("General.__class__=4", "unknown key 'General.__class__'"),
        ("NeckParam.num_stage", "expected Section.field=value, such as NeckParam.num_stage=3"),
        ("=3", "expected Section.field=value"),
        ("NeckParam.num_stage=", "expected a value after '='"),
        ("DatasetParam.data_root=", "expected a value after '='"),
        ("NeckParam.num_stage=many", "expected an integer, such as 7; got 'many'"),
        ("NeckParam.num_stage=2.5", "expected an integer, such as 7; got 2.5"),
        ("General.fp16=true", "expected True or False, such as True; got 'true'"),
        ("General.output_root=None", "expected a string, such as 'experiments'; got None"),
        ("BackboneParam.depth=20", "expected one of 18, 34, 50, 101, 152"),
        ("NormParam.mean=1,2", "expected a tuple (3 values, each a finite number), such as (123.688"),
        ("OptimizeParam.schedule.lr_epoch=15,late", "expected a tuple (each a finite number)"),
        ("KvstoreParam.gpus=all", "expected a tuple (each an integer)"),
        ("ModelParam.neck=NASFPNNeck", "expected a class, such as config.ModelParam.neck = NASFPNNeck"),
        ("KvstoreParam.batch_image=4", "batch_image follows from General.batch_image and cannot be set"),
        ("PadParam.short=640", "short follows from ResizeParam.short and cannot be set"),
        ("ModelParam.train_symbol=x", "train_symbol follows from backbone, neck and head"),
        ("ResizeParam=640", "ResizeParam is a section; set one of its fields: ResizeParam.short"),
        ("AnchorTarget2DParam.generate=1", "set one of its fields: none, all of them are derived"),
        ("RenameParam.mapping.image=data", "RenameParam.mapping is a value without fields; set all of it"),
    ],
)
def test_refusals_name_the_override_and_the_remedy(override: str, message: str) -> None:
    config = schema.Config()
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the text is compared below)
        apply_overrides(config, [override])
    assert str(error.value).startswith(f"--set {override}: ")
    assert message in str(error.value)
    assert config == schema.Config()
