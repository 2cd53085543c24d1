"""Descriptions of trained detectors: a config goes in, and an equal one for testing comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from config.description import Description, describe, differences, restore
from config.load import load_config
from config.schema import Config
from core.data.coco_index import open_index
from tests.small_config import DEMO, SMALL_NETWORK
from utils.make_demo_dataset import make_demo_dataset


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_demo_dataset(root / "demo", train=2, val=1, size=128, seed=3)
    return root


@pytest.fixture
def config(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("NECKLACE_CACHE", str(tmp_path))
    return load_config(DEMO, is_train=True, overrides=[*SMALL_NETWORK, f"DatasetParam.data_root={data_root}"])


def described(config: Config) -> Description:
    index = open_index(config_image_set(config))
    return describe(config, [index], {"torch": "2.13"})


def config_image_set(config: Config):  # type: ignore[no-untyped-def]
    from config.image_set import resolve

    return resolve(config.DatasetParam.image_set[0], config.DatasetParam.data_root)


def test_json_holds_all_of_it(config: Config) -> None:
    description = described(config)
    assert Description.from_json(json.loads(json.dumps(description.to_json()))) == description
    assert description.class_names == ("circle", "cross", "ring", "square", "star", "triangle")
    assert [one.name for one in description.test_sets] == ["demo_val"]  # not demo_train, which it trains on
    (trained_on,) = description.train_sets
    assert (trained_on.name, trained_on.images, len(trained_on.sha256)) == ("demo_train", 2, 64)
    assert trained_on.boxes > 0


def test_the_restored_config_tests_as_the_one_that_it_describes(config: Config) -> None:
    description = described(config)
    restored = restore(description)
    assert differences(description, restored) == []
    assert restored.ModelParam.test_symbol.tojson() == config.ModelParam.test_symbol.tojson()
    for section in ("TestParam", "NormParam", "ResizeParam"):
        for key in ("nms", "max_det_per_image", "mean", "std", "short", "long"):
            assert getattr(getattr(restored, section), key, 0) == getattr(getattr(config, section), key, 0)
    assert list(map(type, restored.test_transform.sample)) == list(map(type, config.test_transform.sample))
    assert restored.DatasetParam.class_names == description.class_names
    assert [str(one) for one in restored.DatasetParam.image_set] == [str(one) for one in description.test_sets]


def test_overrides_of_the_test_are_differences(config: Config) -> None:
    restored = restore(described(config), ["TestParam.nms.thr=0.6", "ResizeParam.short=256", "ResizeParam.long=256"])
    found = differences(described(config), restored)
    assert [str(one) for one in found] == [
        "TestParam.nms.thr: trained with 0.5, tested with 0.6",
        "ResizeParam.short: trained with 128, tested with 256",
        "ResizeParam.long: trained with 128, tested with 256",
    ]
    assert not any(one.is_meaningless for one in found)
    assert restored.test_transform.sample[1].p.short == 256


@pytest.mark.parametrize(
    "override",
    ["NormParam.std=(1.0,1.0,1.0)", "NormParam.mean=(0.0,0.0,0.0)"],
)
def test_another_normalization_makes_the_weights_meaningless(config: Config, override: str) -> None:
    (one,) = differences(described(config), restore(described(config), [override]))
    assert one.is_meaningless


def test_other_anchors_and_another_order_of_classes_make_the_weights_meaningless(config: Config) -> None:
    description = described(config)
    other = load_config(
        DEMO,
        is_train=False,
        overrides=[
            *SMALL_NETWORK,
            f"DatasetParam.data_root={config.DatasetParam.data_root}",
            "RpnParam.anchor_generate.scale=(4.0,)",
        ],
    )
    assert [one.key for one in differences(description, other) if one.is_meaningless] == [
        "RpnParam.anchor_generate.scale"
    ]
    swapped = Description.from_json(description.to_json() | {"class_names": list(reversed(description.class_names))})
    same = load_config(
        DEMO, is_train=False, overrides=[*SMALL_NETWORK, f"DatasetParam.data_root={config.DatasetParam.data_root}"]
    )
    assert [one.key for one in differences(swapped, same) if one.is_meaningless] == ["class_names"]


@pytest.mark.parametrize("override", ["NeckParam.num_stage=3", "RpnParam.proposal.min_det_score=0.2"])
def test_what_the_graph_holds_cannot_be_set(config: Config, override: str) -> None:
    with pytest.raises(ValueError, match=r"part of the graph .* give the config file with --config"):
        restore(described(config), [override])


def test_a_float32_graph_has_no_half_type(config: Config) -> None:
    assert not config.General.fp16
    with pytest.raises(ValueError, match=r"General\.fp16: it is part of the graph"):
        restore(described(config), ["General.fp16=True"])


def test_a_transform_of_ones_own_needs_the_config(config: Config) -> None:
    stored = described(config).to_json() | {"resize": "Letterbox"}
    with pytest.raises(ValueError, match=r"resized by Letterbox, .* give the config file with --config"):
        restore(Description.from_json(stored))


@pytest.mark.parametrize(
    ("key", "value"),
    [("graph", 3), ("settings", [1]), ("fit", ["a"]), ("category_ids", [True]), ("train_sets", [{}]), ("versions", [])],
)
def test_a_damaged_description_is_refused(config: Config, key: str, value: object) -> None:
    with pytest.raises(ValueError, match="description of the detector"):
        Description.from_json(described(config).to_json() | {key: value})


def test_missing_and_unknown_fields_are_refused(config: Config) -> None:
    stored = described(config).to_json()
    with pytest.raises(ValueError, match="lacks fields or has unknown ones"):
        Description.from_json(stored | {"more": 1})
    del stored["graph"]
    with pytest.raises(ValueError, match="lacks fields or has unknown ones"):
        Description.from_json(stored)
