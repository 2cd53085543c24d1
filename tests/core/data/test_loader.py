from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from config.image_set import ImageSet
from config.schema import Config, KvstoreParam, ResizeParam
from core.data import loader
from core.data.coco_index import open_index
from core.data.dataset import DetectionDataset
from core.data.loader import TrainLoader, _pins_memory, _read
from core.data.sample_order import Position, epoch_batches, ordered_batches, spare_samples
from core.detection_input import Flip2DImageBbox, Pad2DImageBbox, ReadRoiRecord
from models.NASFPN.input import RandResizeCrop2DImageBbox, ResizeCrop2DImageBbox

WriteCoco = Callable[..., ImageSet]
SIDES = {f"{i}.png": (20 + 7 * (i % 3), 30) for i in range(9)}  # heights 20, 27, 34: every third is portrait
BOXES = [(i, 3, [i, i + 1, 5 + i, 6]) for i in range(8)]  # the last image has none


def transforms(short: int = 32, long: int = 32, max_num_gt: int = 3) -> list[Any]:
    resize = ResizeParam(short=short, long=long)
    pad: Any = SimpleNamespace(short=short, long=long, max_num_gt=max_num_gt)
    return [ReadRoiRecord(), RandResizeCrop2DImageBbox(resize), Flip2DImageBbox(), Pad2DImageBbox(pad)]


@pytest.fixture
def image_set(write_coco: WriteCoco) -> ImageSet:
    return write_coco(SIDES, BOXES)


def train(
    image_set: ImageSet,
    num_worker: int = 0,
    long: int = 32,
    seed: int = 5,
    batch_image: int = 3,
    end_step: int = sys.maxsize,
    **more: Any,
) -> TrainLoader:
    dataset = DetectionDataset([open_index(image_set)], transforms(32, long), seed=seed, flip=True)
    loader = TrainLoader(dataset, batch_image=batch_image, square=long == 32, num_worker=num_worker, **more)
    loader.end_step = end_step
    return loader


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    tensors = [name for name in left if name not in ("files", "skipped")]
    equal = all(torch.equal(left[name], right[name]) for name in tensors)
    lists = all(left[name] == right[name] for name in ("files", "skipped"))
    return left.keys() == right.keys() and lists and equal


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own() -> None:
    first, second = epoch_batches(0, 0, 100, 8), epoch_batches(0, 1, 100, 8)
    assert [len(batch) for batch in first] == [8] * 12 + [4]
    assert sorted(np.concatenate(first)) == list(range(100))
    assert sorted(np.concatenate(second)) == list(range(100))
    orders = [epoch_batches(seed, epoch, 100, 100)[0].tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert sorted(orders[0]) != orders[0]


def test_a_batch_holds_one_orientation() -> None:
    portrait = np.arange(50) % 3 == 0  # 17 portrait, 33 landscape
    batches = epoch_batches(0, 0, 50, 4, portrait)
    assert sorted(np.concatenate(batches)) == list(range(50))
    kinds = [set(portrait[batch].tolist()) for batch in batches]
    assert all(len(kind) == 1 for kind in kinds)
    assert sorted(len(batch) for batch in batches) == [1, 1] + [4] * 12  # 17 = 4 * 4 + 1, 33 = 8 * 4 + 1
    order = [kind == {True} for kind in kinds]
    assert order != sorted(order)
    assert order != sorted(order, reverse=True)


def test_ordered_batches() -> None:
    assert [b.tolist() for b in ordered_batches(5, 2)] == [[0, 1], [2, 3], [4]]
    portrait = np.array([False, True, False, True, True])
    assert [b.tolist() for b in ordered_batches(5, 2, portrait)] == [[1, 3], [4], [0, 2]]


def test_a_batch(image_set: ImageSet) -> None:
    batches = list(train(image_set, end_step=6))
    assert len(batches) == 6
    first = batches[0]
    assert (first["image"].dtype, first["image"].shape) == (torch.uint8, (3, 32, 32, 3))
    assert (first["im_info"].dtype, first["im_info"].shape) == (torch.float32, (3, 3))
    assert (first["gt_bbox"].dtype, first["gt_bbox"].shape) == (torch.float32, (3, 3, 5))
    assert (first["im_id"].dtype, first["im_id"].shape) == (torch.int64, (3,))
    assert [Path(file).name for file in first["files"]] == [f"{i - 100}.png" for i in first["im_id"]]


def test_an_epoch_has_every_image_with_a_box_plain_and_mirrored(image_set: ImageSet) -> None:
    loader = train(image_set, end_step=6)
    assert loader.iter_per_epoch == 6  # 8 images, twice, by 3
    shown = sorted(int(i) for batch in loader for i in batch["im_id"])
    assert shown == sorted([*range(100, 108)] * 2)  # 108 has no box


def test_mirrored_samples_are_the_second_half(image_set: ImageSet) -> None:
    dataset = DetectionDataset([open_index(image_set)], [], flip=True)
    assert [dataset.record(0, i)["flipped"] for i in (0, 7, 8, 15)] == [False, False, True, True]
    assert dataset.record(0, 3)["image_path"] == dataset.record(0, 11)["image_path"]
    assert len(DetectionDataset([open_index(image_set)], [], flip=False)) == 8


def test_every_sample_has_random_numbers_of_its_own(image_set: ImageSet) -> None:
    def draw(seed: int, epoch: int, sample: int) -> float:
        dataset = DetectionDataset([open_index(image_set)], [], seed=seed)
        return float(dataset.record(epoch, sample)["rng"].uniform())

    keys = [(seed, epoch, sample) for seed in (0, 1) for epoch in (0, 1) for sample in (0, 1)]
    assert len({draw(*key) for key in keys}) == 8
    assert draw(1, 2, 3) == draw(1, 2, 3)


def test_the_shuffle_shares_no_random_numbers_with_the_first_sample(image_set: ImageSet) -> None:
    rng = DetectionDataset([open_index(image_set)], [], seed=1).record(2, 0)["rng"]
    assert rng.permutation(100).tolist() != epoch_batches(1, 2, 100, 100)[0].tolist()


@pytest.mark.parametrize("long", [32, 64])
def test_the_number_of_workers_changes_nothing(image_set: ImageSet, long: int) -> None:
    alone = list(train(image_set, 0, long, end_step=9))
    for num_worker in (1, 2):
        assert all(same(a, b) for a, b in zip(alone, train(image_set, num_worker, long, end_step=9), strict=True))


@pytest.mark.parametrize("num_worker", [0, 2])
@pytest.mark.parametrize("long", [32, 64])
def test_a_restart_continues_with_the_batches_that_would_have_come(
    image_set: ImageSet, num_worker: int, long: int
) -> None:
    through = list(train(image_set, 0, long, end_step=15))
    for start in (4, 6, 13):  # within the first epoch, at the second's start, within the third
        position = train(image_set, 0, long).position_at(start)
        resumed = train(image_set, num_worker, long, start=position, end_step=15)
        assert (resumed.start_step, resumed.position_at(start)) == (start, position)
        assert all(same(a, b) for a, b in zip(through[start:], resumed, strict=True))
    assert not same(through[0], through[6])


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Concatenate the batches of all ranks."""
    lists = {name: [item for part in parts for item in part[name]] for name in ("files", "skipped")}
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name not in lists} | lists


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("long", [32, 64])
def test_processes_share_the_batches_of_one_process(image_set: ImageSet, long: int, size: int) -> None:
    # 16 samples by 3 per rank: 3, 6, 9 or 24 per step, of which none divides 16, nor the 4 that are portrait
    end_step = 2 * train(image_set, 0, long, batch_image=3 * size).iter_per_epoch
    whole = list(train(image_set, 0, long, batch_image=3 * size, end_step=end_step))
    ranks = [list(train(image_set, 0, long, rank=rank, world_size=size, end_step=end_step)) for rank in range(size)]
    steps = [list(parts) for parts in zip(*ranks, strict=True)]
    assert all(same(one, joined(parts)) for one, parts in zip(whole, steps, strict=True))
    numbers = [[len(part["image"]) for part in parts] for parts in steps]
    assert all(max(counts) - min(counts) <= 1 for counts in numbers)
    shown = [int(i) for parts in steps for part in parts for i in part["im_id"]]
    assert sorted(shown) == sorted([*range(100, 108)] * 4)  # two epochs, plain and mirrored


@pytest.mark.parametrize("num_worker", [0, 1])
def test_a_process_without_images_has_tensors_of_their_shapes(image_set: ImageSet, num_worker: int) -> None:
    ranks = [list(train(image_set, num_worker, 64, rank=rank, world_size=8, end_step=2)) for rank in range(8)]
    assert (
        sorted(len(batch["image"]) for rank in ranks for batch in rank) == [0] * 4 + [1] * 8 + [2] * 4
    )  # 4 portrait, 12 landscape samples
    empty = [(i, batch) for rank in ranks for i, batch in enumerate(rank) if not len(batch["image"])]
    for i, batch in empty:
        full = ranks[0][i]
        assert (batch["files"], batch["skipped"]) == ([], [])
        for name in ("image", "im_info", "gt_bbox", "im_id"):
            assert batch[name].dtype == full[name].dtype
            assert batch[name].shape == (0, *full[name].shape[1:])


def images_of(batches: TrainLoader) -> list[tuple[str, bytes]]:
    """Return (file, pixels) of all images of a loader."""
    return [
        (file, image.numpy().tobytes())
        for batch in batches
        for file, image in zip(batch["files"], batch["image"], strict=True)
    ]


@pytest.mark.parametrize("long", [32, 64])
def test_an_epoch_continues_with_a_different_number_of_processes(image_set: ImageSet, long: int) -> None:
    position = Position()
    shown: list[tuple[str, bytes]] = []
    for size, steps in ((1, 2), (2, 1), (1, 1), (3, None)):
        ranks = [train(image_set, 0, long, rank=rank, world_size=size, start=position) for rank in range(size)]
        first = ranks[0].start_step
        end_step = ranks[0].iter_per_epoch if steps is None else first + steps
        for rank in ranks:
            rank.end_step = end_step
            shown += images_of(rank)
        position = ranks[0].position_at(end_step)
        assert {rank.position_at(end_step) for rank in ranks} == {position}
    through = images_of(train(image_set, 0, long, end_step=6))
    assert sorted(shown) == sorted(through)
    assert len(set(shown)) == 16
    assert position == Position(epoch=1)


def test_positions_count_samples_and_orientations(image_set: ImageSet) -> None:
    square, oblong = train(image_set), train(image_set, 0, 64)
    assert [tuple(square.position_at(step)) for step in (0, 1, 5, 6, 8)] == [
        (0, 0, 0),
        (0, 3, 0),
        (0, 15, 0),
        (1, 0, 0),
        (1, 6, 0),
    ]
    portrait, taken = oblong.dataset.portrait, 0
    for step, samples in enumerate(epoch_batches(5, 0, 16, 3, portrait)):
        assert oblong.position_at(step).portrait == taken
        taken += int(portrait[samples].sum())
    assert taken == portrait.sum() == 4


def test_a_start_in_another_step_size_ends_with_the_epoch(image_set: ImageSet) -> None:
    resumed = train(image_set, start=Position(2, 5))  # 11 samples left: 4 steps of at most 3
    assert resumed.start_step == 2 * 6 + 2
    assert [len(batch["files"]) for batch in train(image_set, start=Position(2, 5), end_step=18)] == [3, 3, 3, 2]
    assert train(image_set).position_at(15) == Position(2, 9)  # as from the start of an epoch: 3 steps of 3


def test_without_an_end_epochs_follow_each_other(image_set: ImageSet) -> None:
    batches = iter(train(image_set))
    assert len([next(batches) for _ in range(20)]) == 20


def test_reading_leaves_the_models_random_numbers_alone(image_set: ImageSet) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(train(image_set, 2, end_step=2))
    assert torch.equal(torch.rand(3), expected)


def test_oblong_inputs_come_in_two_shapes(image_set: ImageSet) -> None:
    shapes = {tuple(batch["image"].shape[1:]) for batch in train(image_set, 0, 64, end_step=6)}
    assert shapes == {(32, 64, 3), (64, 32, 3)}


def config(image_sets: tuple[ImageSet, ...], long: int = 32) -> Any:
    resize = ResizeParam(short=32, long=long)
    pad: Any = SimpleNamespace(short=32, long=long, max_num_gt=3)
    ordered = [ReadRoiRecord(), ResizeCrop2DImageBbox(resize), Pad2DImageBbox(pad)]
    return SimpleNamespace(
        General=SimpleNamespace(seed=0, batch_image=2, loader_worker=0),
        DatasetParam=SimpleNamespace(
            image_set=image_sets, data_root="data", flip=True, bad_image="stop", bad_image_limit=100
        ),
        KvstoreParam=SimpleNamespace(gpus=()),
        OptimizeParam=SimpleNamespace(accumulate=1, schedule=SimpleNamespace(end_epoch=1)),
        TestParam=SimpleNamespace(batch_image=2),
        ResizeParam=resize,
        transform=SimpleNamespace(sample=transforms(32, long)),
        test_transform=SimpleNamespace(sample=ordered),
    )


@pytest.mark.parametrize(
    "cores, gpus, processes, expected",
    [(16, (0,), 1, 4), (16, tuple(range(8)), 1, 2), (2, (0,), 1, 2), (2, (), 4, 1), (6, (), 2, 3)],
)
def test_workers_follow_the_cores_unless_given(
    monkeypatch: pytest.MonkeyPatch, cores: int, gpus: tuple[int, ...], processes: int, expected: int
) -> None:
    monkeypatch.setattr(loader, "usable_cpus", lambda: cores)
    given = config(())
    given.KvstoreParam = KvstoreParam(gpus=gpus, processes=processes)
    given.General.loader_worker = None
    assert loader.num_worker(given) == expected
    for number in (0, 7):
        given.General.loader_worker = number
        assert loader.num_worker(given) == number


def test_a_rank_has_batch_image_images_per_step(image_set: ImageSet) -> None:
    alone = loader.make_train_loader(config((image_set,)))
    first = loader.make_train_loader(config((image_set,)), rank=0, world_size=3)
    assert (alone.iter_per_epoch, first.iter_per_epoch) == (8, 3)  # 16 samples by 2 and by 6
    assert len(next(iter(alone))["image"]) == len(next(iter(first))["image"]) == 2


def test_testing_shows_every_image_in_order(image_set: ImageSet) -> None:
    test = loader.make_test_loader(config(()), image_set)
    batches = list(test)
    assert len(test) == len(batches) == 5
    assert torch.cat([batch["im_id"] for batch in batches]).tolist() == list(range(100, 109))
    assert batches[4]["gt_bbox"].tolist() == [[[-1] * 5] * 3]
    assert batches[0]["im_info"][0].tolist() == [21, 32, pytest.approx(32 / 30)]  # 20 * 32 / 30 = 21.3


def test_testing_an_oblong_input_keeps_one_orientation_per_batch(image_set: ImageSet) -> None:
    batches = list(loader.make_test_loader(config((), 64), image_set))
    assert [batch["im_id"].tolist() for batch in batches] == [
        [102, 105],
        [108],
        [100, 101],
        [103, 104],
        [106, 107],
    ]


def test_image_sets_without_annotations_can_be_tested(write_coco: WriteCoco) -> None:
    (batch,) = loader.make_test_loader(config(()), write_coco({"a.png": (9, 9)}, annotations=None))
    assert batch["gt_bbox"].tolist() == [[[-1] * 5] * 3]


def test_several_image_sets_are_one(write_coco: WriteCoco) -> None:
    sets = [write_coco({"a.png": (9, 9)}, [(0, 3, [0, 0, 2, 2])], name) for name in ("one", "two")]
    dataset = DetectionDataset([open_index(image_set) for image_set in sets], [], flip=True)
    assert [Path(dataset.record(0, i)["image_path"]).parts[-3] for i in range(4)] == ["one", "two"] * 2


def test_image_sets_of_other_classes_do_not_mix(write_coco: WriteCoco, image_set: ImageSet) -> None:
    other = write_coco({}, name="other", categories=[{"id": 1, "name": "bird"}])
    with pytest.raises(ValueError, match=r"toy and other have different categories: \('dog', 'cat'\)"):
        DetectionDataset([open_index(image_set), open_index(other)], [])


@pytest.mark.parametrize(
    "boxes, replaced, message",
    [
        ([], {}, "1 images, no annotations in its json"),
        ([(0, 3, [0, 0, 2, 2], {"iscrowd": 1})], {}, "1 images, no box to train on"),
        ([], {"annotations": None}, "1 images, no annotations in its json"),
    ],
)
def test_nothing_to_train_on_is_an_error(
    write_coco: WriteCoco, boxes: list[Any], replaced: dict[str, Any], message: str
) -> None:
    index = open_index(write_coco({"a.png": (9, 9)}, boxes, **replaced))
    with pytest.raises(ValueError, match=f"no image is left.*{message}"):
        DetectionDataset([index], [])


def test_no_image_and_no_image_set_are_errors(write_coco: WriteCoco) -> None:
    with pytest.raises(ValueError, match=r"no image is left.*0 images"):
        DetectionDataset([open_index(write_coco({}))], [], keep_empty=True)
    with pytest.raises(ValueError, match=r"no image is left\. no image set is named"):
        DetectionDataset([], [])


def test_a_negative_seed_is_refused(image_set: ImageSet) -> None:
    with pytest.raises(ValueError, match=r"General\.seed: expected 0 or more, got -1"):
        DetectionDataset([open_index(image_set)], [], seed=-1)


@pytest.mark.parametrize("num_worker", [0, 2])
def test_a_truncated_image_is_named_in_one_line(image_set: ImageSet, num_worker: int) -> None:
    file = Path(image_set.image_dir) / "4.png"
    batches = train(image_set, num_worker, end_step=6)
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"^cannot read image .*4\.png: .* truncated") as caught:
        list(batches)
    assert "\n" not in str(caught.value)


def damage(image_set: ImageSet, name: str) -> str:
    """Truncate an image file, or remove it if its number is odd. Returns its path."""
    file = Path(image_set.image_dir) / name
    if int(file.stem) % 2:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:300])
    return str(file)


@pytest.mark.parametrize("num_worker", [0, 2])
@pytest.mark.parametrize("long", [32, 64])
def test_an_image_that_cannot_be_read_is_replaced_by_another(image_set: ImageSet, num_worker: int, long: int) -> None:
    whole = list(train(image_set, 0, long, end_step=12))
    skipping = train(image_set, num_worker, long, end_step=12, bad_image_limit=2)
    bad = {damage(image_set, "4.png"): "truncated", damage(image_set, "5.png"): "not found"}  # landscape and portrait
    batches = list(skipping)
    good = {file for batch in whole for file in batch["files"]} - bad.keys()
    for before, now in zip(whole, batches, strict=True):
        assert before["image"].shape == now["image"].shape  # as many images, and of one orientation
        for i, file in enumerate(before["files"]):
            if file in bad:
                assert now["files"][i] in good
            else:
                assert now["files"][i] == file
                assert torch.equal(now["image"][i], before["image"][i])
    skipped = [item for batch in batches for item in batch["skipped"]]
    assert sorted(path for path, _ in skipped) == sorted(bad)  # reported once, though each occurs four times
    assert all(path in wrong and bad[path] in wrong for path, wrong in skipped)
    for file in bad:  # at its own sample, or earlier as a candidate to replace another
        met = next(step for step, batch in enumerate(whole) if file in batch["files"])
        reported = next(step for step, batch in enumerate(batches) if file in dict(batch["skipped"]))
        assert reported <= met


def test_replacements_do_not_depend_on_the_number_of_processes(image_set: ImageSet) -> None:
    damage(image_set, "4.png")
    whole = list(train(image_set, batch_image=6, end_step=6, bad_image_limit=9))
    ranks = [list(train(image_set, rank=rank, world_size=2, end_step=6, bad_image_limit=9)) for rank in (0, 1)]
    for one, *parts in zip(whole, *ranks, strict=True):
        assert one["files"] == joined(parts)["files"]
        assert torch.equal(one["image"], joined(parts)["image"])


def test_replacements_in_one_step_differ() -> None:
    for portrait in (None, np.arange(40) % 2 == 0):
        for samples in epoch_batches(0, 0, 40, 4, portrait)[:4]:
            spares = [spare_samples(0, 0, 40, 4, portrait, int(sample)) for sample in samples]
            assert len({spare[0] for spare in spares} | set(samples.tolist())) == 8
            for sample, spare in zip(samples, spares, strict=True):
                others = set(range(40)) if portrait is None else set(np.flatnonzero(portrait == portrait[sample]))
                assert sorted(spare) == sorted(others - {int(sample)})


@pytest.mark.parametrize("num_worker", [0, 1])
def test_more_bad_images_than_the_limit_stop_with_the_last_ones_named(image_set: ImageSet, num_worker: int) -> None:
    batches = train(image_set, num_worker, bad_image_limit=3)
    paths = [damage(image_set, f"{i}.png") for i in range(4)]
    with pytest.raises(ValueError, match=r"bad_image_limit: 4 image files .* more than 3; the last: .*png") as caught:
        list(batches)
    assert sum(path in str(caught.value) for path in paths) == 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit, message", [(3, "bad_image_limit: 4 image files"), (50, "no sample is left to")])
def test_no_readable_image_is_an_error(image_set: ImageSet, limit: int, message: str) -> None:
    batches = train(image_set, batch_image=1, bad_image_limit=limit)
    for i in range(8):
        damage(image_set, f"{i}.png")
    with pytest.raises(ValueError, match=message):
        next(iter(batches))


def test_skipping_spares_no_other_error(image_set: ImageSet) -> None:
    dataset = DetectionDataset([open_index(image_set)], [ReadRoiRecord(), Raise(ValueError("not so"))])
    with pytest.raises(ValueError, match=r"^/.*\.png: not so$"):
        list(TrainLoader(dataset, batch_image=1, square=True, num_worker=0, end_epoch=1, bad_image_limit=9))


def test_the_config_chooses_what_a_bad_image_does(image_set: ImageSet) -> None:
    chosen = config((image_set,))
    file = damage(image_set, "4.png")
    stopping = loader.make_train_loader(chosen)
    stopping.end_step = 8
    with pytest.raises(ValueError, match=r"4\.png"):
        list(stopping)
    chosen.DatasetParam.bad_image = "skip"
    skipping = loader.make_train_loader(chosen)
    skipping.end_step = 8
    assert [path for batch in skipping for path, _ in batch["skipped"]] == [file]
    with pytest.raises(ValueError, match=r"4\.png"):
        list(loader.make_test_loader(chosen, image_set))  # a test requires all images


class Raise:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def apply(self, record: dict[str, Any]) -> None:
        raise self.error


def test_a_users_error_in_a_transform_names_the_image(image_set: ImageSet) -> None:
    dataset = DetectionDataset([open_index(image_set)], [Raise(ValueError("not so"))])
    with pytest.raises(ValueError, match=r"^/.*\.png: not so$"):
        list(TrainLoader(dataset, batch_image=1, square=True, num_worker=0, end_epoch=1))


@pytest.mark.parametrize("num_worker", [0, 1])
def test_a_bug_in_a_transform_keeps_its_traceback_and_names_the_image(image_set: ImageSet, num_worker: int) -> None:
    dataset = DetectionDataset([open_index(image_set)], [Raise(ZeroDivisionError("bug"))])
    with pytest.raises(ZeroDivisionError) as caught:
        list(TrainLoader(dataset, batch_image=1, square=True, num_worker=num_worker, end_epoch=1))
    text = str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    assert "while preparing" in text
    assert ".png" in text


def test_images_that_were_not_padded_are_named(image_set: ImageSet) -> None:
    dataset = DetectionDataset([open_index(image_set)], [ReadRoiRecord()])
    with pytest.raises(ValueError, match=r"\.png: 'image' has the shapes .*should be Pad2DImageBbox"):
        list(TrainLoader(dataset, batch_image=8, square=True, num_worker=0, end_epoch=1))


READ_BY_A_WORKER = """
import os, signal, sys, threading, time
from core.data.loader import _read
class Reader:
    skip = None
    def __getitem__(self, part):
        print(os.getpid(), flush=True)
        {read}
try:
    list(_read(Reader(), [0], 1, False))
except RuntimeError as error:
    held = error
"""


def start_reading(read: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    script = READ_BY_A_WORKER.format(read=read)
    return subprocess.Popen([sys.executable, "-c", script], env=environment, text=True, stdout=subprocess.PIPE)


@pytest.mark.parametrize("gpus, pinned", [((), False), ((0,), True)])
def test_memory_is_pinned_for_gpus_alone(monkeypatch: pytest.MonkeyPatch, gpus: tuple[int, ...], pinned: bool) -> None:
    """A run with --gpus cpu on a machine with a GPU creates no CUDA context."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _pins_memory(cast(Config, SimpleNamespace(KvstoreParam=SimpleNamespace(gpus=gpus)))) is pinned
    seen = {}
    monkeypatch.setattr("core.data.loader.DataLoader", lambda *_, **given: seen.update(given) or [])
    assert list(_read(cast(Any, None), [], 0, pinned)) == []
    assert seen["pin_memory"] is pinned


def test_a_process_ends_though_a_traceback_keeps_its_workers() -> None:
    process = start_reading("raise RuntimeError('a bug')")
    try:
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()
        process.communicate()


def test_no_worker_outlives_a_process_that_is_killed() -> None:
    with start_reading("time.sleep(1000)") as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.kill()
    for _ in range(200):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"worker {worker} is still there")
