import pytest

import symbol as S
from symbol import Group, Prefix, var


def conv(data, name, **kwargs):
    return S.Convolution(data, name=name, **{"num_filter": 4, "kernel": (3, 3), **kwargs})


def proposal(name="p"):
    return S._contrib_GenProposalRetina(
        var("cls_prob"), var("bbox_pred"), var("im_info"), var("anchors"), num_anchors=3, name=name
    )


def test_arguments_and_auxiliary_states_come_depth_first():
    data = var("data")
    left = S.BatchNorm(conv(data, "c1"), name="b1")
    right = S.BatchNorm(conv(data, "c2", no_bias=True), name="b2")
    out = S.elemwise_add(right, left, name="sum")
    assert out.list_arguments() == [
        *("data", "c2_weight", "b2_gamma", "b2_beta"),
        *("c1_weight", "c1_bias", "b1_gamma", "b1_beta"),
    ]
    assert out.list_auxiliary_states() == ["b2_moving_mean", "b2_moving_var", "b1_moving_mean", "b1_moving_var"]
    assert [node.name for node in out.nodes() if not node.is_variable] == ["c2", "b2", "c1", "b1", "sum"]


def test_a_shared_weight_is_listed_once():
    weight = var("w")
    one, two = conv(var("a"), "c1", weight=weight, no_bias=True), conv(var("b"), "c2", weight=weight, no_bias=True)
    assert Group([one, two]).list_arguments() == ["a", "w", "b"]


def test_inputs_are_what_no_operator_takes_as_a_parameter():
    out = S.elemwise_sub(conv(var("data"), "c", weight=var("w")), var("label"), name="d")
    assert out.list_inputs() == ["data", "label"]


def test_order_of_heads_decides():
    a, b = conv(var("x"), "a", no_bias=True), conv(var("y"), "b", no_bias=True)
    assert Group([b, a]).list_arguments() == ["y", "b_weight", "x", "a_weight"]
    assert Group([b, a]).list_outputs() == ["b_output", "a_output"]


def test_a_node_of_several_outputs():
    both = proposal()
    assert both.list_outputs() == ["p_output", "p_scores"]
    assert len(both) == 2
    assert both[1].list_outputs() == both["p_scores"].list_outputs() == ["p_scores"]
    assert [one.list_outputs() for one in both] == [["p_output"], ["p_scores"]]
    assert both[0].entries[0][0] is both[1].entries[0][0]


def test_batch_norm_hides_its_statistics():
    assert S.BatchNorm(var("x"), name="b").list_outputs() == ["b_output"]
    assert S.BatchNorm(var("x"), name="b", output_mean_var=True).list_outputs() == ["b_output", "b_mean", "b_var"]


def test_internals_by_position_and_by_name():
    x = conv(var("data"), "c", no_bias=True)
    out = Group([S.Activation(x, act_type="relu", name="r"), proposal()[1]])
    internals = out.get_internals()
    assert internals.list_outputs() == [
        *("data", "c_weight", "c_output", "r_output"),
        *("cls_prob", "bbox_pred", "im_info", "anchors", "p_output", "p_scores"),
    ]
    assert internals["c_output"].entries == internals[2].entries == x.entries
    assert internals[-1].list_outputs() == ["p_scores"]
    with pytest.raises(IndexError):
        internals[10]


def test_an_output_name_that_is_missing_or_ambiguous():
    internals = conv(var("data"), "P3_conv").get_internals()
    with pytest.raises(ValueError, match=r"no output named 'P3_conv_outputs'.*P3_conv_output"):
        internals["P3_conv_outputs"]
    with pytest.raises(ValueError, match="2 outputs named 'x'"):
        Group([var("x"), var("x")])["x"]


def test_prefixes_nest_and_end():
    with Prefix("S1_"):
        with pytest.raises(RuntimeError), Prefix("inner_"):
            raise RuntimeError
        data = var("data")
        out = conv(data, "P3")
    after = conv(data, "P4")
    with Prefix("a_"), Prefix("b_"):
        nested = conv(data, "c")
    assert out.list_arguments() == ["data", "S1_P3_weight", "S1_P3_bias"]
    assert (out.name, after.name, nested.name) == ("S1_P3", "P4", "a_b_c")


def test_hints_reach_the_variables_that_a_node_makes():
    weight = var("w", init='["zero", {}]', lr_mult=0.5)
    x = conv(var("data"), "c", weight=weight, wd_mult=2.0)
    out = S.BatchNorm(x, name="b", wd_mult=0.0, lr_mult=0.1)
    batch_norm = {"__wd_mult__": "0.0", "__lr_mult__": "0.1"}
    assert out.attr_dict() == {
        "w": {"__init__": '["zero", {}]', "__lr_mult__": "0.5"},
        "c_bias": {"__wd_mult__": "2.0"},
        "c": {"__wd_mult__": "2.0"},
        **{f"b{ending}": batch_norm for ending in ("", "_gamma", "_beta", "_moving_mean", "_moving_var")},
    }


def test_var_takes_any_attribute():
    assert var("x", shape=(0, 3), wd_mult=1, attr={"__mine__": "y"}).attr_dict() == {
        "x": {"__mine__": "y", "__shape__": "(0, 3)", "__wd_mult__": "1"}
    }


def test_operators_of_python():
    a, b = var("a"), var("b")
    assert [s.entries[0][0].op for s in (a + b, a - b, a * b, a * 3, 3 * a)] == [
        *("elemwise_add", "elemwise_sub", "elemwise_mul", "_mul_scalar", "_mul_scalar"),
    ]
    assert dict((0.5 * a).entries[0][0].attrs) == {"scalar": 0.5}


def test_aliases_are_the_same_operator():
    assert S.reshape(var("x"), shape=(1,), name="r").entries[0][0].op == "Reshape"
    assert S.ElementWiseSum(var("x"), var("y"), name="s").entries[0][0].op == "add_n"
    with pytest.raises(AttributeError, match="no attribute 'Convolutoin'"):
        S.Convolutoin  # noqa: B018


def test_a_variadic_operator_counts_its_inputs():
    out = S.Concat(var("a"), var("b"), var("c"), dim=2, name="cat")
    assert out.entries[0][0].full_attrs() == {"num_args": 3, "dim": 2}


def test_a_name_follows_from_the_first_input():
    assert S.Activation(var("x"), act_type="relu").name == "x_activation"
    with pytest.raises(ValueError, match="without inputs needs a name"):
        S.create("add_n")


def test_nodes_do_not_change():
    node = conv(var("x"), "c").entries[0][0]
    with pytest.raises(AttributeError):
        node.name = "other"
    with pytest.raises(TypeError):
        node.attrs["num_filter"] = 5


def test_a_group_has_no_single_name():
    with pytest.raises(ValueError, match="2 nodes has no single name"):
        _ = Group([var("a"), var("b")]).name
    with pytest.raises(ValueError, match="at least one symbol"):
        Group([])


def test_deep_and_wide_graphs_take_linear_time():
    deep = doubled = var("x")
    for _ in range(3000):
        deep = S.Activation(deep, act_type="relu", name="r")
    for _ in range(64):
        doubled = doubled + doubled  # 2^64 paths
    assert len(deep.nodes()) == 3001
    assert len(doubled.nodes()) == 65
    assert repr(doubled.entries) == "((<Node elemwise_add 'x_elemwise_add" + 63 * "_elemwise_add" + "'>, 0),)"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda x: S.create("Convolutoin", x), "unknown operator 'Convolutoin'; nearest: Convolution"),
        (lambda x: conv(x, "c", kernal=3), "Convolution 'c': no attribute 'kernal'; nearest: kernel"),
        (lambda x: conv(x, "c", num_filter="many"), "'c': attribute 'num_filter': expected an integer, got 'many'"),
        (lambda x: S.Convolution(x, name="c", kernel=1), "'c': attribute 'num_filter' is missing; expected an integer"),
        (lambda x: S.elemwise_add(x, name="s"), "elemwise_add 's': input 'rhs' is missing; it takes lhs, rhs"),
        (lambda x: S.elemwise_add(x, x, x, name="s"), "takes 2 inputs .*, got 3"),
        (lambda x: S.elemwise_add(x, lhs=x, name="s"), "'s': input 'lhs' was given twice"),
        (lambda x: S.elemwise_add(x, other=x, name="s"), "'s': no input 'other'; it takes lhs, rhs"),
        (lambda x: conv(x, "c", no_bias=True, bias=x), "'c': no input 'bias'; it takes data, weight"),
        (lambda x: S.elemwise_add(x, proposal(), name="s"), "input 'rhs' must be a Symbol of one output"),
        (lambda x: S.elemwise_add(x, 3, name="s"), "input 'rhs' must be a Symbol of one output, got 3"),
        (lambda x: S.add_n(x, num_args=0, name="s"), "num_args: expected 1 to 1024, got 0"),
        (lambda x: var(""), "a variable needs a name"),
        (lambda x: var(3), "a variable needs a name.*got 3"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(var("x"))
