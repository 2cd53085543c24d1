from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from config.schema import ResizeParam
from core import loader
from core.coco_index import open_index
from core.dataset import DetectionDataset
from core.detection_input import Flip2DImageBbox, Pad2DImageBbox, ReadRoiRecord
from core.image_set import ImageSet
from core.loader import TrainLoader, epoch_batches, ordered_batches
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


def train(image_set: ImageSet, num_worker: int = 0, long: int = 32, seed: int = 5, **steps: Any) -> TrainLoader:
    dataset = DetectionDataset([open_index(image_set)], transforms(32, long), seed=seed, flip=True)
    return TrainLoader(dataset, batch_image=3, square=long == 32, num_worker=num_worker, **steps)


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    tensors = [name for name in left if name != "files"]
    equal = all(torch.equal(left[name], right[name]) for name in tensors)
    return left.keys() == right.keys() and left["files"] == right["files"] and equal


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
        resumed = list(train(image_set, num_worker, long, start_step=start, end_step=15))
        assert all(same(a, b) for a, b in zip(through[start:], resumed, strict=True))
    assert not same(through[0], through[6])


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
        KvstoreParam=SimpleNamespace(gpus=(0, 1)),
        DatasetParam=SimpleNamespace(image_set=image_sets, data_root="data", flip=True),
        TestParam=SimpleNamespace(batch_image=2),
        ResizeParam=resize,
        transform=SimpleNamespace(sample=transforms(32, long)),
        test_transform=SimpleNamespace(sample=ordered),
    )


def test_a_step_has_batch_image_images_for_each_device(image_set: ImageSet) -> None:
    first = next(iter(loader.make_train_loader(config((image_set,)))))
    assert len(first["image"]) == 4  # 2 on each of 2


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
    with pytest.raises(ValueError, match=f"no image to work on.*{message}"):
        DetectionDataset([index], [])


def test_no_image_and_no_image_set_are_errors(write_coco: WriteCoco) -> None:
    with pytest.raises(ValueError, match=r"no image to work on.*0 images"):
        DetectionDataset([open_index(write_coco({}))], [], keep_empty=True)
    with pytest.raises(ValueError, match=r"no image to work on\. none is named"):
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


class Raise:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def apply(self, record: dict[str, Any]) -> None:
        raise self.error


def test_a_users_error_in_a_transform_names_the_image(image_set: ImageSet) -> None:
    dataset = DetectionDataset([open_index(image_set)], [Raise(ValueError("not so"))])
    with pytest.raises(ValueError, match=r"^/.*\.png: not so$"):
        list(TrainLoader(dataset, batch_image=1, square=True, num_worker=0, end_step=1))


@pytest.mark.parametrize("num_worker", [0, 1])
def test_a_bug_in_a_transform_keeps_its_traceback_and_names_the_image(image_set: ImageSet, num_worker: int) -> None:
    dataset = DetectionDataset([open_index(image_set)], [Raise(ZeroDivisionError("bug"))])
    with pytest.raises(ZeroDivisionError) as caught:
        list(TrainLoader(dataset, batch_image=1, square=True, num_worker=num_worker, end_step=1))
    told = str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    assert "while preparing" in told
    assert ".png" in told


def test_images_that_were_not_padded_are_named(image_set: ImageSet) -> None:
    dataset = DetectionDataset([open_index(image_set)], [ReadRoiRecord()])
    with pytest.raises(ValueError, match=r"\.png: 'image' has the shapes .*should be Pad2DImageBbox"):
        list(TrainLoader(dataset, batch_image=8, square=True, num_worker=0, end_step=1))
