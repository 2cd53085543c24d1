"""Reader and writer of MXNet's .params files, without MXNet.

A file is a list of arrays and optionally their names; all numbers are little-endian:

    uint64 0x112, uint64 0                              magic number of a list
    uint64 count, then every array
    uint64 count (0: no names), then every name as uint64 length and UTF-8 text

An array is its layout's number, its storage type, its shape, the device that it was on, the number of its type, and
its elements. Four layouts exist; MXNet 1.9.1 writes V2 and, under its NumPy semantics, V3. All sizes that a file
states are checked against the bytes left in it before memory is allocated.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.run.atomic_file import atomic_file

SUFFIX = ".params"
CPU = (1, 0)  # MXNet's device type and index
_LIST_MAGIC = 0x112
_MOST_ARRAYS = 100_000  # a network has hundreds; an array takes far more memory than bytes in a file
_MOST_DIMS = 32
_STORAGE = {1: "row_sparse", 2: "csr"}
_DTYPES: tuple[torch.dtype, ...] = (
    *(torch.float32, torch.float64, torch.float16, torch.uint8, torch.int32, torch.int8, torch.int64, torch.bool),
    *(torch.int16, torch.uint16, torch.uint32, torch.uint64, torch.bfloat16),
)  # by MXNet's numbers
_AUXILIARY = ("_moving_mean", "_moving_var", "_running_mean", "_running_var")  # only BatchNorm has auxiliary states


class Layout(IntEnum):
    """Layout of an array: the number at its start."""

    OLDEST = 0  # no number of its own, but the number of dimensions; 32-bit sides
    V1 = 0xF993FAC8  # 64-bit sides
    V2 = 0xF993FAC9  # with a storage type
    V3 = 0xF993FACA  # NumPy's shapes: () is one number, a side may be 0


@dataclass(frozen=True, eq=False)
class SavedArray:
    """An array of a file, with its device and layout."""

    tensor: Tensor
    device: tuple[int, int] = CPU
    layout: Layout = Layout.V2


@dataclass(frozen=True)
class ParamsFile:
    """The arrays in the file's order, and their names (None: a list without names)."""

    arrays: Sequence[SavedArray]
    names: Sequence[str] | None


def read_params_file(path: str | Path) -> ParamsFile:
    """Read the content of a file, of which `write_params_file` writes the same bytes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or stores an array sparsely.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: give the path of a {SUFFIX} file")
    with path.open("rb") as handle:
        reader = _Reader(path, handle)
        magic, reserved, count = reader.numbers("QQQ")
        if (magic, reserved) != (_LIST_MAGIC, 0):
            raise reader.refusal(f"it starts with {magic:#x}, {reserved:#x}, expected {_LIST_MAGIC:#x}, 0")
        if count > _MOST_ARRAYS:
            raise reader.refusal(f"it claims {count} arrays, expected {_MOST_ARRAYS} at most")
        arrays = []
        for index in range(count):
            reader.where = f"array {index} of {count}"
            arrays.append(_read_array(reader))
        reader.where = "the names"
        names = _read_names(reader, count)
        if reader.left:
            raise reader.refusal(f"{reader.left} bytes are left after the names")
    return ParamsFile(arrays, names)


def write_params_file(path: str | Path, content: ParamsFile) -> None:
    """Write a file that MXNet's nd.load reads, atomically.

    Raises:
        ValueError: a tensor has a shape that MXNet cannot load in its layout, or a type that MXNet lacks.
        OSError: the file cannot be written.
    """
    assert content.names is None or len(content.names) == len(content.arrays)
    names = content.names or ()
    headers = [_array_header(array, names[i] if names else str(i)) for i, array in enumerate(content.arrays)]
    with atomic_file(path) as handle:
        handle.write(struct.pack("<QQQ", _LIST_MAGIC, 0, len(content.arrays)))
        for header, array in zip(headers, content.arrays, strict=True):
            handle.write(header)
            handle.write(_bytes_of(array.tensor.detach().cpu().contiguous()))
        handle.write(struct.pack("<Q", len(names)))
        for name in names:
            text = name.encode()
            handle.write(struct.pack("<Q", len(text)) + text)


def read_params(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a file of named arrays, without the prefixes `arg:` and `aux:` of their names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, stores an array sparsely, has no names, or one name twice.
    """
    content = read_params_file(path)
    if content.names is None:
        raise ValueError(
            f"{path} holds {len(content.arrays)} arrays without names, expected named ones: save a dictionary of "
            "arrays with MXNet's nd.save"
        )
    tensors: dict[str, Tensor] = {}
    for name, array in zip(content.names, content.arrays, strict=True):
        plain = name[4:] if name.startswith(("arg:", "aux:")) else name
        if plain in tensors:
            raise ValueError(f"{path} holds '{plain:.80}' twice, expected it once: get the file again")
        tensors[plain] = array.tensor
    return tensors


def write_params(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as MXNet's Module does, with prefix `aux:` for moving statistics and `arg:` for the others.

    Names with dots are Gluon's, which has no prefixes. Raises as `write_params_file` does.
    """
    is_gluon = any("." in name for name in tensors)
    names = [name if is_gluon else ("aux:" if name.endswith(_AUXILIARY) else "arg:") + name for name in tensors]
    write_params_file(path, ParamsFile([SavedArray(tensor) for tensor in tensors.values()], names))


class _Reader:
    """Sequential reader of a file that checks each size against the bytes left."""

    def __init__(self, path: Path, handle: BufferedReader) -> None:
        self.path, self.handle, self.where = path, handle, "its head"
        self.left = os.fstat(handle.fileno()).st_size

    def refusal(self, problem: str) -> ValueError:
        return ValueError(
            f"{self.path} is damaged or no {SUFFIX} file of MXNet's ({self.where}: {problem}): get it again"
        )

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{kinds}", self.take(struct.calcsize(f"<{kinds}")))

    def take(self, size: int) -> bytes:
        self.require(size)
        data = self.handle.read(size)
        self._took(len(data), size)
        return data

    def fill(self, tensor: Tensor) -> None:
        """Read the elements of the tensor."""
        view = _bytes_of(tensor)
        self._took(self.handle.readinto(view), view.nbytes)

    def require(self, size: int) -> None:
        """Raise ValueError if fewer bytes are left."""
        if size > self.left:
            raise self.refusal(f"{size} bytes are claimed, {self.left} are left")

    def _took(self, taken: int, size: int) -> None:
        if taken != size:
            raise self.refusal("it was truncated while it was read")
        self.left -= size


def _read_array(reader: _Reader) -> SavedArray:
    (magic,) = reader.numbers("I")
    layout = Layout(magic) if magic in (Layout.V1, Layout.V2, Layout.V3) else Layout.OLDEST
    if layout in (Layout.V2, Layout.V3):
        (storage,) = reader.numbers("i")
        if storage in _STORAGE:
            raise ValueError(
                f"{reader.path}: {reader.where} is stored as {_STORAGE[storage]}, expected dense arrays: convert it "
                "in MXNet with array.tostype('default') and save again"
            )
        if storage != 0:
            raise reader.refusal(f"it claims storage type {storage}, expected 0")
    num_dim = magic if layout is Layout.OLDEST else reader.numbers("i")[0]
    if not 0 <= num_dim <= _MOST_DIMS:
        raise reader.refusal(f"it claims {num_dim} dimensions, expected {_MOST_DIMS} at most")
    if num_dim == 0 and layout is not Layout.V3:
        raise reader.refusal("it has no shape, so MXNet saved an array without values")
    shape = reader.numbers(f"{num_dim}{'I' if layout is Layout.OLDEST else 'q'}")
    *device, type_number = reader.numbers("iii")
    if not 0 <= type_number < len(_DTYPES):
        raise reader.refusal(f"it claims type {type_number}, expected 0 to {len(_DTYPES) - 1}")
    dtype = _DTYPES[type_number]
    least = 0 if layout is Layout.V3 else 1
    # a side of 0 makes the array empty, but torch multiplies the other sides too
    if min(shape, default=1) < least or math.prod(max(side, 1) for side in shape) * dtype.itemsize >= 2**62:
        raise reader.refusal(f"it claims the shape {shape!s:.200}, expected sides of {least} or more")
    reader.require(math.prod(shape) * dtype.itemsize)
    tensor = torch.empty(shape, dtype=dtype)
    reader.fill(tensor)
    return SavedArray(tensor, (device[0], device[1]), layout)


def _read_names(reader: _Reader, num_array: int) -> list[str] | None:
    (count,) = reader.numbers("Q")
    if count == 0:
        return None if num_array else []
    if count != num_array:
        raise reader.refusal(f"it claims {count} names for {num_array} arrays")
    names = []
    for _ in range(count):
        try:
            names.append(reader.take(*reader.numbers("Q")).decode())
        except UnicodeDecodeError:
            raise reader.refusal("one is not UTF-8 text") from None
    return names


def _array_header(array: SavedArray, name: str) -> bytes:
    shape, layout = tuple(array.tensor.shape), array.layout
    if array.tensor.dtype not in _DTYPES or array.tensor.layout is not torch.strided:
        raise ValueError(
            f"'{name}' is {array.tensor.dtype}, {array.tensor.layout}, which MXNet lacks: convert it to float32"
        )
    if layout is not Layout.V3 and 0 in (len(shape), *shape):
        raise ValueError(
            f"'{name}' has the shape {shape}, expected one side or more and none of 0, as MXNet loads no other: "
            "leave it out or reshape it"
        )
    tail = struct.pack("<iii", *array.device, _DTYPES.index(array.tensor.dtype))
    if layout is Layout.OLDEST:
        return struct.pack(f"<I{len(shape)}I", len(shape), *shape) + tail
    storage = () if layout is Layout.V1 else (0,)
    return struct.pack(f"<I{len(storage)}ii{len(shape)}q", layout, *storage, len(shape), *shape) + tail


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
