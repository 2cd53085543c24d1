"""Sections: unknown names, wrong types and derived fields are rejected."""

import copy
import pickle
from collections.abc import Callable
from typing import Any, Literal

import pytest

import config.schema as schema
from config.field_type import convert, describe
from config.image_set import ImageSet
from config.section import fill, leaves


def test_an_unknown_field_is_refused_with_the_nearest_names() -> None:
    resize = schema.ResizeParam()
    with pytest.raises(ValueError, match=r"ResizeParam has no field 'shrt'; nearest: short"):
        resize.shrt = 640
    with pytest.raises(AttributeError, match=r"ResizeParam has no field 'shrt'; nearest: short"):
        _ = resize.shrt
    with pytest.raises(ValueError, match=r"ResizeParam has no field 'shrt'; nearest: short"):
        schema.ResizeParam(shrt=640)


def test_an_unknown_section_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(AttributeError, match=r"Config has no field 'ResizeParm'; nearest: ResizeParam"):
        _ = schema.Config().ResizeParm
    with pytest.raises(ValueError, match=r"Config has no field 'ResizeParm'; nearest: ResizeParam"):
        schema.Config().ResizeParm = schema.ResizeParam()


def test_a_wrong_type_is_refused_with_what_was_expected_and_an_example() -> None:
    resize = schema.ResizeParam()
    with pytest.raises(ValueError, match=r"^ResizeParam.short: expected an integer, such as 640; got '640'$"):
        resize.short = "640"
    assert resize.short == 640
    with pytest.raises(ValueError, match=r"expected True or False, such as True; got 1"):
        schema.General(fp16=1)
    with pytest.raises(ValueError, match=r"NormalizeParam.type: expected one of 'localbn', 'syncbn', 'fixbn'"):
        schema.NormalizeParam().type = "groupnorm"
    with pytest.raises(ValueError, match=r"Config.ResizeParam: expected a ResizeParam; got 640"):
        schema.Config().ResizeParam = 640


def test_a_derived_field_is_refused_and_names_its_source() -> None:
    kvstore = schema.KvstoreParam()
    with pytest.raises(ValueError, match=r"batch_image follows from General.batch_image and cannot be set"):
        kvstore.batch_image = 2
    with pytest.raises(ValueError, match=r"fp16 follows from General.fp16 and bf16 and cannot be set"):
        schema.KvstoreParam(fp16=False)
    with pytest.raises(AttributeError, match=r"batch_image follows from General.batch_image and is not filled"):
        _ = kvstore.batch_image


def test_a_required_field_that_is_not_set_says_how() -> None:
    with pytest.raises(
        AttributeError, match=r"neck is not set; set it in the config file, such as config.ModelParam.neck = NASFPNNeck"
    ):
        _ = schema.ModelParam().neck


def test_every_section_starts_with_its_own_defaults() -> None:
    first, second = schema.Config(), schema.Config()
    first.RenameParam.mapping["image"] = "x"
    first.RpnParam.head.num_conv = 1
    assert second.RenameParam.mapping == {"image": "data"}
    assert second.RpnParam.head.num_conv == 4


def test_pickle_and_deepcopy_keep_derived_fields() -> None:
    pad = schema.PadParam(max_num_gt=7)
    fill(pad, "short", 128)
    for copied in (pickle.loads(pickle.dumps(pad)), copy.deepcopy(pad)):
        assert (copied.short, copied.max_num_gt) == (128, 7)
        with pytest.raises(AttributeError, match=r"long follows from ResizeParam.long"):
            _ = copied.long


def test_leaves_visits_every_field_once() -> None:
    keys = [key for key, _, _ in leaves(schema.Config())]
    assert len(keys) == len(set(keys))
    assert {"General.seed", "RpnParam.head.num_conv", "TestParam.model.epoch", "get_metric"} <= set(keys)
    assert "RpnParam.head" not in keys


@pytest.mark.parametrize(
    "value, hint, expected",
    [
        (3, float, 3.0),
        (3, int | None, 3),
        (None, int | None, None),
        ([1, 2], tuple[float, ...], (1.0, 2.0)),
        ((), tuple[int, ...], ()),
        ((1, 2, 3), tuple[float, float, float], (1.0, 2.0, 3.0)),
        ({"a": "b"}, dict[str, str], {"a": "b"}),
        (18, Literal[18, 34], 18),
        (("a",), tuple[str | ImageSet, ...], ("a",)),
    ],
)
def test_convert_accepts(value: Any, hint: Any, expected: Any) -> None:
    converted = convert(value, hint)
    assert converted == expected
    assert type(converted) is type(expected)
    if isinstance(expected, tuple):
        assert [type(item) for item in converted] == [type(item) for item in expected]


@pytest.mark.parametrize(
    "value, hint, words",
    [
        (True, int, "an integer"),
        (True, float, "a finite number"),
        (1.5, int, "an integer"),
        (float("nan"), float, "a finite number"),
        (float("inf"), float | None, "a finite number or None"),
        ("12", tuple[str, ...], "a tuple (each a string)"),
        ((1, 2), tuple[float, float, float], "a tuple (3 values, each a finite number)"),
        ((1, "2"), tuple[int, ...], "a tuple (each an integer)"),
        (18.0, Literal[18, 34], "one of 18, 34"),
        (1, Literal[True], "True"),
        ({"a": 1}, dict[str, str], "a dict (a string to a string)"),
        ((), list[Any], "a list"),
        ("f", Callable[..., Any], "a function or a class"),
        (3, type, "a class"),
        (0, None | str, "None or a string"),
        ("x", ImageSet, "a ImageSet"),
    ],
)
def test_convert_refuses_and_describe_says_what_fits(value: Any, hint: Any, words: str) -> None:
    with pytest.raises(TypeError):
        convert(value, hint)
    assert describe(hint) == words
