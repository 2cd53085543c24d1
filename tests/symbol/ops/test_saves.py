"""Compare the tensors that a row says autograd saves with those that it saves."""

import pytest
import torch

import symbol as S
from symbol import Group, lower, var
from symbol.memory import count_activations
from symbol.ops import OPS

SHAPE = (2, 4, 6, 8)
X, Y = var("x"), var("y")


def conv(name):
    """(2, 4, 6, 8) with a gradient; its input is saved."""
    return S.Convolution(X, num_filter=4, kernel=(1, 1), no_bias=True, name=name)


def saved_bytes(module, **inputs):
    storages = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in module.state_dict(keep_vars=True).values()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.ndim and storage.data_ptr() not in own:
            storages[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = module(**inputs)
    del outputs
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def between(operator):
    """Put an operator between a sigmoid, which saves its output, and a convolution, which saves its input.

    Where the operator is a view, both are one storage.
    """
    x = operator(S.Activation(conv("a"), act_type="sigmoid"))
    return S.Convolution(x, num_filter=2, kernel=(1, 1), no_bias=True, name="next")


CASES = {
    "Convolution": lambda: between(lambda x: x),
    "BatchNorm": lambda: S.BatchNorm(conv("a"), fix_gamma=False, name="b"),
    "_contrib_SyncBatchNorm": lambda: S._contrib_SyncBatchNorm(conv("a"), key="b", fix_gamma=False, name="b"),
    "_batch_norm": lambda: S.Activation(S.BatchNorm(conv("a"), fix_gamma=False, name="b"), act_type="relu"),
    "_batch_norm, residual": lambda: S.Activation(
        S.BatchNorm(conv("a"), fix_gamma=False, name="b") + conv("c"), act_type="relu"
    ),
    "_cast_weight": lambda: S.Convolution(
        S.Cast(X, dtype="float16"), num_filter=2, kernel=(1, 1), no_bias=True, name="next"
    ),
    "BatchNorm, global": lambda: S.BatchNorm(conv("a"), use_global_stats=True, fix_gamma=False, name="b"),
    **{
        f"Activation, {kind}": lambda kind=kind: S.Activation(conv("a"), act_type=kind)
        for kind in ("relu", "sigmoid", "tanh", "softrelu", "softsign")
    },
    "Pooling, max": lambda: S.Pooling(conv("a"), kernel=(2, 2), stride=(2, 2)),
    "Pooling, avg": lambda: S.Pooling(conv("a"), kernel=(2, 2), stride=(2, 2), pool_type="avg"),
    "Pooling, global max": lambda: S.Pooling(conv("a"), global_pool=True),
    "Pooling, global avg": lambda: S.Pooling(conv("a"), global_pool=True, pool_type="avg"),
    "UpSampling": lambda: S.UpSampling(conv("a"), scale=2, sample_type="nearest"),
    "slice_like": lambda: between(lambda x: S.slice_like(x, X)),
    "slice_axis": lambda: between(lambda x: S.slice_axis(x, axis=2, begin=0, end=3)),
    "Reshape": lambda: between(lambda x: S.Reshape(x, shape=(0, 0, 8, 6))),
    "Reshape, transposed": lambda: between(lambda x: S.Reshape(S.transpose(x, axes=(0, 1, 3, 2)), shape=(0, 0, 6, 8))),
    "transpose": lambda: between(lambda x: S.transpose(x, axes=(0, 1, 3, 2))),
    "Concat": lambda: between(lambda x: S.Concat(x, conv("b"), dim=1)),
    "add_n": lambda: S.add_n(conv("a"), conv("b"), conv("c")),
    "elemwise_add": lambda: conv("a") + conv("b"),
    "elemwise_sub": lambda: conv("a") - conv("b"),
    "elemwise_mul": lambda: conv("a") * conv("b"),
    "elemwise_mul, one gradient": lambda: conv("a") * Y,
    "broadcast_mul": lambda: S.broadcast_mul(conv("a"), conv("b")),
    "broadcast_div": lambda: S.broadcast_div(conv("a"), conv("b")),
    "broadcast_div, left gradient": lambda: S.broadcast_div(conv("a"), Y),
    "_mul_scalar": lambda: conv("a") * 2.0,
    "Cast": lambda: between(lambda x: S.Cast(x, dtype="float16")),
    "Cast, same dtype": lambda: between(lambda x: S.Cast(x, dtype="float32")),
    "smooth_l1": lambda: S.smooth_l1(conv("a"), scalar=3.0),
    "MakeLoss": lambda: S.MakeLoss(conv("a")),
}


@pytest.mark.parametrize("case", CASES)
def test_the_saved_bytes_are_those_of_autograd(case):
    graph = Group([CASES[case]()])
    inputs = {name: torch.rand(SHAPE) + 1 for name in graph.list_inputs()}
    module = lower(graph, **dict.fromkeys(inputs, SHAPE)).train()
    counted = count_activations(graph, dict.fromkeys(inputs, SHAPE))
    assert counted.kept_bytes == saved_bytes(module, **inputs)


def test_every_operator_without_its_own_kernel_is_a_case():
    """Losses and detection save what their kernels make; tests/symbol/memory counts them in whole networks."""
    kernels = {row.name for row in OPS.values() if not row.recompute} - {"smooth_l1", "MakeLoss"}
    assert {case.split(",")[0] for case in CASES} == OPS.keys() - kernels
