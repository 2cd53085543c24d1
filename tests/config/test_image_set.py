"""Image sets: their paths, their classes, and errors that name the file and the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from config.image_set import PUBLISHED, ImageSet, class_names, resolve


def test_train_split_names_instances_and_folder() -> None:
    found = resolve("coco_train2017", "/data")
    assert found == ImageSet(
        "coco_train2017", "/data/coco/annotations/instances_train2017.json", "/data/coco/images/train2017"
    )


def test_test_dev_has_image_info_and_the_images_of_test() -> None:
    found = resolve("coco_test-dev2017", "/data")
    assert found.annotation == "/data/coco/annotations/image_info_test-dev2017.json"
    assert found.image_dir == "/data/coco/images/test2017"


def test_parts_of_val2014_have_its_images() -> None:
    found = resolve("coco_minival2014", "/data")
    assert found.annotation == "/data/coco/annotations/instances_minival2014.json"
    assert found.image_dir == resolve("coco_valminusminival2014", "/data").image_dir == "/data/coco/images/val2014"


def test_test_split_with_boxes_of_its_own(tmp_path: Path) -> None:
    annotation = tmp_path / "mine" / "annotations" / "instances_test.json"
    annotation.parent.mkdir(parents=True)
    annotation.write_text("{}")
    assert resolve("mine_test", str(tmp_path)).annotation == str(annotation)


def test_an_image_set_resolves_to_itself() -> None:
    mine = ImageSet("mine", "a.json", "images")
    assert resolve(mine, "/data") is mine


@pytest.mark.parametrize("name", ["coco", "_train", "coco_", "", "../coco_train"])
def test_a_name_without_dataset_and_split_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"expected <dataset>_<split>, such as 'coco_train2017'"):
        resolve(name, "/data")


def test_classes_come_in_the_order_of_their_ids(tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]}))
    assert class_names(ImageSet("toy", str(path), str(tmp_path))) == ("dog", "cat")


def write(path: Path, text: str) -> ImageSet:
    path.write_text(text)
    return ImageSet("toy", str(path), str(path.parent))


def test_classes_are_found_without_parsing_the_rest(tmp_path: Path) -> None:
    head = '{"images": [never parsed], "categories" :\n [{"id": 1, "name": "caf\u00e9"}], "annotations": ['
    assert class_names(write(tmp_path / "a.json", head)) == ("caf\u00e9",)


def test_a_second_mention_of_categories_costs_a_full_parse(tmp_path: Path) -> None:
    content = {
        "info": {"categories": [{"id": 1, "name": "not this"}]},
        "categories": [{"id": 1, "name": "this"}],
    }
    assert class_names(write(tmp_path / "a.json", json.dumps(content))) == ("this",)


def test_categories_longer_than_the_scan(tmp_path: Path) -> None:
    content = {"categories": [{"id": i, "name": f"{i:0100}"} for i in range(12000)], "images": []}  # 1.5 MB
    assert len(class_names(write(tmp_path / "a.json", json.dumps(content)))) == 12000


@pytest.mark.parametrize(
    "categories, message",
    [
        ([], "'categories' is empty"),
        ("cat", "'categories' is missing or not a list"),
        ([{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}], "category id 1 appears twice"),
        ([{"id": 1, "name": "cat"}, {"id": 2}], r"categories\[1\] is \{'id': 2\}; expected an object"),
        ([{"id": "1", "name": "cat"}], r"categories\[0\]"),
    ],
)
def test_bad_categories_are_rejected(tmp_path: Path, categories: object, message: str) -> None:
    image_set = write(tmp_path / "a.json", json.dumps({"categories": categories}))
    with pytest.raises(ValueError, match=message) as caught:
        class_names(image_set)
    assert str(tmp_path / "a.json") in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"categories": [{"id": 1, "na', "\xff"])
def test_what_is_no_json_object_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.json: (not valid JSON|expected a JSON object)"):
        class_names(ImageSet("toy", str(tmp_path / "a.json"), ""))


def test_a_missing_data_root_names_what_is_missing_and_the_option(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="name the folder that holds them with --data-root") as caught:
        class_names(resolve("coco_train2017", str(tmp_path / "data")))
    assert f"the folder {tmp_path / 'data'} does not exist" in str(caught.value)
    assert "instances_train2017.json" in str(caught.value)


def test_published_facts() -> None:
    assert {name: (known.num_class, known.num_image) for name, known in PUBLISHED.items()} == {
        "coco_train2017": (80, 117266),
        "coco_val2017": (80, 4952),
        "coco_test-dev2017": (80, 20288),
        "coco_train2014": (80, 82081),
        "coco_val2014": (80, 40137),
        "coco_valminusminival2014": (80, 35185),
        "coco_minival2014": (80, 4952),
    }
