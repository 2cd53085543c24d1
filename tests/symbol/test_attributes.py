import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from symbol.attributes import Attr, format_value, nearest


@pytest.mark.parametrize(
    "attr, value, expected",
    [
        (Attr("int"), "3", 3),
        (Attr("int"), 3.0, 3),
        (Attr("int"), np.int64(3), 3),
        (Attr("int", None), "None", None),
        (Attr("int", None), None, None),
        (Attr("float"), "1e-05", 1e-5),
        (Attr("float"), " 2 ", 2.0),
        (Attr("bool"), "True", True),
        (Attr("bool"), "false", False),
        (Attr("bool"), "1", True),
        (Attr("bool"), 0, False),
        (Attr("ints"), "(3, 3)", (3, 3)),
        (Attr("ints"), "(3,3)", (3, 3)),
        (Attr("ints"), "[3]", (3,)),
        (Attr("ints"), "()", ()),
        (Attr("ints"), 3, (3,)),
        (Attr("floats"), "(0.5, 1)", (0.5, 1.0)),
        (Attr("enum", "max", ("max", "avg")), "avg", "avg"),
        (Attr("enum", choices=("float32", "int8")), np.float32, "float32"),
        (Attr("string"), 7, "7"),
    ],
)
def test_reading(attr, value, expected):
    parsed = attr.parse(value)
    assert parsed == expected
    assert type(parsed) is type(expected)


@pytest.mark.parametrize(
    "attr, value, expected",
    [
        (Attr("int"), "3.5", "an integer"),
        (Attr("int"), "True", "an integer"),
        (Attr("int"), "None", "an integer"),
        (Attr("int", None), "x", "an integer or None"),
        (Attr("int"), "1" * 30, "an integer"),
        (Attr("int"), "9" * 5000, "an integer"),
        (Attr("int"), float("inf"), "an integer"),
        (Attr("float"), "__import__('os')", "a number"),
        (Attr("float"), "(" * 900, "a number"),
        (Attr("float"), "-" * 999 + "1", "a number"),
        (Attr("float"), (1, 2), "a number"),
        (Attr("bool"), "2", "True or False"),
        (Attr("bool"), "yes", "True or False"),
        (Attr("ints"), "(3, 3", "a tuple of integers"),
        (Attr("ints"), "(3, 3.5)", "a tuple of integers"),
        (Attr("ints"), "(3, (3,))", "a tuple of integers"),
        (Attr("floats"), "a", "a tuple of numbers"),
        (Attr("enum", choices=("max", "avg")), "min", "one of max, avg"),
        (Attr("string"), None, "a string"),
    ],
)
def test_refusing(attr, value, expected):
    with pytest.raises(ValueError, match=f"^expected {expected}, got"):
        attr.parse(value)


typed = st.one_of(
    st.tuples(st.just(Attr("int", None)), st.none() | st.integers(-(2**62), 2**62)),
    st.tuples(st.just(Attr("float")), st.floats(allow_nan=False, allow_infinity=False)),
    st.tuples(st.just(Attr("bool")), st.booleans()),
    st.tuples(st.just(Attr("ints")), st.lists(st.integers(-9, 999), max_size=5).map(tuple)),
    st.tuples(st.just(Attr("floats")), st.lists(st.floats(-1e9, 1e9), max_size=5).map(tuple)),
)


@given(typed)
@settings(deadline=None)
def test_what_is_written_is_read_again(case):
    attr, value = case
    again = attr.parse(format_value(value))
    assert again == value
    assert type(again) is type(value)


def test_nearest_names():
    assert nearest("kernal", ["stride", "kernel"]) == "kernel"
    assert nearest("xyz", ["a", "b"], count=1) == "a"
    assert nearest("xyz", []) == ""
