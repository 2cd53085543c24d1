"""MXNet's .params files: those in golden/ were written by MXNet 1.9.1's nd.save and npx.save."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from core.weights.params_file import (
    Layout,
    ParamsFile,
    SavedArray,
    read_params,
    read_params_file,
    write_params,
    write_params_file,
)
from tests.core.weights.test_hostile_files import all_damaged, fuzz, read_or_refused

GOLDEN = Path(__file__).parents[2] / "golden"
READABLE = ("mxnet191_named", "mxnet191_list", "mxnet191_numpy")


@pytest.mark.parametrize("name", READABLE)
def test_mxnets_files_come_back_byte_for_byte(tmp_path: Path, name: str) -> None:
    source, again = GOLDEN / f"{name}.params", tmp_path / "again.params"
    write_params_file(again, read_params_file(source))
    assert again.read_bytes() == source.read_bytes()


def test_every_type_that_mxnet_writes() -> None:
    """np.arange(6) in two rows, minus 2 for signed types, modulo 2 for bool."""
    content = read_params_file(GOLDEN / "mxnet191_named.params")
    assert content.names is not None
    assert [name[:4] for name in content.names] == ["arg:", "arg:", "aux:", *["arg:"] * 6]
    tensors = read_params(GOLDEN / "mxnet191_named.params")
    for name, tensor in tensors.items():
        assert tensor.dtype is getattr(torch, name)
        offset = 0 if name in ("uint8", "bool") else 2
        expected = torch.arange(6).reshape(2, 3) - offset if name != "bool" else torch.arange(6).reshape(2, 3) % 2
        assert torch.equal(tensor.double(), expected.double()), name
    assert len(tensors) == 9


def test_a_list_without_names() -> None:
    content = read_params_file(GOLDEN / "mxnet191_list.params")
    assert content.names is None
    assert [array.tensor.tolist() for array in content.arrays] == [[1.5, 2.5], [[3]]]
    with pytest.raises(ValueError, match="holds 2 arrays without names"):
        read_params(GOLDEN / "mxnet191_list.params")


def test_numpys_shapes() -> None:
    tensors = read_params(GOLDEN / "mxnet191_numpy.params")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        **{"scalar": (), "empty": (0, 3), "é": (1, 2)}
    }
    assert tensors["scalar"].item() == 7


def test_sparse_arrays_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"array 0 of 1 is stored as row_sparse, expected dense.*tostype\('default'\)"):
        read_params_file(GOLDEN / "mxnet191_sparse.params")


DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.uint8, torch.int32, torch.int8, torch.int64, torch.bool),
    *(torch.int16, torch.uint16, torch.uint32, torch.uint64, torch.bfloat16),
)


@pytest.mark.parametrize("layout", Layout)
def test_every_type_in_every_layout(tmp_path: Path, layout: Layout) -> None:
    """Writing and reading keep values and devices; MXNet itself reads all four layouts in tests/mxnet."""
    arrays = [
        SavedArray(torch.arange(12).reshape(3, 1, 4).to(dtype), (2, index), layout)
        for index, dtype in enumerate(DTYPES)
    ]
    write_params_file(tmp_path / "a.params", ParamsFile(arrays, [str(array.tensor.dtype) for array in arrays]))
    again = read_params_file(tmp_path / "a.params")
    assert again.names == [str(dtype) for dtype in DTYPES]
    for array, expected in zip(again.arrays, arrays, strict=True):
        assert (array.device, array.layout) == (expected.device, layout)
        assert array.tensor.dtype is expected.tensor.dtype
        assert array.tensor.tolist() == expected.tensor.tolist()


def test_what_a_module_saves(tmp_path: Path) -> None:
    """Prefixes are those of MXNet's Module; views and tensors that require gradients are written by value."""
    tensors = {
        "conv0_weight": torch.arange(6.0).reshape(2, 3).t().requires_grad_(),
        "bn0_gamma": torch.ones(8)[::2],
        "bn0_moving_mean": torch.full((1,), 2.0).expand(3),
        "bn0_moving_var": torch.ones(3),
    }
    path = tmp_path / "new" / "a-0003.params"
    write_params(path, tensors)
    assert read_params_file(path).names == [
        *("arg:conv0_weight", "arg:bn0_gamma", "aux:bn0_moving_mean", "aux:bn0_moving_var")
    ]
    again = read_params(path)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert list(again) == list(tensors)


def test_gluons_names_get_no_prefix(tmp_path: Path) -> None:
    names = ["conv1.weight", "bn1.running_mean"]
    write_params(tmp_path / "a.params", {name: torch.ones(1) for name in names})
    assert read_params_file(tmp_path / "a.params").names == names


def test_an_empty_file_of_arrays(tmp_path: Path) -> None:
    write_params(tmp_path / "a.params", {})
    assert (tmp_path / "a.params").read_bytes() == struct.pack("<QQQQ", 0x112, 0, 0, 0)
    assert read_params(tmp_path / "a.params") == {}


@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.tensor(1.0), r"'arg:x' has the shape \(\), expected one side or more"),
        (torch.ones(2, 0), r"'arg:x' has the shape \(2, 0\)"),
        (torch.ones(2, dtype=torch.complex64), "'arg:x' is torch.complex64.*which MXNet lacks"),
        (torch.ones(2, 2).to_sparse(), "torch.sparse_coo.*which MXNet lacks"),
    ],
)
def test_what_mxnet_cannot_load_is_not_written(tmp_path: Path, tensor: Tensor, message: str) -> None:
    path = tmp_path / "a.params"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=message):
        write_params(path, {"good": torch.ones(1), "x": tensor})
    assert path.read_bytes() == b"old"


# ---- malicious files ----


def array(
    *,
    magic: int = Layout.V2,
    storage: int = 0,
    shape: tuple[int, ...] = (2,),
    num_dim: int | None = None,
    dtype: int = 0,
    data: bytes = bytes(8),
) -> bytes:
    head = struct.pack("<Iii", magic, storage, len(shape) if num_dim is None else num_dim)
    return head + struct.pack(f"<{len(shape)}q", *shape) + struct.pack("<iii", 1, 0, dtype) + data


def params(
    *arrays: bytes, count: int | None = None, names: tuple[bytes, ...] = (), num_names: int | None = None
) -> bytes:
    head = struct.pack("<QQQ", 0x112, 0, len(arrays) if count is None else count)
    tail = b"".join(struct.pack("<Q", len(name)) + name for name in names)
    return head + b"".join(arrays) + struct.pack("<Q", len(names) if num_names is None else num_names) + tail


def test_the_file_that_the_cases_below_change_is_valid(tmp_path: Path) -> None:
    (tmp_path / "a.params").write_bytes(params(array(), names=(b"arg:x",)))
    assert read_params(tmp_path / "a.params")["x"].tolist() == [0, 0]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "24 bytes are claimed, 0 are left"),
        (b"PK\3\4" + bytes(60), "it starts with 0x4034b50"),
        (struct.pack("<QQQQ", 0x112, 1, 0, 0), "it starts with 0x112, 0x1"),
        (params(array(), count=2**64 - 1), "claims 18446744073709551615 arrays"),
        (params(array(), count=100_001), "claims 100001 arrays"),
        (params(array(), count=2), "array 1 of 2: it has no shape"),  # the zeros of the number of names
        (params(array(), count=0), "the names: it claims 4187224777 names for 0 arrays"),
        (params(array(storage=2)), "array 0 of 1 is stored as csr"),
        (params(array(storage=3)), "claims storage type 3"),
        (params(array(storage=-1)), "claims storage type -1"),
        (params(array(num_dim=-1)), "claims -1 dimensions"),
        (params(array(num_dim=2**31 - 1)), "claims 2147483647 dimensions"),
        (params(array(num_dim=0)), "it has no shape"),
        (params(array(magic=0)), "it has no shape"),
        (params(array(magic=33)), "claims 33 dimensions"),
        (params(array(magic=Layout.V3 + 1)), "claims 4187224779 dimensions"),
        (params(array(shape=(2**61,))), "claims the shape"),
        (params(array(shape=(2**40,))), "4398046511104 bytes are claimed, 16 are left"),
        (params(array(shape=(2**32, 2**32))), "claims the shape"),
        (params(array(shape=(2**62, 2, 2, 2**62))), "claims the shape"),
        (params(array(shape=(-2,))), r"claims the shape \(-2,\)"),
        (params(array(shape=(-2, -1))), "claims the shape"),
        (params(array(shape=(2, 0))), "claims the shape"),
        (params(array(magic=Layout.V3, shape=(0, 2**62), data=b"")), "claims the shape"),
        (params(array(magic=Layout.V3, shape=(0, -1), data=b"")), "claims the shape"),
        (params(array(shape=(1,) * 33)), "claims 33 dimensions"),
        (params(array(dtype=-1)), "claims type -1, expected 0 to 12"),
        (params(array(dtype=13)), "claims type 13, expected 0 to 12"),
        (params(array(dtype=1)), "the names: 8 bytes are claimed, 0 are left"),
        (params(array(), names=(b"a", b"b")), "claims 2 names for 1 arrays"),
        (params(array(), num_names=2**63), "claims 9223372036854775808 names for 1 arrays"),
        (params(array(), names=(b"\xff\xfe",)), "the names: one is not UTF-8 text"),
        (params(array(), names=(b"a",)) + b"\0", "1 bytes are left after the names"),
        (params(array(), num_names=1) + struct.pack("<Q", 2**64 - 1), "18446744073709551615 bytes are claimed"),
        (params(array(), num_names=1) + struct.pack("<Q", 2) + b"a", "2 bytes are claimed, 1 are left"),
        (params(array(), array(), names=(b"arg:a", b"aux:a")), "holds 'a' twice"),
        (params(array(), array(), names=(b"a" * 5000, b"a" * 5000)), "twice"),
    ],
    ids=itertools.count(),
)
def test_inconsistent_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.params"
    path.write_bytes(content)
    assert not read_or_refused(lambda: read_params(path), str(path))
    with pytest.raises(ValueError, match=message):
        read_params(path)


@pytest.mark.parametrize("name", READABLE)
def test_cut_off_anywhere(tmp_path: Path, name: str) -> None:
    content = (GOLDEN / f"{name}.params").read_bytes()
    path = tmp_path / "a.params"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert not read_or_refused(lambda: read_params_file(path), str(path), "are claimed, ")


@pytest.mark.parametrize("name", [*READABLE, "mxnet191_sparse"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    path, again = tmp_path / "a.params", tmp_path / "again.params"
    outcomes = []
    for content in all_damaged((GOLDEN / f"{name}.params").read_bytes(), 300):
        path.write_bytes(content)
        outcomes.append(read_or_refused(lambda: read_params_file(path), str(path)))
        if outcomes[-1]:  # a file that is read is read completely
            write_params_file(again, read_params_file(path))
            assert again.read_bytes() == content
    assert False in outcomes
    assert (True in outcomes) == (name != "mxnet191_sparse")


@given(data=st.data())
@fuzz
def test_headers_of_any_numbers(tmp_path: Path, data: st.DataObject) -> None:
    edge = st.sampled_from([0, 1, 2, 31, 32, 33, 2**31 - 1, -1, -(2**31)]) | st.integers(-(2**31), 2**31 - 1)
    side = edge | st.sampled_from([2**32, 2**62, 2**63 - 1, -(2**63)])
    given_array: dict[str, Any] = {
        "magic": data.draw(st.sampled_from([*Layout, 1, 2, 40, 2**32 - 1])),
        "storage": data.draw(st.sampled_from([0, 0, 0, 1, 2, 5, -1])),
        "shape": tuple(data.draw(st.lists(side, max_size=4))),
        "num_dim": data.draw(st.none() | edge),
        "dtype": data.draw(st.integers(-1, 13)),
        "data": data.draw(st.binary(max_size=40)),
    }
    path = tmp_path / "a.params"
    path.write_bytes(params(array(**given_array), count=data.draw(st.sampled_from([1, 1, 0, 2, 2**40])), names=(b"x",)))
    read_or_refused(lambda: read_params(path), str(path))


def test_many_small_arrays_take_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.params"
    path.write_bytes(params(*[array()] * 20_000))
    assert read_or_refused(lambda: read_params_file(path))


def test_a_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "a.params", tmp_path):
        with pytest.raises(FileNotFoundError, match="no file"):
            read_params(path)
