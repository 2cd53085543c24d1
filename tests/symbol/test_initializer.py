import math

import numpy as np
import pytest

from symbol.initializer import MSRA, XAVIER, ZERO, constant, first_value, normal

SHAPE = (64, 32, 3, 3)  # 18432 numbers: a mean or a standard deviation is known to about 1%


def test_xavier_is_uniform_within_its_bound():
    # fan_in = 32 * 9 = 288, fan_out = 64 * 9 = 576, their mean 432: the bound is sqrt(3 / 432) = 0.08333
    value = first_value("c_weight", SHAPE, XAVIER, seed=0)
    bound = math.sqrt(3 / 432)
    assert value.dtype == np.float32
    assert 0.99 * bound < np.abs(value).max() <= bound * (1 + 1e-6)
    assert value.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(value.mean()) < 0.02 * bound


@pytest.mark.parametrize("factor, fan", [("in", 288), ("out", 576), ("avg", 432)])
def test_a_gaussian_xavier(factor, fan):
    init = f'["xavier", {{"rnd_type": "gaussian", "factor_type": "{factor}", "magnitude": 2}}]'
    assert first_value("w", SHAPE, init, seed=0).std() == pytest.approx(math.sqrt(2 / fan), rel=0.02)


def test_normal_and_constants():
    assert first_value("w", SHAPE, normal(0.01), seed=0).std() == pytest.approx(0.01, rel=0.02)
    assert first_value("w", (2, 3), ZERO, seed=0).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert first_value("w", (2,), '["one", {}]', seed=0).tolist() == [1, 1]
    assert first_value("w", (2,), constant(-4.5), seed=0).tolist() == [-4.5, -4.5]


def test_without_an_initializer_the_ending_of_the_name_decides():
    expected = {"_gamma": 1, "_moving_var": 1, "_beta": 0, "_bias": 0, "_moving_mean": 0}
    for ending, value in expected.items():
        assert (first_value(f"b{ending}", (5,), None, seed=0) == value).all()
    assert (first_value("c_weight", SHAPE, None, seed=3) == first_value("c_weight", SHAPE, MSRA, seed=3)).all()
    with pytest.raises(ValueError, match="parameter 'scale' has no initializer"):
        first_value("scale", (5,), None, seed=0)


def test_a_value_depends_on_seed_and_name_alone():
    value = first_value("a_weight", SHAPE, XAVIER, seed=0)
    assert (value == first_value("a_weight", SHAPE, XAVIER, seed=0)).all()
    assert (value != first_value("a_weight", SHAPE, XAVIER, seed=1)).any()
    assert (value != first_value("b_weight", SHAPE, XAVIER, seed=0)).any()


@pytest.mark.parametrize(
    "init",
    [
        "xavier",
        "5",
        "[",
        "[" * 5000,
        "null",
        '["normal", 5]',
        '["normal"]',
        '["normal", {"width": 1}]',
        '["xavier", {"factor_type": "both"}]',
        '["xavier", {"magnitude": "large"}]',
        '["constant", {"value": "large"}]',
        '["constant", {"value": [1, 2, 3, 4]}]',
    ],
)
def test_a_malformed_initializer(init):
    with pytest.raises(ValueError, match=r"parameter 'w' \(2, 3\): expected an initializer like"):
        first_value("w", (2, 3), init, seed=0)


@pytest.mark.parametrize("init", ['["msraprelu", {}]', "[[], {}]"])
def test_an_unknown_initializer(init):
    with pytest.raises(ValueError, match=r"parameter 'w': unknown initializer .*known: zero, one, constant"):
        first_value("w", (2, 3), init, seed=0)


def test_xavier_needs_a_matrix():
    with pytest.raises(ValueError, match=r"parameter 'w' \(3,\)"):
        first_value("w", (3,), XAVIER, seed=0)
