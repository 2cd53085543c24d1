from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config.image_set import ImageSet
from core.data import coco_index
from core.data.coco_index import open_index

WriteCoco = Callable[..., ImageSet]
ONE = {"a.png": (20, 30)}  # height, width


def test_columns_follow_the_json(write_coco: WriteCoco) -> None:
    sides = {"a.png": (20, 30), "b.png": (8, 5), "sub/\u00e9.png": (6, 6)}
    boxes = [(2, 3, [1, 1, 2, 2]), (0, 7, [1, 2, 3, 4]), (2, 7, [0, 0, 6, 6]), (0, 3, [10, 10, 5, 6])]
    index = open_index(write_coco(sides, boxes))
    assert index.num_image == 3
    assert index.class_names == ("dog", "cat")
    assert index.category_ids == (3, 7)
    assert index.has_annotation
    assert index.image_id.tolist() == [100, 101, 102]
    assert index.height.tolist() == [20, 8, 6]
    assert index.width.tolist() == [30, 5, 6]
    assert [index.file_name(i) for i in range(3)] == ["a.png", "b.png", "sub/\u00e9.png"] == index.file_names()
    assert Path(index.image_path(2)).is_file()
    assert index.has_box.tolist() == [True, False, True]
    # x2 = x + w - 1; class 1 is category 3, class 2 is category 7; in the order of the json
    assert index.gt_bbox(0).tolist() == [[1, 2, 3, 5, 2], [10, 10, 14, 15, 1]]
    assert index.gt_bbox(1).shape == (0, 5)
    assert index.gt_bbox(2).tolist() == [[1, 1, 2, 2, 1], [0, 0, 5, 5, 2]]
    assert index.gt_bbox(0).dtype == np.float32


def test_images_may_stand_in_any_order_of_ids(write_coco: WriteCoco) -> None:
    images = [{"id": i, "file_name": "a.png", "height": 20, "width": 30} for i in (9, 2, 5)]
    boxes = [(-98, 3, [1, 1, 2, 2]), (-91, 7, [3, 3, 2, 2])]  # image ids 2 and 9
    index = open_index(write_coco(ONE, boxes, images=images))
    assert [index.gt_bbox(i).tolist() for i in range(3)] == [[[3, 3, 4, 4, 2]], [[1, 1, 2, 2, 1]], []]


@pytest.mark.parametrize(
    "bbox, kept",
    [
        ([4, 5, 1, 1], [4, 5, 4, 5]),  # one pixel
        ([4, 5, 0.4, 0.6], [4, 5, 4, 5]),  # less than one
        ([29, 19, 1, 1], [29, 19, 29, 19]),  # the last pixel
        ([25, 15, 10, 10], [25, 15, 29, 19]),  # beyond the far corner: clipped to W - 1, H - 1
        ([-3, -4, 10, 10], [0, 0, 9, 9]),  # x1 is clipped first, then x2 = x1 + w - 1
        ([1.5, 2.5, 3.25, 4], [1.5, 2.5, 3.75, 5.5]),
        ([30, 5, 4, 4], None),  # right of the image
        ([5, 20, 4, 4], None),  # below it
        ([-4, 5, 4, 4], None),  # left of it
        ([5, -9, 4, 4], None),  # above it
        ([5, 5, 0, 4], None),  # no area
        ([5, 5, -3, 4], None),
    ],
)
def test_box_rule(write_coco: WriteCoco, bbox: list[float], kept: list[float] | None) -> None:
    box = open_index(write_coco(ONE, [(0, 3, bbox)])).gt_bbox(0)
    assert box.tolist() == ([] if kept is None else [[*kept, 1]])


@pytest.mark.parametrize(
    "more, kept", [({"iscrowd": 1}, 0), ({"area": 0}, 0), ({"area": -1}, 0), ({"area": 0.5}, 1), ({}, 1)]
)
def test_crowds_and_empty_areas_are_left_out(write_coco: WriteCoco, more: dict[str, Any], kept: int) -> None:
    index = open_index(write_coco(ONE, [(0, 3, [4, 5, 6, 7], more)]))
    assert len(index.gt_bbox(0)) == kept
    assert index.has_box.tolist() == [bool(kept)]


def test_what_is_left_out_is_counted_once(write_coco: WriteCoco) -> None:
    boxes = [
        *((0, 3, [4, 5, 6, 7], more) for more in ({}, {"iscrowd": 1}, {"iscrowd": 1, "area": 0}, {"area": 0})),
        *((0, 3, bbox) for bbox in ([5, 5, 0, 4], [30, 5, 4, 4])),
    ]
    image_set = write_coco(ONE, boxes)
    for _ in range(2):  # built, and read again
        index = open_index(image_set)
        assert (len(index.box), index.num_crowd, index.num_unfit) == (1, 2, 3)


def test_area_and_iscrowd_may_be_absent(write_coco: WriteCoco) -> None:
    annotations = [{"id": i, "image_id": 100, "category_id": 3, "bbox": [1, 1, w, 2]} for i, w in enumerate((2, 0))]
    assert len(open_index(write_coco(ONE, annotations=annotations)).gt_bbox(0)) == 1


def test_image_info_has_no_annotations(write_coco: WriteCoco) -> None:
    index = open_index(write_coco(ONE, annotations=None))
    assert not index.has_annotation
    assert index.gt_bbox(0).shape == (0, 5)


def test_no_image_at_all(write_coco: WriteCoco) -> None:
    assert open_index(write_coco({})).num_image == 0


BOX = {"id": 1, "image_id": 100, "category_id": 3, "bbox": [1, 1, 2, 2]}
IMAGE = {"id": 100, "file_name": "a.png", "height": 20, "width": 30}


@pytest.mark.parametrize(
    "replaced, message",
    [
        ({"images": [IMAGE, IMAGE]}, "id 100 in 'images' more than once"),
        ({"annotations": [BOX, BOX]}, "id 1 in 'annotations' more than once"),
        ({"categories": None}, "'categories' is missing"),
        ({"categories": []}, "'categories' is empty"),
        ({"categories": [{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]}, "category id 3 appears twice"),
        ({"images": None}, "'images' is missing"),
        ({"images": [{"id": 1, "file_name": "a.png"}]}, r"images\[0\] has no 'height', 'width'"),
        ({"images": [IMAGE | {"height": 0}]}, r"images\[0\]: expected an integer id"),
        ({"images": [IMAGE | {"width": "30"}]}, r"images\[0\]: expected an integer id"),
        ({"images": ["a.png"]}, r"images\[0\] has no 'id'"),
        ({"annotations": {}}, "'annotations' is no list"),
        (
            {"annotations": [BOX, {"id": 2, "image_id": 100}]},
            r"annotations\[1\] lacks \['bbox', 'category_id'\]",
        ),
        ({"annotations": [BOX | {"bbox": [1, 2, 3]}]}, "bbox of four numbers"),
        ({"annotations": [BOX | {"bbox": [1, 2, 3, "4"]}]}, "bbox of four numbers"),
        ({"annotations": [BOX | {"bbox": None}]}, "bbox of four numbers"),
        ({"annotations": [BOX | {"category_id": "dog"}]}, "expected integer ids"),
        ({"annotations": [BOX | {"bbox": [1, float("nan"), 3, 4]}]}, "annotation id 1: bbox or area is NaN"),
        ({"annotations": [BOX | {"bbox": [1, 1, float("inf"), 4]}]}, "annotation id 1: bbox or area is NaN"),
        (
            {"annotations": [BOX | {"image_id": 5}]},
            "annotation id 1 names image_id 5, which 'images' does not",
        ),
        ({"annotations": [BOX | {"image_id": 500}]}, "names image_id 500"),
        ({"annotations": [BOX | {"category_id": 4}]}, "names category_id 4, which 'categories' does not"),
        ({"info": BOX}, "1 objects have the keys of an annotation, but 'annotations' holds 0"),
    ],
)
def test_errors_name_file_and_entry(write_coco: WriteCoco, replaced: dict[str, Any], message: str) -> None:
    image_set = write_coco(ONE, **replaced)
    with pytest.raises(ValueError, match=message) as caught:
        open_index(image_set)
    assert image_set.annotation in str(caught.value)


def test_a_truncated_json_names_the_file(write_coco: WriteCoco) -> None:
    image_set = write_coco(ONE, [(0, 3, [1, 1, 2, 2])])
    path = Path(image_set.annotation)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"instances\.json: not valid JSON .*may be truncated"):
        open_index(image_set)


def test_missing_images_are_counted_and_named(write_coco: WriteCoco) -> None:
    image_set = write_coco({f"{i}.png": (2, 2) for i in range(9)})
    open_index(image_set)
    for i in range(1, 8):
        (Path(image_set.image_dir) / f"{i}.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"7 of 9 images .*: 1\.png, 2\.png, .*5\.png, \.\.\.; .*ImageSet"):
        open_index(image_set)
    with pytest.raises(FileNotFoundError, match=r"7 of 9 images .*holds them with --data-root"):
        open_index(replace(image_set, by_name=True))


def settle(folder: Path, seconds: int = 60) -> None:
    """Set a folder's modification time to the past."""
    then = time.time_ns() - seconds * 10**9
    os.utime(folder, ns=(then, then))


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the folders that are listed."""
    found: list[str] = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: (found.append(str(path)), listdir(path))[1])
    return found


def test_folders_that_have_not_changed_are_listed_once(write_coco: WriteCoco, listings: list[str]) -> None:
    image_set = write_coco({"a.png": (2, 2), "sub/b.png": (2, 2)})
    folders = [Path(image_set.image_dir), Path(image_set.image_dir, "sub")]
    for folder in folders:
        settle(folder)
    open_index(image_set)
    assert listings == [str(folder) for folder in folders]
    open_index(image_set)
    assert len(listings) == 2


@pytest.mark.parametrize("victim", ["a.png", "sub/b.png"])
def test_an_image_that_vanishes_after_a_good_check_is_missed(write_coco: WriteCoco, victim: str) -> None:
    image_set = write_coco({"a.png": (2, 2), "sub/b.png": (2, 2)})
    folder = Path(image_set.image_dir)
    for place in (folder, folder / "sub"):
        settle(place)
    open_index(image_set)
    (folder / victim).rename(folder / "elsewhere")
    for _ in range(2):  # a failed check is not stored
        with pytest.raises(FileNotFoundError, match=f"1 of 2 images .*: {victim};"):
            open_index(image_set)
    (folder / "elsewhere").rename(folder / victim)
    open_index(image_set)


def test_a_whole_folder_that_vanishes_is_missed(write_coco: WriteCoco) -> None:
    image_set = write_coco({"sub/b.png": (2, 2)})
    folder = Path(image_set.image_dir)
    settle(folder / "sub")
    settle(folder)
    open_index(image_set)
    (folder / "sub").rename(folder.parent / "elsewhere")
    with pytest.raises(FileNotFoundError, match="1 of 1 images"):
        open_index(image_set)


def test_a_folder_modified_just_now_is_listed_again(write_coco: WriteCoco, listings: list[str]) -> None:
    image_set = write_coco(ONE)
    for _ in range(2):  # a file may still be removed within the resolution of the time stamps
        open_index(image_set)
    assert len(listings) == 2


def test_image_sets_that_share_a_json_have_folders_of_their_own(write_coco: WriteCoco, tmp_path: Path) -> None:
    image_set = write_coco(ONE)
    settle(Path(image_set.image_dir))
    open_index(image_set)
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match="1 of 1 images"):
        open_index(ImageSet("other", image_set.annotation, str(tmp_path / "other")))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"3", b'{"/none": 5}', b"\xff"])
def test_a_damaged_record_of_the_folders_is_ignored(
    write_coco: WriteCoco, cache: Path, listings: list[str], content: bytes
) -> None:
    image_set = write_coco(ONE)
    settle(Path(image_set.image_dir))
    open_index(image_set)
    (note,) = cache.glob("*/images-*.json")
    note.write_bytes(content)
    open_index(image_set)
    assert len(listings) == 2


def test_with_a_read_only_cache_folders_are_listed_each_time(
    write_coco: WriteCoco, listings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Path) -> None:
        raise OSError(30, "Read-only file system")

    image_set = write_coco(ONE)
    settle(Path(image_set.image_dir))
    monkeypatch.setattr(coco_index, "atomic_file", read_only)
    for _ in range(2):
        open_index(image_set)
    assert len(listings) == 2


def test_images_that_are_not_required_may_be_missing(write_coco: WriteCoco) -> None:
    image_set = write_coco({"a.png": (2, 2), "b.png": (2, 2)})
    Path(image_set.image_dir, "a.png").unlink()
    assert open_index(image_set, require_images=False).num_image == 2
    with pytest.raises(FileNotFoundError, match="1 of 2 images"):
        open_index(image_set)


def test_missing_folder_and_json(write_coco: WriteCoco) -> None:
    image_set = write_coco(ONE)
    shutil.rmtree(image_set.image_dir)
    with pytest.raises(FileNotFoundError, match=r"image folder .*correct the path in the config's ImageSet"):
        open_index(image_set)
    Path(image_set.annotation).unlink()
    with pytest.raises(FileNotFoundError, match=r"annotation file .*correct the path in the config's ImageSet"):
        open_index(image_set)


def test_the_index_is_built_once_and_mapped(write_coco: WriteCoco, monkeypatch: pytest.MonkeyPatch) -> None:
    image_set = write_coco(ONE, [(0, 3, [1, 1, 2, 2])])
    built = open_index(image_set)
    monkeypatch.setattr("core.data.coco_index.read_columns", lambda path: pytest.fail("read the json again"))
    again = open_index(image_set)
    assert isinstance(again.box, np.memmap)
    assert again.gt_bbox(0).tolist() == built.gt_bbox(0).tolist()


def test_a_changed_json_gets_a_new_index(write_coco: WriteCoco) -> None:
    image_set = write_coco(ONE, [(0, 3, [1, 1, 2, 2])])
    assert open_index(image_set).has_box.any()
    content = json.loads(Path(image_set.annotation).read_text())
    Path(image_set.annotation).write_text(json.dumps(content | {"annotations": []}))
    assert not open_index(image_set).has_box.any()


def damage_nothing_but(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        damage_nothing_but("box.npy", b""),
        damage_nothing_but("box.npy", b"no array"),
        damage_nothing_but("meta.json", b"{"),
        damage_nothing_but("meta.json", b"{}"),
        lambda folder: (folder / "box.npy").write_bytes((folder / "box.npy").read_bytes()[:-4]),
        lambda folder: np.save(folder / "height.npy", np.zeros(7, np.int32)),
        lambda folder: (folder / "image_id.npy").unlink(),
    ],
)
def test_a_damaged_index_is_rebuilt(write_coco: WriteCoco, cache: Path, damage: Callable[[Path], object]) -> None:
    image_set = write_coco(ONE, [(0, 3, [1, 1, 2, 2])])
    open_index(image_set)
    (folder,) = cache.iterdir()
    damage(folder)
    index = open_index(image_set)
    assert index.gt_bbox(0).tolist() == [[1, 1, 2, 2, 1]]
    assert index.height.tolist() == [20]
    assert list(cache.iterdir()) == [folder]  # no temporary files are left


def test_a_cache_that_cannot_be_written_names_the_variable(write_coco: WriteCoco, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="set NECKLACE_CACHE to a writable folder"):
        open_index(write_coco(ONE), str(tmp_path / "file" / "cache"))


def test_a_full_disk_leaves_no_half_index(write_coco: WriteCoco, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match=r"No space left on device; set NECKLACE_CACHE"):
        open_index(write_coco(ONE))
    assert list(cache.iterdir()) == []


def test_processes_that_build_at_once_do_not_disturb_each_other(write_coco: WriteCoco, cache: Path) -> None:
    image_set = write_coco(ONE, [(0, 3, [1, 1, 2, 2])])
    with ThreadPoolExecutor(8) as pool:
        built = list(pool.map(lambda _: open_index(image_set).gt_bbox(0).tolist(), range(32)))
    assert built == [[[1, 1, 2, 2, 1]]] * 32
    assert len(list(cache.iterdir())) == 1


def test_an_index_that_another_process_has_just_stored_stays(
    write_coco: WriteCoco, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_set = write_coco(ONE, [(0, 3, [1, 1, 2, 2])])
    load = coco_index._load

    def slow_load(folder: Path, image_set: ImageSet) -> coco_index.CocoIndex:
        """Find no index; the other process completes one before the caller can react."""
        monkeypatch.setattr(coco_index, "_load", load)
        open_index(image_set)
        (folder / "theirs").touch()
        raise FileNotFoundError(folder)

    monkeypatch.setattr(coco_index, "_load", slow_load)
    open_index(image_set)
    assert [(folder / "theirs").exists() for folder in cache.iterdir()] == [True]


def test_pickling_carries_the_path_not_the_columns(write_coco: WriteCoco) -> None:
    boxes = [(0, 3, [1, 1, 2, 2])] * 1000
    index = open_index(write_coco(ONE, boxes))
    sent = pickle.dumps(index)
    assert len(sent) < 1000
    assert pickle.loads(sent).gt_bbox(0).tolist() == index.gt_bbox(0).tolist()
