import contextlib
import copy
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import symbol as S
from symbol import Group, Symbol, load_json, var
from tests.core.weights.test_hostile_files import TIMES, all_damaged, read_or_refused

MXNETS = (Path(__file__).parents[1] / "golden" / "mxnet191_graph.json").read_text()


def small_graph():
    x = S.Convolution(var("data", shape=(0, 3, 0, 0)), name="c", num_filter=4, kernel=(3, 3), no_bias=True)
    x = S.BatchNorm(x, name="b", eps=1e-5, fix_gamma=False, wd_mult=0.0)
    return Group([S.Activation(x, act_type="relu", name="r"), x])


def test_the_text_is_mxnets():
    bn_hint = {"attrs": {"__wd_mult__": "0.0"}, "inputs": []}
    conv_attrs = {"num_filter": "4", "kernel": "(3, 3)", "no_bias": "True"}
    bn_attrs = {"eps": "1e-05", "fix_gamma": "False", "__wd_mult__": "0.0"}
    assert json.loads(small_graph().tojson()) == {
        "nodes": [
            {"op": "null", "name": "data", "attrs": {"__shape__": "(0, 3, 0, 0)"}, "inputs": []},
            {"op": "null", "name": "c_weight", "inputs": []},
            {"op": "Convolution", "name": "c", "attrs": conv_attrs, "inputs": [[0, 0, 0], [1, 0, 0]]},
            {"op": "null", "name": "b_gamma", **bn_hint},
            {"op": "null", "name": "b_beta", **bn_hint},
            {"op": "null", "name": "b_moving_mean", **bn_hint},
            {"op": "null", "name": "b_moving_var", **bn_hint},
            {"op": "BatchNorm", "name": "b", "attrs": bn_attrs, "inputs": [[i, 0, 0] for i in (2, 3, 4, 5, 6)]},
            {"op": "Activation", "name": "r", "attrs": {"act_type": "relu"}, "inputs": [[7, 0, 0]]},
        ],
        "arg_nodes": [0, 1, 3, 4, 5, 6],
        "node_row_ptr": [0, 1, 2, 3, 4, 5, 6, 7, 10, 11],  # a BatchNorm has three outputs, two of them hidden
        "heads": [[8, 0, 0], [7, 0, 0]],
        "attrs": {"mxnet_version": ["int", 10901]},
    }


def test_an_attribute_without_a_default_in_mxnet_is_always_written():
    graph = S.slice_axis(var("x"), axis=1, begin=-3, name="s")
    assert json.loads(graph.tojson())["nodes"][1]["attrs"] == {"axis": "1", "begin": "-3", "end": "None"}


def same(a: Symbol, b: Symbol) -> bool:
    """Return whether two graphs are equal, node by node."""
    numbers = [{node: i for i, node in enumerate(s.nodes())} for s in (a, b)]
    rows = [
        [(n.op, n.name, dict(n.attrs), dict(n.hints), [(number[child], i) for child, i in n.inputs]) for n in s.nodes()]
        for s, number in zip((a, b), numbers, strict=True)
    ]
    heads = [[(number[n], i) for n, i in s.entries] for s, number in zip((a, b), numbers, strict=True)]
    return rows[0] == rows[1] and heads[0] == heads[1]


def test_round_trip():
    graph = small_graph()
    again = load_json(graph.tojson())
    assert same(again, graph)
    assert again.tojson() == graph.tojson() == small_graph().tojson()
    assert again.attr_dict() == graph.attr_dict()
    assert again.infer_shape(data=(1, 3, 8, 8)) == graph.infer_shape(data=(1, 3, 8, 8))


@st.composite
def graphs(draw):
    """Draw a random graph: later nodes use earlier ones, some more than once."""
    pool = [var(f"x{i}", wd_mult=draw(st.none() | st.floats(0, 9))) for i in range(draw(st.integers(1, 3)))]
    pick = st.deferred(lambda: st.sampled_from(pool))
    for i in range(draw(st.integers(0, 8))):
        name, kind = f"n{i}", draw(st.sampled_from(["conv", "bn", "act", "sum", "cat", "scale", "shape", "proposal"]))
        if kind == "conv":
            kernel = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
            new = S.Convolution(draw(pick), name=name, num_filter=draw(st.integers(1, 2**40)), kernel=kernel)
        elif kind == "bn":
            new = S.BatchNorm(draw(pick), name=name, eps=draw(st.floats(1e-9, 1)), lr_mult=draw(st.none() | st.just(0)))
        elif kind == "act":
            new = S.Activation(draw(pick), name=name, act_type=draw(st.sampled_from(["relu", "tanh"])))
        elif kind == "sum":
            new = draw(pick) + draw(pick)
        elif kind == "cat":
            new = S.Concat(*draw(st.lists(pick, min_size=1, max_size=4)), name=name, dim=draw(st.integers(-3, 3)))
        elif kind == "scale":
            new = draw(pick) * draw(st.floats(allow_nan=False, allow_infinity=False))
        elif kind == "shape":
            codes = st.lists(st.integers(-4, 99), max_size=5).map(tuple)
            new = S.Reshape(draw(pick), name=name, shape=draw(codes), reverse=draw(st.booleans()))
        else:
            new = S._contrib_GenProposalRetina(*(draw(pick) for _ in range(4)), name=name, num_anchors=3)
        pool.extend(new)
    return Group(draw(st.lists(pick, min_size=1, max_size=4)))


@given(graphs())
@settings(max_examples=60, deadline=None)
def test_round_trip_of_any_graph(graph):
    again = load_json(graph.tojson())
    assert same(again, graph)
    assert again.tojson() == graph.tojson()


def mxnet_graph(attr_key):
    """Return a graph as MXNet writes it: every attribute a string, variables with their operator's attributes."""
    attrs = {"kernel": "(3,3)", "num_filter": "8", "no_bias": "True", "pad": "(1,1)"}
    return {
        "nodes": [
            {"op": "null", "name": "data", "inputs": []},
            {"op": "null", "name": "c_weight", attr_key: {**attrs, "__lr_mult__": "0.5"}, "inputs": []},
            {"op": "Convolution", "name": "c", attr_key: attrs, "inputs": [[0, 0, 0], [1, 0, 0]]},
        ],
        "arg_nodes": [0, 1],
        "node_row_ptr": [0, 1, 2, 3],
        "heads": [[2, 0, 0]],
        "attrs": {"mxnet_version": ["int", 10901]},
    }


def test_a_file_that_mxnet_wrote():
    """MXNet 1.9.1's tojson of the graph in tests/mxnet/test_params_live.py, and the shapes that it infers there."""
    graph = load_json(MXNETS)
    assert graph.list_arguments() == ["data", "weight", "norm_gamma", "norm_beta", "sync_gamma", "sync_beta"]
    assert graph.list_auxiliary_states() == [
        *("norm_moving_mean", "norm_moving_var", "sync_moving_mean", "sync_moving_var")
    ]
    arguments, outputs, auxiliary = graph.infer_shape(data=(2, 3, 16, 16))
    assert arguments == [(2, 3, 16, 16), (3, 3, 3, 3), *[(3,)] * 4]
    flat, transposed, half, side = (2, 48, 16), (2, 16, 16, 3), (2, 6, 16, 16), (2, 3, 16, 16)
    assert outputs == [flat, transposed, half, side, side, (3,), (3,)]
    assert auxiliary == [(3,)] * 4
    assert graph.list_outputs()[-2:] == ["norm_mean", "norm_var"]
    assert graph.get_internals()["conv_output"].list_arguments() == ["data", "weight"]
    users = [node.name for node in graph.nodes() if any(child.name == "weight" for child, _ in node.inputs)]
    assert users == ["conv", "shared"]
    assert same(load_json(graph.tojson()), graph)


@pytest.mark.parametrize("key", ["attrs", "attr", "param"])
def test_what_mxnet_writes(key):
    graph = load_json(json.dumps(mxnet_graph(key)))
    conv = graph.entries[0][0]
    assert dict(conv.attrs) == {"kernel": (3, 3), "num_filter": 8, "no_bias": True, "pad": (1, 1)}
    assert graph.infer_shape(data=(2, 3, 5, 7)) == ([(2, 3, 5, 7), (8, 3, 3, 3)], [(2, 8, 5, 7)], [])
    assert graph.attr_dict()["c_weight"]["__lr_mult__"] == "0.5"
    assert same(load_json(graph.tojson()), graph)


def test_old_files_split_attributes_and_hints():
    data = mxnet_graph("param")
    data["nodes"][1]["attr"] = {"lr_mult": "0.1"}
    data["nodes"][2]["attr"] = {"__wd_mult__": "2.0", "ctx_group": "a"}
    data["heads"] = [[2, 0]]
    graph = load_json(json.dumps(data))
    assert graph.entries[0][0].attrs["num_filter"] == 8
    assert graph.attr_dict()["c"] == {"__wd_mult__": "2.0", "__ctx_group__": "a"}
    assert graph.attr_dict()["c_weight"]["__lr_mult__"] == "0.1"


def change(*path, to):
    """Return the small graph's JSON with one value replaced (or, to=None, removed)."""
    data = json.loads(small_graph().tojson())
    at = data
    for key in path[:-1]:
        at = at[key]
    if to is None:
        del at[path[-1]]
    else:
        at[path[-1]] = to
    return json.dumps(data)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not a symbol's JSON"),
        ("[" * 100_000, "not a symbol's JSON"),
        ('{"nodes": ' + "9" * 5000 + "}", "not a symbol's JSON"),
        ("[]", "expected an object with a list 'nodes' and 'heads'"),
        ("{}", "expected an object with a list 'nodes' and 'heads'"),
        (change("heads", to=None), "expected an object with a list 'nodes' and 'heads'"),
        (change("heads", to=[]), "expected an object with a list 'nodes' and 'heads'"),
        (change("heads", to=8), "heads: expected a list"),
        (change("heads", 0, to=[9, 0, 0]), "heads: input node 9 does not come before it"),
        (change("heads", 0, to=[-1, 0, 0]), "heads: input node -1"),
        (change("heads", 0, to=[8, 1, 0]), "heads: node 'r' has no output 1"),
        (change("heads", 0, to=[7, 1, 0]), "heads: node 'b' has no output 1"),  # it is hidden
        (change("heads", 0, to=[True, 0, 0]), "heads: expected .node, output, version"),
        (change("heads", 0, to=[10**400, 0, 0]), "heads: input node 1000"),
        (change("nodes", to={}), "expected an object with a list 'nodes' and 'heads'"),
        (change("nodes", to=[]), "heads: input node 8 does not come before it .there are 0"),
        (change("nodes", 2, to="c"), "node 2: expected an object with the strings 'op' and 'name', got 'c'"),
        (change("nodes", 2, "name", to=None), "node 2: expected an object with the strings 'op' and 'name'"),
        (change("nodes", 2, "op", to=5), "node 2: expected an object with the strings 'op' and 'name'"),
        (change("nodes", 2, "op", to="Convolve"), "node 'c': unknown operator 'Convolve'; nearest: Convolution"),
        (change("nodes", 2, "inputs", to="data"), "node 'c': inputs must be a list"),
        (change("nodes", 2, "inputs", 0, to=[2, 0, 0]), "node 'c': input node 2 does not come before it"),  # itself
        (change("nodes", 2, "inputs", 0, to=[8, 0, 0]), "node 'c': input node 8 does not come before it"),  # a cycle
        (change("nodes", 2, "inputs", 0, to=[0, 1, 0]), "node 'c': node 'data' has no output 1"),
        (change("nodes", 2, "inputs", 0, to=[0]), "node 'c': expected .node, output, version., got .0"),
        (change("nodes", 2, "inputs", 0, to=[0.5, 0, 0]), "node 'c': expected .node, output, version"),
        (change("nodes", 2, "inputs", 1, to=None), "Convolution 'c': takes 2 inputs .data, weight., the file gives 1"),
        (change("nodes", 0, "inputs", to=[[0, 0, 0]]), "input node 0 does not come before it"),
        (change("nodes", 1, "inputs", to=[[0, 0, 0]]), "variable 'c_weight' has inputs"),
        (change("nodes", 2, "attrs", to=["kernel"]), "node 'c': attrs must map strings to strings"),
        (change("nodes", 2, "attrs", "num_filter", to=4), "node 'c': attrs must map strings to strings"),
        (change("nodes", 2, "attrs", "num_filter", to="four"), "'c': attribute 'num_filter': expected an integer"),
        (change("nodes", 2, "attrs", "num_filter", to="1" * 400), "'c': attribute 'num_filter': expected an integer"),
        (change("nodes", 2, "attrs", "num_filter", to=None), "'c': attribute 'num_filter' is missing"),
        (change("nodes", 2, "attrs", "kernel", to="(" * 500), "'c': attribute 'kernel': expected a tuple of integers"),
        (change("nodes", 2, "attrs", "colour", to="red"), "'c': no attribute 'colour'"),
        (change("nodes", 8, "attrs", "act_type", to="gelu"), "'r': attribute 'act_type': expected one of relu"),
        (change("nodes", 8, "op", to="x" * 10**6), "node 8: 'op' and 'name' have 1000000 and 1 characters"),
        (change("nodes", 8, "name", to="x" * 10**6), "node 8: 'op' and 'name' have 10 and 1000000 characters"),
        (change("nodes", 8, "name", to="\ud800"), "node 8: 'op' and 'name' must be printable"),
        (change("nodes", 8, "name", to="\x1b[2J"), "node 8: 'op' and 'name' must be printable, got .* '.x1b.2J'"),
        (change("nodes", 8, "op", to="relu\n"), "node 8: 'op' and 'name' must be printable"),
        (change("nodes", 8, "attrs", "act_type", to="x" * 10**6), "'act_type' is longer than 1000 characters"),
        (change("nodes", 8, "attrs", "x" * 10**6, to="relu"), "'xxx.*' is longer than 1000 characters"),
        (change("nodes", 8, "attrs", "act_type", to="\ud800" * 990), "'r': attribute 'act_type': expected one of relu"),
        (change("nodes", 8, "attrs", to=["x" * 10**6]), "attrs must map strings to strings, got .'xxx"),
        (change("nodes", 8, "inputs", to=[[7, 0, 0]] * 10**5), "takes 1 inputs .data., the file gives 100000"),
        (change("nodes", 8, "inputs", 0, to=[[10**400] * 30] * 10), "expected .node, output, version"),
        (change("heads", to="x" * 10**6), "heads: expected a list"),
        (change("heads", 0, to=[10**4000, 0, 0]), "heads: input node 1000"),
        (change("heads", 0, to=[8, 10**4000, 0]), "heads: node 'r' has no output 1000"),
        (
            change("nodes", to=[{"op": "null", "name": "x"}] * 20_001),
            "the graph has 20001 nodes; expected 20000 at most",
        ),
    ],
    ids=itertools.count(),
)
def test_hostile_texts(text, message):
    assert not read_or_refused(lambda: load_json(text))
    with pytest.raises(ValueError, match=message):
        load_json(text)


def test_counts_in_a_file_are_ignored():
    data = {"nodes": [{"op": "null", "name": "x"}, {"op": "add_n", "name": "s", "attrs": {"num_args": "999999999"}}]}
    with pytest.raises(ValueError, match="num_args: expected 1 to 1024, got 999999999"):
        load_json(json.dumps(data | {"heads": [[1, 0, 0]]}))


@pytest.mark.parametrize("depth", [500, 900, *range(940, 1000, 3)])
def test_values_nested_almost_too_deep_to_be_shown(depth):
    deep = "[" * depth + "]" * depth
    for text in (f'{{"nodes":[{{"op":"null","name":{deep}}}],"heads":[[0,0]]}}', f'{{"nodes":[],"heads":[{deep}]}}'):
        assert not read_or_refused(lambda text=text: load_json(text))


def test_a_long_chain_of_shared_inputs():
    """Three thousand nodes with 2^3000 paths through them."""
    nodes = [{"op": "null", "name": "x"}]
    nodes += [{"op": "elemwise_add", "name": f"n{i}", "inputs": [[i, 0], [i, 0]]} for i in range(3000)]
    text = json.dumps({"nodes": nodes, "heads": [[3000, 0]]})
    assert read_or_refused(lambda: load_json(load_json(text).tojson()).infer_shape(x=(2, 3)))


@pytest.mark.parametrize("key, value", [("arg_nodes", [5, -1, "x"]), ("node_row_ptr", [10**9]), ("attrs", "x")])
def test_redundant_fields_are_ignored(key, value):
    assert same(load_json(change(key, to=value)), small_graph())
    assert same(load_json(change(key, to=None)), small_graph())


def read_all(text):
    graph = load_json(text)
    graph.list_outputs()
    graph.get_internals()
    graph.infer_shape(data=(2, 3, 16, 16))


@pytest.mark.parametrize("original", [MXNETS, small_graph().tojson()], ids=["mxnets", "ours"])
def test_damaged_texts(original):
    outcomes = []
    for content in all_damaged(original.encode(), 60):
        text = content.decode("utf-8", "replace")
        outcomes.append(read_or_refused(lambda text=text: read_all(text)))
    assert {True, False} == set(outcomes)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "x", "null", "add_n", "(1,2)", "9"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["op", "name"]), inner, max_size=2),
    max_leaves=4,
)


def places(value, path=()):
    """Yield the path of every value inside."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


ORIGINAL = json.loads(small_graph().tojson())


@given(st.sampled_from(list(places(ORIGINAL))), anything)
@settings(max_examples=300 * TIMES, deadline=None)
def test_any_change_is_read_or_refused(path, value):
    data = copy.deepcopy(ORIGINAL)
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with contextlib.suppress(ValueError):
        read_all(json.dumps(data))
