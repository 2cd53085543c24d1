import torch

import symbol as S
from symbol import Group, lower, var
from symbol.passes import in_precision


def ops(graph):
    return [node.op for node in graph.nodes() if not node.is_variable]


def conv(data, name):
    """(N, 4, H, W)."""
    return S.Convolution(data, num_filter=4, kernel=(1, 1), no_bias=True, name=name)


def test_in_float32_only_the_casts_of_float16_are_gone():
    x = S.Cast(var("x"), dtype="float16", name="half")
    x = S.Cast(conv(x, "c"), dtype="float32", name="full")
    graph = Group([S.Cast(x, dtype="int32", name="whole"), x])
    plain = in_precision(graph, "float32")
    assert ops(plain) == ["Convolution", "Cast"]
    assert plain.list_outputs() == ["whole_output", "c_output"]
    assert plain.list_arguments() == graph.list_arguments()
    assert ops(graph) == ["Cast", "Convolution", "Cast", "Cast"]
    data = torch.rand(1, 2, 3, 3)
    with_fp16, in_fp32 = (lower(one, x=(1, 2, 3, 3))(x=data)[1] for one in (graph, plain))
    assert with_fp16.dtype == in_fp32.dtype == torch.float32
    torch.testing.assert_close(with_fp16, in_fp32, rtol=2e-3, atol=2e-3)
