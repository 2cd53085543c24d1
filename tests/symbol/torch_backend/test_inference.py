"""Test graphs as they run: packed convolutions against plain ones, in float32 and bfloat16."""

import pytest
import torch

import symbol as S
from config.load import load_config
from symbol import Group, lower, var
from symbol.passes import in_precision
from symbol.torch_backend import lower_for_inference, parameters
from symbol.torch_backend.inference import PackedConvolution
from symbol.torch_backend.nn import convolution
from tests.small_config import DEMO, SMALL_NETWORK

CPU = torch.device("cpu")
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-7}  # of the largest value


def assert_close(ours, theirs, tolerance):
    assert ours.shape == theirs.shape
    difference = (ours.double() - theirs.double()).abs().max()
    assert difference <= tolerance * theirs.double().abs().max()


def example(dtype, **attrs):
    """Return a graph of convolutions followed by nothing, a ReLU, a sum, and both."""
    attrs = {"num_filter": 16, "kernel": (3, 3), "pad": (1, 1), **attrs}
    x = S.Cast(var("x"), dtype="float16")
    plain = S.Convolution(x, name="plain", **attrs)
    active = S.Activation(S.Convolution(x, name="active", **attrs), act_type="relu")
    added = S.Convolution(x, name="added", **attrs) + plain
    both = S.Activation(S.Convolution(x, name="both", **attrs) + active, act_type="relu")
    return in_precision(Group([plain, active, added, both]), dtype)


def packed(module):
    return [part for part in module.modules() if isinstance(part, PackedConvolution)]


def has_kernels(dtype):
    """Return whether oneDNN has convolutions in the dtype for this processor."""
    return dtype == "float32" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def make(graph, seed=0):
    torch.manual_seed(seed)
    module = lower(graph, x=(1, 8, 9, 7)).eval()
    weights = {name: torch.randn_like(tensor) for name, tensor in module.state_dict().items()}
    module.load_state_dict(weights)
    return module, weights


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("attrs", [{}, {"no_bias": True}, {"stride": (2, 1)}, {"kernel": (1, 1), "pad": ()}])
def test_packed_convolutions(dtype, attrs):
    graph = example(dtype, **attrs)
    reference, weights = make(example("float32", **attrs))
    module = lower_for_inference(graph, weights, CPU)
    assert len(packed(module)) == (4 if has_kernels(dtype) else 0)
    for shape in [(1, 8, 9, 7), (3, 8, 9, 7), (1, 8, 1, 1), (1, 8, 9, 7)]:
        x = torch.randn(shape)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            with torch.inference_mode():
                outputs = module(x=x.contiguous(memory_format=memory_format))
                expected = reference(x=x)
            for ours, theirs in zip(outputs, expected, strict=True):
                assert str(ours.dtype) == f"torch.{dtype}"
                assert_close(ours, theirs, TOLERANCE[dtype])


def test_no_weight_is_initialized_that_is_loaded_next(monkeypatch):
    """Random weights of a ResNet-50 would take two thirds of the time."""
    graph = load_config(DEMO, is_train=False, overrides=SMALL_NETWORK).ModelParam.test_symbol
    weights = lower(graph, data=(1, 3, 128, 128)).state_dict()
    initialized, first_value = [], parameters.first_value

    def record(name, *rest):
        initialized.append(name)
        return first_value(name, *rest)

    monkeypatch.setattr(parameters, "first_value", record)
    lower_for_inference(graph, weights, CPU)
    assert initialized == []
    lower(graph)
    assert len(initialized) > 50


def test_weights_are_packed_for_the_last_shapes_alone():
    _, weights = make(example("float32"))
    module = lower_for_inference(example("float32"), weights, CPU)
    for side in (5, 6, 7, 6):
        module(x=torch.randn(1, 8, side, side))
    assert [list(part._packed) for part in packed(module)] == [[(1, 8, 6, 6), (1, 8, 7, 7)]] * 4


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("reason", ["groups", "no oneDNN"])
def test_other_convolutions_are_torchs(dtype, reason, monkeypatch):
    attrs = {"num_group": 2} if reason == "groups" else {}
    if reason == "no oneDNN":
        monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    reference, weights = make(example("float32", **attrs))
    module = lower_for_inference(example(dtype, **attrs), weights, CPU)
    assert not packed(module)
    assert {str(p.dtype) for p in module.parameters()} == {f"torch.{dtype}"}
    x = torch.randn(2, 8, 9, 7)
    for ours, theirs in zip(module(x=x), reference(x=x), strict=True):
        assert_close(ours, theirs.detach(), TOLERANCE[dtype])


def test_a_weight_of_two_dtypes_is_kept_in_both():
    x, weight = var("x"), var("w_weight")
    half = S.Cast(x, dtype="float16")
    maps = [S.Convolution(data, weight=weight, num_filter=4, kernel=(1, 1), no_bias=True) for data in (x, half)]
    reference, weights = make(in_precision(Group(maps), "float32"))
    module = lower_for_inference(in_precision(Group(maps), "bfloat16"), weights, CPU)
    x = torch.randn(1, 8, 9, 7)
    assert [out.dtype for out in module(x=x)] == [torch.float32, torch.bfloat16]
    for ours, theirs in zip(module(x=x), reference(x=x), strict=True):
        assert_close(ours, theirs.detach(), TOLERANCE["bfloat16"])


def test_the_weights_are_the_modules_own():
    _, weights = make(example("float32"))
    module = lower_for_inference(example("float32"), weights, CPU)
    x = torch.randn(1, 8, 9, 7)
    before = [out.clone() for out in module(x=x)]
    for tensor in weights.values():
        tensor.zero_()
    torch.testing.assert_close(module(x=x), before, rtol=0, atol=0)
    after = lower_for_inference(example("float32"), weights, CPU)(x=x)
    assert all(not out.any() for out in after)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_whole_network(dtype):
    """Every convolution is packed in the dtype that it computes in; logits and deltas are those of `lower`."""
    config = load_config(str(DEMO), is_train=False, overrides=[*SMALL_NETWORK, "General.fp16=True"])
    internals = config.ModelParam.test_symbol.get_internals()
    names = [f"{subnet}_pred_s{stride}_output" for subnet in ("cls", "bbox") for stride in (8, 16, 32, 64, 128)]
    graph = Group([internals[name] for name in names])
    module = lower(in_precision(graph, "float32"), data=(1, 3, 128, 128)).eval()
    generator = torch.Generator().manual_seed(0)
    weights = dict(module.state_dict())
    for name, tensor in weights.items():
        if "bn" in name:
            tensor.uniform_(0.8, 1.2, generator=generator)
    detector = lower_for_inference(in_precision(graph, dtype), weights, CPU)
    dtypes = [str(part.weight.dtype) for part in packed(detector)]
    if has_kernels(dtype):
        assert not [node for node in detector.graph.nodes if node.target is convolution]
        assert dtypes.count(f"torch.{dtype}") == len(dtypes) - 10 * (dtype != "float32")
    else:
        assert dtypes == ["torch.float32"] * 10
    data = torch.randn(2, 3, 128, 128, generator=generator)
    with torch.inference_mode():
        outputs, expected = detector(data=data), module(data=data)
    for ours, theirs in zip(outputs, expected, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, theirs, {"float32": 1e-5, "bfloat16": 0.05}[dtype])
