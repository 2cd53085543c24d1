import pytest

from symbol import Prefix, var
from symbol.layers import (
    add_n,
    cast,
    concat,
    conv,
    max_pool,
    normalizer_factory,
    relu,
    reshape,
    sigmoid,
    upsample_like,
)


def attrs(symbol):
    return dict(symbol.entries[0][0].attrs)


def output_shape(symbol, **given):
    return symbol.infer_shape(**given)[1][0]


@pytest.mark.parametrize("kernel, stride", [(1, 1), (3, 1), (3, 2), (7, 2), (1, 2)])
def test_a_convolution_divides_the_size_by_its_stride(kernel, stride):
    x = conv(var("data"), "c", 8, kernel=kernel, stride=stride)
    assert output_shape(x, data=(1, 3, 16, 32)) == (1, 8, 16 // stride, 32 // stride)
    assert x.list_arguments() == ["data", "c_weight"]


def test_a_convolution_with_its_own_padding_bias_and_initializer():
    with Prefix("S1_"):
        x = conv(var("data"), "c", 8, kernel=3, pad=0, no_bias=False, init='["zero", {}]')
    assert output_shape(x, data=(1, 3, 16, 16)) == (1, 8, 14, 14)
    assert x.list_arguments() == ["data", "S1_c_weight", "S1_c_bias"]
    assert x.attr_dict() == {"S1_c_weight": {"__init__": '["zero", {}]'}}


def test_a_shared_weight():
    x = conv(var("data"), "c_s8", 8, no_bias=False, weight=var("c_weight"), bias=var("c_bias"))
    assert x.list_arguments() == ["data", "c_weight", "c_bias"]


def test_small_layers():
    x = var("x")
    assert attrs(relu(x, "r")) == {"act_type": "relu"}
    assert attrs(sigmoid(x, "s")) == {"act_type": "sigmoid"}
    assert attrs(cast(x, "float16", "h")) == {"dtype": "float16"}
    assert output_shape(max_pool(x, "p", kernel=3, stride=2, pad=1), x=(1, 2, 8, 10)) == (1, 2, 4, 5)
    assert output_shape(reshape(x, (0, -1), "v"), x=(2, 3, 4)) == (2, 12)
    assert output_shape(concat([x, var("y")], 1, "cat"), x=(2, 3), y=(2, 4)) == (2, 7)
    total = add_n(x, var("y"), var("z"), name="sum")
    assert total.list_outputs() == ["sum_output"]
    assert total.list_arguments() == ["x", "y", "z"]


def test_upsampling_is_cut_to_the_finer_level():
    up = upsample_like(var("coarse"), var("fine"), "up", 2)
    assert output_shape(up, coarse=(1, 4, 3, 3), fine=(1, 4, 5, 6)) == (1, 4, 5, 6)
    assert up.list_outputs() == ["up_clip_output"]


COMMON = {"eps": 1e-5, "momentum": 0.9, "fix_gamma": False}


@pytest.mark.parametrize(
    "type, op, more",
    [
        ("localbn", "BatchNorm", {}),
        ("syncbn", "_contrib_SyncBatchNorm", {"ndev": 4, "key": "b"}),
        ("fixbn", "BatchNorm", {"use_global_stats": True}),
    ],
)
def test_normalizers(type, op, more):
    x = normalizer_factory(type, ndev=4, wd_mult=0.5)(var("x"), name="b")
    assert x.entries[0][0].op == op
    assert attrs(x) == COMMON | more
    assert x.list_auxiliary_states() == ["b_moving_mean", "b_moving_var"]
    assert x.attr_dict()["b_gamma"] == x.attr_dict()["b_beta"] == {"__wd_mult__": "0.5"}


def test_normalizers_without_a_hint_or_of_no_known_type():
    assert normalizer_factory("localbn")(var("x"), name="b").attr_dict() == {}
    with pytest.raises(ValueError, match="expected one of localbn, syncbn, fixbn, got 'batch'"):
        normalizer_factory("batch")


@pytest.mark.parametrize("type", ["localbn", "syncbn", "fixbn"])
def test_a_normalizers_eps_and_learning_rate(type):
    x = normalizer_factory(type, eps=1e-3, lr_mult=0)(var("x"), name="b")
    assert attrs(x)["eps"] == 1e-3
    assert x.attr_dict()["b_gamma"] == x.attr_dict()["b_beta"] == {"__lr_mult__": "0"}
