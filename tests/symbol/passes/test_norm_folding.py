"""Folding batch normalization: the graph, its weights, and its values in float64."""

import numpy as np
import pytest
import torch

import symbol as S
from symbol import Group, Symbol, lower, var
from symbol.passes import fold_batch_norm
from symbol.passes.inference import fuse_inference

SHAPE = (2, 4, 6, 5)


def ops(graph):
    return [node.op for node in graph.nodes() if not node.is_variable]


def conv(data, name="c", **attrs):
    return S.Convolution(data, **{"num_filter": 4, "kernel": (3, 3), "pad": (1, 1), "name": name, **attrs})


def norm(data, name="n", op="BatchNorm", **attrs):
    return S.create(op, data, name=name, **({"key": name} if op == "_contrib_SyncBatchNorm" else {}), **attrs)


def weights_of(graph, seed=0):
    """Return random float64 parameters and statistics by name."""
    random = np.random.RandomState(seed)
    module = lower(graph, x=SHAPE)
    return {
        name: 0.2 + random.rand(*tensor.shape) if name.endswith("_var") else random.standard_normal(tensor.shape)
        for name, tensor in module.state_dict().items()
    }


def outputs(graph, weights, seed=1):
    module = lower(graph, x=SHAPE).double().eval()
    module.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    x = torch.from_numpy(np.random.RandomState(seed).standard_normal(SHAPE))
    with torch.no_grad():
        return module(x=x)


def assert_same_values(graph, weights, expect):
    copies = {name: array.copy() for name, array in weights.items()}
    text = graph.tojson()
    folded, new = fold_batch_norm(graph, weights)
    assert ops(folded) == expect
    torch.testing.assert_close(outputs(folded, new), outputs(graph, weights), rtol=1e-12, atol=1e-12)
    assert graph.tojson() == text
    assert weights.keys() == copies.keys()
    assert all(np.array_equal(weights[name], array) for name, array in copies.items())
    names = {*folded.list_arguments(), *folded.list_auxiliary_states()} - set(folded.list_inputs())
    assert names == new.keys()
    return folded, new


@pytest.mark.parametrize("op", ["BatchNorm", "_contrib_SyncBatchNorm"])
@pytest.mark.parametrize("no_bias", [False, True])
@pytest.mark.parametrize("fix_gamma", [False, True])
@pytest.mark.parametrize("attrs", [{}, {"use_global_stats": True}, {"eps": 0.3}])
def test_a_normalization_becomes_the_convolutions_weight_and_bias(op, no_bias, fix_gamma, attrs):
    graph = norm(conv(var("x"), no_bias=no_bias), op=op, fix_gamma=fix_gamma, **attrs)
    folded, _ = assert_same_values(graph, weights_of(graph), ["Convolution"])
    assert folded.list_arguments() == ["x", "n_weight", "n_bias"]
    assert folded.list_outputs() == graph.list_outputs()


def test_a_grouped_convolution():
    graph = norm(conv(var("x"), num_group=2, num_filter=6), fix_gamma=False)
    assert_same_values(graph, weights_of(graph), ["Convolution"])


def test_a_shared_weight_is_folded_for_each_normalization():
    weight, bias = var("w_weight"), var("w_bias")
    first = norm(conv(var("x"), "c1", weight=weight, bias=bias), "n1", fix_gamma=False)
    second = norm(conv(first, "c2", weight=weight, bias=bias), "n2", fix_gamma=False)
    third = conv(second, "c3", weight=weight, bias=bias)  # keeps the weight as it is
    weights = weights_of(third)
    folded, new = assert_same_values(third, weights, ["Convolution"] * 3)
    assert folded.list_arguments() == ["x", "n1_weight", "n1_bias", "n2_weight", "n2_bias", "w_weight", "w_bias"]
    assert new["w_weight"] is weights["w_weight"]


@pytest.mark.parametrize(
    "graph, expect",
    [
        (norm(var("x")), ["BatchNorm"]),
        (norm(S.Activation(conv(var("x")), act_type="relu")), ["Convolution", "Activation", "BatchNorm"]),
        (norm(norm(conv(var("x")), "n1"), "n2"), ["Convolution", "BatchNorm"]),
        (Group([norm(c := conv(var("x"))), c]), ["Convolution", "BatchNorm"]),
        (norm(c := conv(var("x"))) + c, ["Convolution", "BatchNorm", "elemwise_add"]),
        (Group([norm(c := conv(var("x")), "n1"), norm(c, "n2")]), ["Convolution", "BatchNorm", "BatchNorm"]),
        (norm(S.Cast(c := conv(var("x")), dtype="float64")) + c, ["Convolution", "Cast", "BatchNorm", "elemwise_add"]),
    ],
    ids=["input", "relu", "second", "output", "sum", "two", "cast"],
)
def test_a_normalization_of_anything_else_stays(graph, expect):
    assert_same_values(graph, weights_of(graph), expect)


def test_casts_stay_behind_the_convolution():
    half = S.Cast(conv(var("x")), dtype="float64", name="to64")
    graph = norm(S.Cast(half, dtype="float64", name="again"), fix_gamma=False)
    folded, _ = assert_same_values(graph, weights_of(graph), ["Convolution", "Cast", "Cast"])
    assert folded.list_outputs() == graph.list_outputs()


def test_a_cast_to_integers_stays_before_the_normalization():
    graph = norm(S.Cast(conv(var("x")), dtype="int32", name="whole"))
    weights = dict.fromkeys(["c_weight", "c_bias"], np.ones(1))
    weights |= dict.fromkeys(["n_gamma", "n_beta", "n_moving_mean", "n_moving_var"], np.ones(1))
    assert ops(fold_batch_norm(graph, weights)[0]) == ["Convolution", "Cast", "BatchNorm"]


def test_a_taken_name():
    x, other = var("x"), var("n_weight")
    graph = norm(conv(x, weight=other), fix_gamma=False) + conv(x, "d", weight=other)
    folded, _ = assert_same_values(graph, weights_of(graph), ["Convolution", "Convolution", "elemwise_add"])
    assert "folded_n_weight" in folded.list_arguments()


def test_weights_are_folded_in_float64_and_rounded_once():
    graph = norm(conv(var("x"), no_bias=True), fix_gamma=False, eps=1e-5)
    weights = {name: array.astype(np.float32) for name, array in weights_of(graph).items()}
    _, new = fold_batch_norm(graph, weights)
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    scale = wide["n_gamma"] / np.sqrt(wide["n_moving_var"] + 1e-5)
    expected = (wide["c_weight"] * scale[:, None, None, None]).astype(np.float32)
    assert new["n_weight"].dtype == np.float32
    np.testing.assert_array_equal(new["n_weight"], expected)
    np.testing.assert_array_equal(new["n_bias"], (wide["n_beta"] - wide["n_moving_mean"] * scale).astype(np.float32))


def random_graph(seed) -> Symbol:
    """Return a graph of random layers on maps (2, 4, 6, 5), with shared weights and values used several times."""
    random = np.random.RandomState(seed)
    values, shared = [var("x")], var("shared_weight")
    for i in range(12):
        data = values[-1] if random.rand() < 0.7 else values[random.randint(len(values))]
        kind = random.choice(["conv", "conv", "norm", "norm", "relu", "relu", "add", "cast"])
        if kind == "conv":
            own = {"weight": shared} if random.rand() < 0.4 else {"num_group": int(random.choice([1, 2]))}
            values.append(conv(data, f"c{i}", no_bias=bool(random.rand() < 0.5), **own))
        elif kind == "norm":
            op = str(random.choice(["BatchNorm", "_contrib_SyncBatchNorm"]))
            flags = {key: bool(random.rand() < 0.5) for key in ("fix_gamma", "use_global_stats")}
            values.append(norm(data, f"n{i}", op, eps=float(random.choice([1e-5, 0.1])), **flags))
        elif kind == "relu":
            values.append(S.Activation(data, act_type="relu", name=f"r{i}"))
        elif kind == "add":
            values.append(S.add_n(data, values[random.randint(len(values))], name=f"a{i}"))
        else:
            values.append(S.Cast(data, dtype="float64", name=f"d{i}"))
    heads = [values[-1], *(value for value in values[1:-1] if random.rand() < 0.1)]
    return Group(heads)


def test_random_graphs_keep_their_values_folded_and_fused():
    counts = {"folded": 0, "stayed": 0, "_convolution_relu": 0, "_convolution_add": 0, "_add_relu": 0}
    for seed in range(200):
        graph = random_graph(seed)
        weights = weights_of(graph, seed)
        expected = outputs(graph, weights)
        folded, new = fold_batch_norm(graph, weights)
        fused = fuse_inference(folded)
        for rewritten in (folded, fused):
            for ours, theirs in zip(outputs(rewritten, new), expected, strict=True):
                scale = theirs.abs().max().item()
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * scale, msg=f"seed {seed}")
        norms = [sum("BatchNorm" in op for op in ops(g)) for g in (graph, folded)]
        counts["folded"] += norms[0] - norms[1]
        counts["stayed"] += norms[1]
        for op in ops(fused):
            if op in counts:
                counts[op] += 1
    assert min(counts.values()) >= 10, counts  # every rewrite was tried
