"""Malicious and damaged files and texts: each is read correctly or refused, in bounded time and memory.

NECKLACE_FUZZ=100 tries a hundred times as many damaged files (`make fuzz`).
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config.check import check
from config.image_set import ImageSet, class_names
from config.overrides import apply_overrides
from config.schema import Config
from config.section import leaves
from core.data.coco_columns import read_columns
from core.weights.checkpoint import (
    FORMAT_VERSION,
    METADATA_KEY,
    Progress,
    epoch_stem,
    latest,
    load_weights,
    read_tensors,
    save_checkpoint,
)
from core.weights.pretrain import read_backbone

TIMES = int(os.environ.get("NECKLACE_FUZZ", "1"))
MOST_SECONDS = 5.0
MOST_BYTES = 2 << 30  # of address space beyond that of the process
SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
fuzz = settings(max_examples=60 * TIMES, deadline=None, derandomize=TIMES == 1, suppress_health_check=SLOW)


@contextmanager
def bounded() -> Iterator[None]:
    """Fail a test that runs too long; memory beyond the limit is a MemoryError, which no test accepts."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, hard))
    start = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - start < MOST_SECONDS


def read_or_refused(read: Callable[[], object], *mentioned: str) -> bool:
    """Return True if it was read, False after an error for users that names the file; other errors propagate."""
    try:
        with bounded():
            read()
    except (ValueError, FileNotFoundError) as error:
        refusal: Exception = error
    else:
        return True
    message = str(refusal)
    assert type(refusal) in (ValueError, FileNotFoundError) or type(refusal).__module__.startswith("core.")
    assert all(word in message for word in mentioned), message
    assert len(message) < 2000
    return False


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Flip bits; remove, repeat, insert or cut off bytes; often near the start, where the headers are."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = int(len(data) * rng.random() ** rng.choice((1, 3)))
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at:]
            case 2:
                del data[at : at + rng.randrange(1, 9)]
            case 3:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 4:
                data[at : at + 8] = struct.pack("<Q", rng.choice((0, 2**31, 2**40, 2**63, 2**64 - 1)))
            case 5:
                data[at:at] = data[at : at + rng.randrange(1, 300)]
    return bytes(data)


def all_damaged(content: bytes, number: int) -> Iterator[bytes]:
    rng = random.Random(7)
    return (damaged(content, rng) for _ in range(number * TIMES))


# ---- checkpoints ----


def write_pair(folder: Path) -> Path:
    progress = Progress(epoch=1, step=10, seed=7, experiment="demo", class_names=("cat", "dog"))
    weights = {"conv0_weight": torch.ones(4, 3, 7, 7), "bn0_gamma": torch.ones(4, dtype=torch.float16)}
    return save_checkpoint(folder, epoch_stem(1), weights, {"conv0_weight": torch.ones(4)}, progress).weights


def test_damaged_checkpoints(tmp_path: Path) -> None:
    path = write_pair(tmp_path)
    outcomes = []
    for content in all_damaged(path.read_bytes(), 300):
        path.write_bytes(content)
        outcomes.append(read_or_refused(lambda: load_weights(path), str(path)))
    assert {True, False} == set(outcomes)


def safetensors_bytes(header: object, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(**changed: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changed}


@pytest.mark.parametrize(
    "content",
    [
        safetensors_bytes(tensor(), length=2**64 - 1),
        safetensors_bytes(tensor(), length=2**40),
        safetensors_bytes(tensor(), length=0),
        safetensors_bytes(tensor(shape=[2**62])),
        safetensors_bytes(tensor(shape=[2**32, 2**32])),
        safetensors_bytes(tensor(shape=[2**40], data_offsets=[0, 2**42])),
        safetensors_bytes(tensor(data_offsets=[16, 0])),
        safetensors_bytes(tensor(data_offsets=[-16, 0])),
        safetensors_bytes(tensor(data_offsets=[2**64 - 16, 2**64])),
        safetensors_bytes(tensor() | {"b": tensor()["a"]}),  # both on the same bytes
        safetensors_bytes(tensor(dtype="OBJECT")),
        safetensors_bytes(tensor(shape=[-4])),
        safetensors_bytes({f"t{i}": tensor()["a"] for i in range(10_000)}),
        safetensors_bytes(b'{"a":' + b"[" * 1_000_000),
        safetensors_bytes(b"\xff" * 100),
    ],
)
def test_inconsistent_headers(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint-0001.safetensors"
    path.write_bytes(content)
    assert not read_or_refused(lambda: read_tensors(path), str(path), "damaged")


@pytest.mark.parametrize("shape", [[0, 2**61], [0, 2**63], [0] * 200, [2**40, 0, 2**40], [1] * 100_000 + [0]])
def test_shapes_that_need_no_bytes(tmp_path: Path, shape: list[int]) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes(tensor(shape=shape, data_offsets=[0, 0]), b""))
    read_or_refused(lambda: read_tensors(path), str(path), "damaged")


GOOD: dict[str, Any] = json.loads(
    Progress(epoch=1, step=10, seed=0, experiment="demo", class_names=("cat",)).to_metadata()[METADATA_KEY]
)


@pytest.mark.parametrize(
    "metadata",
    [
        "",
        "{",
        "null",
        "[]",
        "7",
        '"text"',
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"format_version": ' + "9" * 5000 + "}",
        "{}",
        json.dumps({"format_version": FORMAT_VERSION}),
        *(json.dumps(GOOD | {name: value}) for name in GOOD for value in (None, -1, 1.5, True, {}, [1], 10**30)),
        *(json.dumps({other: GOOD[other] for other in GOOD if other != name}) for name in GOOD),
        json.dumps(GOOD | {"class_names": "cat"}),
        json.dumps(GOOD | {"step": "10"}),
        json.dumps(GOOD | {"__class__": "os.system", "x" * 10**6: 1}),
    ],
    ids=lambda text: text[:40],
)
def test_metadata_of_wrong_types(tmp_path: Path, metadata: str) -> None:
    path = tmp_path / "checkpoint-0001.safetensors"
    safetensors.torch.save_file({"a": torch.ones(4)}, path, {"necklace": metadata})
    assert not read_or_refused(lambda: load_weights(path), str(path))
    assert not read_or_refused(lambda: latest(tmp_path), str(path))


def test_the_metadata_that_the_cases_above_change_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-0001.safetensors"
    safetensors.torch.save_file({"a": torch.ones(4)}, path, {"necklace": json.dumps(GOOD)})
    assert load_weights(path)[1].class_names == ("cat",)


# ---- COCO json ----

COCO: dict[str, Any] = {
    "images": [{"id": i, "file_name": f"sub/{i}.jpg", "height": 20, "width": 30} for i in (1, 2)],
    "annotations": [
        {"id": i, "image_id": 1, "category_id": 3, "bbox": [1, 2.5, 3, 4], "area": 12, "iscrowd": 0} for i in (1, 2, 3)
    ],
    "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
}


def read_both(path: Path) -> None:
    read_columns(str(path))
    class_names(ImageSet("toy", str(path), str(path.parent)))


def test_damaged_annotations(tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    outcomes = []
    for content in all_damaged(json.dumps(COCO).encode(), 300):
        path.write_bytes(content)
        outcomes.append(read_or_refused(lambda: read_both(path), str(path)))
    assert {True, False} == set(outcomes)


def replaced(key: str, i: int, **changed: Any) -> str:
    items = list(COCO[key])
    items[i] = items[i] | changed
    return json.dumps(COCO | {key: items})


HUGE = (10**30, -(10**30), 2**63, 1e308, -1)


@pytest.mark.parametrize(
    "name",
    [
        "../../../etc/passwd",
        "/etc/passwd",
        "sub/../../secret.jpg",
        "..",
        "sub/..",
        "..\\..\\secret.jpg",
        "C:\\secret.jpg",
        "a.jpg\0.png",
        "\ud800.jpg",
        "/" * 5000,
        "../" * 100_000,
    ],
    ids=lambda name: repr(name)[:20],
)
def test_file_names_outside_of_the_image_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / "instances.json"
    path.write_text(replaced("images", 1, file_name=name))
    assert not read_or_refused(
        lambda: read_columns(str(path)), str(path), "images[1]", "no path below the image folder"
    )


@pytest.mark.parametrize("name", ["a..b.jpg", "...jpg", "sub/sub/é.jpg", "~/a.jpg", "a b.jpg", "..."])
def test_file_names_that_only_look_dangerous(tmp_path: Path, name: str) -> None:
    path = tmp_path / "instances.json"
    path.write_text(replaced("images", 1, file_name=name))
    assert read_or_refused(lambda: read_columns(str(path)))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "[" * 1_000_000,
        '{"images":' * 100_000,
        json.dumps(COCO).replace('"categories": [', '"categories": ' + "[" * 100_000),
        json.dumps(COCO | {"extra": "x"}).replace('"x"', "9" * 5000),
        json.dumps(COCO).replace('"categories": [{"id": 3', '"categories": [{"id": ' + "3" * 5000),
        *(replaced("images", 0, height=value) for value in HUGE),
        *(replaced("images", 0, width=value) for value in HUGE),
        *(replaced("images", 0, id=value) for value in HUGE[:4]),
        replaced("images", 0, id=True),
        *(replaced("annotations", 0, image_id=value) for value in HUGE),
        *(replaced("annotations", 0, category_id=value) for value in HUGE),
        *(replaced("annotations", 0, iscrowd=value) for value in (2, None, [], {}, "1")),
        *(replaced("annotations", 0, bbox=value) for value in ("1234", {"a": 1, "b": 2, "c": 3, "d": 4}, [[]] * 4, 7)),
        replaced("annotations", 0, bbox=[10**400, 1, 1, 1]),
        replaced("annotations", 0, bbox=[0] * 100_000),
        replaced("annotations", 0, area=10**400),
        replaced("annotations", 0, area="x" * 100_000),
        *(replaced("categories", 0, id=value) for value in HUGE[:4]),
        replaced("categories", 0, name="\ud800"),
        replaced("categories", 0, name=["x" * 100_000]),
        replaced("images", 0, file_name=["x" * 100_000]),
        replaced("images", 0, file_name=""),
    ],
    ids=lambda text: text[:20] + str(len(text)),
)
def test_malicious_annotations(tmp_path: Path, content: str) -> None:
    path = tmp_path / "instances.json"
    path.write_text(content)
    assert not read_or_refused(lambda: read_both(path), str(path))


@pytest.mark.parametrize("sides", [{"height": 2**31 - 1}, {"height": 2**31 - 1, "width": 2**31 - 1}])
def test_claimed_image_sizes_take_no_memory(tmp_path: Path, sides: dict[str, int]) -> None:
    path = tmp_path / "instances.json"
    path.write_text(replaced("images", 0, **sides))
    assert read_or_refused(lambda: read_both(path))


JSON_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["id", "bbox", "name"]), inner),
    max_leaves=5,
)


@given(data=st.data())
@fuzz
def test_annotations_with_values_of_any_type(tmp_path: Path, data: st.DataObject) -> None:
    content = json.loads(json.dumps(COCO))
    key = data.draw(st.sampled_from(list(content)))
    item = data.draw(st.sampled_from(content[key]))
    item[data.draw(st.sampled_from(list(item)))] = data.draw(JSON_VALUE)
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    read_or_refused(lambda: read_both(path), str(path))


# ---- --set ----


def set_and_check(override: str) -> None:
    config = Config()
    for required in ("detector", "backbone", "neck", "head"):
        setattr(config.ModelParam, required, object)
    config.get_transform = lambda config, is_train: []  # type: ignore[assignment,return-value]
    config.get_metric = lambda config: []
    apply_overrides(config, [override])
    check(config)


KEYS = [key for key, _, entry in leaves(Config()) if "derived" not in entry.metadata]
VALUE = st.one_of(
    st.text(max_size=20),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["1e999", "nan", "-1", "0", "True", "None", "()", "''", "1,,2", "1e400,1", "{}", "1j", "b'x'"]),
    st.sampled_from(["ImageSet(1, 2, 3)", "ImageSet('a', 'b', 'c')", "ImageSet()", "ImageSet(*1)", "ImageSet(**{})"]),
    st.sampled_from(["__import__('os').abort()", "exit()", "(lambda: exit())()", "[].__class__", "10**10**10"]),
    st.lists(st.integers() | st.floats() | st.text(max_size=3), max_size=4).map(repr),
)


@given(key=st.sampled_from(KEYS), value=VALUE)
@fuzz
def test_overrides_of_any_value(key: str, value: str) -> None:
    read_or_refused(lambda: set_and_check(f"{key}={value}"))


@given(override=st.text(max_size=40) | st.text(alphabet="GeneralParam.=_()[]'\",0 ", max_size=40))
@fuzz
def test_overrides_of_any_text(override: str) -> None:
    assert not read_or_refused(lambda: set_and_check(override), override[:40])


@pytest.mark.parametrize(
    "value",
    [
        "9" * 5000,
        "9" * 400,
        "1" + "0" * 400,
        "(" * 10_000,
        "-" * 100_000 + "1",
        "[" * 1000 + "]" * 1000,
        "1+" * 50_000,
        "x." * 50_000,
        "{" * 5000,
        "\0",
        "'" * 3,
        "ImageSet(" * 5000,
        "1,(" * 200 + ")" * 200,
        "'" + "\\x41" * 20_000,
    ],
    ids=lambda text: text[:10] + str(len(text)),
)
@pytest.mark.parametrize("key", ["General.seed", "NeckParam.num_stage", "OptimizeParam.optimizer.wd", "NormParam.mean"])
def test_malicious_overrides(key: str, value: str) -> None:
    assert not read_or_refused(lambda: set_and_check(f"{key}={value}"), key)


# ---- pretrained backbones ----

BACKBONE = {"conv1.weight": torch.ones(4, 3, 3, 3), "bn1.weight": torch.ones(4), "fc.bias": torch.ones(2)}


def pickled(content: object, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_backbones(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "a.pth"
    outcomes = []
    for content in all_damaged(pickled(BACKBONE, legacy), 100):
        path.write_bytes(content)
        outcomes.append(read_or_refused(lambda: read_backbone(path), str(path)))
    assert {True, False} == set(outcomes)


class Touch:
    """An object whose unpickling without restrictions creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True, None])
def test_code_in_a_pickle_is_never_run(tmp_path: Path, legacy: bool | None) -> None:
    path, proof = tmp_path / "a.pth", tmp_path / "it ran"
    content = BACKBONE | {"bn1.bias": Touch(proof)}
    path.write_bytes(pickle.dumps(content) if legacy is None else pickled(content, legacy))
    assert not read_or_refused(lambda: read_backbone(path), str(path), "code in a pickled file is never run")
    assert not proof.exists()


@pytest.mark.parametrize(
    "content",
    [
        BACKBONE | {"bn1.bias": torch.ones((), dtype=torch.float16).expand(10**6, 10**6)},  # of two bytes
        BACKBONE | {"bn1.bias": torch.ones(()).expand(2**40)},
        BACKBONE | {"bn1.bias": torch.empty(2**40, device="meta")},
        BACKBONE
        | {"bn1.bias": torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (2**40,), check_invariants=True)},
        BACKBONE | {"bn1.bias": torch.ones(4, dtype=torch.complex64)},
        BACKBONE | {3: torch.ones(4)},
        {"state_dict": BACKBONE},
        list(BACKBONE.values()),
        torch.ones(4),
        BACKBONE | {f"layer{'1' * 5000}.0.conv1.weight": torch.ones(4)},
        {},
        None,
    ],
    ids=lambda content: str(type(content).__name__),
)
def test_backbones_that_are_no_plain_state_dict(tmp_path: Path, content: object) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(pickled(content))
    assert not read_or_refused(lambda: read_backbone(path), str(path))


def test_a_packed_archive_that_unpacks_to_gigabytes(tmp_path: Path) -> None:
    """Two megabytes that hold a tensor of two gigabytes: refused by the archive's directory, before unpacking."""
    path = tmp_path / "a.pth"
    with (
        zipfile.ZipFile(io.BytesIO(pickled(BACKBONE))) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb,
    ):
        for entry in source.infolist():
            bomb.writestr(entry.filename, source.read(entry))
        with bomb.open(f"{source.infolist()[0].filename.split('/')[0]}/data/9", "w", force_zip64=True) as record:
            for _ in range(1100):
                record.write(bytes(1 << 20))
    assert path.stat().st_size < 10 << 20
    assert not read_or_refused(lambda: read_backbone(path), str(path), "claim")
