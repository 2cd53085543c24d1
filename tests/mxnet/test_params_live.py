"""Weights and graphs against MXNet 1.9.1 itself; skipped in environments without it."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import symbol as S
from core.weights.params_file import Layout, ParamsFile, SavedArray, read_params, read_params_file, write_params_file
from models.backbone.resnet import resnet_v1b
from models.NASFPN.builder import NASFPNNeck
from symbol.layers import normalizer_factory

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MXNet uses names that NumPy has deprecated
    mx: Any = pytest.importorskip("mxnet", reason="MXNet 1.9.1 is not installed here")

GOLDEN = Path(__file__).parents[1] / "golden"
TYPES = ("float32", "float64", "float16", "uint8", "int32", "int8", "int64", "bool")


def random_arrays() -> dict[str, Any]:
    """Return an array of every type that MXNet's front end has, with one to five dimensions."""
    rng = np.random.default_rng(0)
    return {
        f"{('arg', 'aux')[i % 2]}:{name}": mx.nd.array(
            rng.integers(0, 2 if name == "bool" else 100, size=rng.integers(1, 5, size=1 + i % 5)), dtype=name
        )
        for i, name in enumerate(TYPES)
    }


def test_what_mxnet_writes_is_read_and_written_back_byte_for_byte(tmp_path: Path) -> None:
    arrays = random_arrays()
    source, again = tmp_path / "a.params", tmp_path / "b.params"
    for saved in (arrays, list(arrays.values())):
        mx.nd.save(str(source), saved)
        content = read_params_file(source)
        assert content.names == (list(arrays) if saved is arrays else None)
        for array, expected in zip(content.arrays, arrays.values(), strict=True):
            assert array.tensor.numpy().dtype == expected.dtype
            np.testing.assert_array_equal(array.tensor.numpy(), expected.asnumpy())
        write_params_file(again, content)
        assert again.read_bytes() == source.read_bytes()


def test_bfloat16(tmp_path: Path) -> None:
    values = [-2.0, 0.5, 3.0]
    source = tmp_path / "a.params"
    mx.nd.save(str(source), {"a": mx.nd.array(values).astype(np.dtype([("bfloat16", np.uint16)]))})
    tensor = read_params(source)["a"]
    assert tensor.dtype is torch.bfloat16
    assert tensor.tolist() == values


@pytest.mark.parametrize("layout", [Layout.OLDEST, Layout.V1, Layout.V2])
def test_mxnet_loads_what_we_write_in_every_layout(tmp_path: Path, layout: Layout) -> None:
    tensors = {f"arg:{name}": torch.arange(6).reshape(1, 3, 2).to(getattr(torch, name)) for name in TYPES}
    path = tmp_path / "a.params"
    for names in (list(tensors), None):
        arrays = [SavedArray(tensor, layout=layout) for tensor in tensors.values()]
        write_params_file(path, ParamsFile(arrays, names))
        loaded = mx.nd.load(str(path))
        if names:
            assert list(loaded) == names
        for array, tensor in zip(loaded.values() if names else loaded, tensors.values(), strict=True):
            assert array.dtype == tensor.numpy().dtype
            np.testing.assert_array_equal(array.asnumpy(), tensor.numpy())


def test_numpys_shapes(tmp_path: Path) -> None:
    """MXNet writes and loads the third layout only under its NumPy semantics."""
    source, again = tmp_path / "a.params", tmp_path / "b.params"
    with mx.util.np_shape(True), mx.util.np_array(True):
        mx.npx.save(str(source), {"scalar": mx.np.array(7.0), "empty": mx.np.ones((0, 3))})
        content = read_params_file(source)
        assert [array.layout for array in content.arrays] == [Layout.V3] * 2
        write_params_file(again, content)
        assert again.read_bytes() == source.read_bytes()
        loaded = mx.npx.load(str(again))
        assert (loaded["scalar"].item(), loaded["empty"].shape) == (7.0, (0, 3))


@pytest.mark.parametrize("kind, name", [("row_sparse", "row_sparse"), ("csr", "csr")])
def test_sparse_arrays_are_refused_by_name(tmp_path: Path, kind: str, name: str) -> None:
    mx.nd.save(str(tmp_path / "a.params"), {"a": mx.nd.ones((3, 2)).tostype(kind)})
    with pytest.raises(ValueError, match=f"is stored as {name}"):
        read_params_file(tmp_path / "a.params")


@pytest.mark.parametrize("name", ["mxnet191_named", "mxnet191_list"])
def test_the_stored_files_are_mxnets(name: str, tmp_path: Path) -> None:
    """MXNet reads them and writes the same bytes."""
    loaded = mx.nd.load(str(GOLDEN / f"{name}.params"))
    mx.nd.save(str(tmp_path / "a.params"), loaded)
    assert (tmp_path / "a.params").read_bytes() == (GOLDEN / f"{name}.params").read_bytes()


def test_a_module_checkpoint(tmp_path: Path) -> None:
    """Module.save_checkpoint writes two files: the graph is loaded, and the weights have its names."""
    x = mx.sym.Convolution(mx.sym.var("data"), num_filter=2, kernel=(3, 3), no_bias=True, name="conv0")
    x = mx.sym.BatchNorm(x, fix_gamma=False, name="bn0")
    module = mx.mod.Module(x, label_names=None)
    module.bind([("data", (1, 3, 8, 8))], for_training=False)
    module.init_params(mx.init.Xavier())
    module.save_checkpoint(str(tmp_path / "net"), 7)
    graph = S.load_json((tmp_path / "net-symbol.json").read_text())
    lowered = S.lower(graph, data=(1, 3, 8, 8))
    lowered.load_state_dict(read_params(tmp_path / "net-0007.params"))
    pixels = np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype(np.float32)
    module.forward(mx.io.DataBatch([mx.nd.array(pixels)]), is_train=False)
    with torch.inference_mode():
        (ours,) = lowered.eval()(data=torch.from_numpy(pixels))
    np.testing.assert_allclose(ours.numpy(), module.get_outputs()[0].asnumpy(), rtol=1e-4, atol=1e-5)


def every_node(sym: Any) -> Any:
    """Return MXNet's symbol with the vocabulary's nodes, a weight that two layers share, and further outputs."""
    data = sym.var("data", shape=(2, 3, 16, 16), dtype="float32", lr_mult=0.5, init=mx.init.Zero())
    weight = sym.var("weight")
    a = sym.Convolution(data, weight, num_filter=3, kernel=(3, 3), pad=(1, 1), no_bias=True, name="conv")
    a = sym.Convolution(a, weight, num_filter=3, kernel=(3, 3), pad=(1, 1), no_bias=True, name="shared")
    norm = sym.BatchNorm(a, name="norm", fix_gamma=False, eps=1e-5, output_mean_var=True)
    b = sym.Activation(norm[0], act_type="relu", name="relu", attr={"ctx_group": "dev1"})
    up = sym.UpSampling(sym.Pooling(b, kernel=(2, 2), stride=(2, 2), pool_type="max"), scale=2, sample_type="nearest")
    clip = sym.slice_like(up, b, axes=(2, 3))
    c = 2 * (clip * b) + (clip - b) + sym.add_n(clip, b)
    gate = sym.Activation(sym.Pooling(c, global_pool=True, pool_type="max", kernel=(1, 1)), act_type="sigmoid")
    d = sym.broadcast_div(sym.broadcast_mul(c, gate), norm[1].reshape((1, -1, 1, 1)))
    loss = sym.MakeLoss(sym.slice_axis(sym.smooth_l1(d, scalar=3.0), axis=1, begin=0, end=None), grad_scale=2.0)
    half = sym.cast(sym.Concat(d, c, dim=1), dtype="float16")
    sync = sym.contrib.SyncBatchNorm(c, name="sync", ndev=2, key="k")
    flat = sym.Reshape(d, shape=(0, -3, -2), name="flat")
    return sym.Group([flat, sym.transpose(d, axes=(0, 2, 3, 1)), half, loss, sync, norm[1], norm[2]])


def test_a_graph_of_mxnets_and_back() -> None:
    theirs = every_node(mx.sym)
    ours = S.load_json(theirs.tojson())
    again = mx.sym.load_json(ours.tojson())
    for one in (ours, again):
        assert one.list_arguments() == theirs.list_arguments()
        assert one.list_auxiliary_states() == theirs.list_auxiliary_states()
        assert one.list_outputs() == theirs.list_outputs()
        assert one.get_internals().list_outputs() == theirs.get_internals().list_outputs()
        shapes = [[tuple(shape) for shape in kind] for kind in one.infer_shape(data=(2, 3, 16, 16))]
        assert shapes == [[tuple(shape) for shape in kind] for kind in theirs.infer_shape(data=(2, 3, 16, 16))]
    hints = {"__lr_mult__": "0.5", "__init__": '["zero", {}]', "__shape__": "(2, 3, 16, 16)", "__dtype__": "0"}
    assert ours.attr_dict()["data"] == hints
    assert again.attr_dict()["data"] == theirs.attr_dict()["data"]  # MXNet returns lr_mult under two names


def test_our_backbone_and_pyramid_load_in_mxnet() -> None:
    """The graph ends before the head, whose custom operators have tests of their own."""
    normalizer = normalizer_factory("localbn")
    neck: Any = SimpleNamespace(num_stage=1, dim_reduced=8, S0_kernel=1, normalizer=normalizer)
    ours = S.Group(NASFPNNeck(neck).get_rpn_feature(resnet_v1b(18, normalizer, False, 8)))
    theirs = mx.sym.load_json(ours.tojson())
    assert theirs.list_arguments() == ours.list_arguments()
    assert theirs.list_auxiliary_states() == ours.list_auxiliary_states()
    assert theirs.list_outputs() == ours.list_outputs()
    shapes = [[tuple(shape) for shape in kind] for kind in theirs.infer_shape(data=(1, 3, 256, 128))]
    assert shapes == [[tuple(shape) for shape in kind] for kind in ours.infer_shape(data=(1, 3, 256, 128))]
