"""Description of a trained detector: what it needs beside its weights, as a checkpoint stores it.

With the weights it is complete: the config file, and the data set that the detector was trained on, are not needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config.check import check_described
from config.derive import derive_described
from config.image_set import ImageSet, resolve
from config.NASFPN.recipe import retina_transform
from config.overrides import apply_overrides
from config.schema import Config, Transform
from config.section import fill, leaves
from config.simpledet.transforms import RESIZES
from symbol import load_json

if TYPE_CHECKING:
    from core.data.coco_index import CocoIndex

TEST_RESIZES = {test.__name__: test for _, test in RESIZES.values()}  # by name

# fields and sections that change what a trained detector finds; the rest of a config is about training and the machine
_GRAPH = (
    "NormalizeParam.eps",
    "BackboneParam.",
    "NeckParam.",
    "RpnParam.num_class",
    "RpnParam.anchor_generate.",
    "RpnParam.head.",
    "RpnParam.proposal.",
)
_INPUT = ("NormParam.", "ResizeParam.short", "ResizeParam.long")
_PRECISION = ("General.fp16", "General.bf16")
_DETECTION = ("TestParam.min_det_score", "TestParam.max_det_per_image", "TestParam.nms.")
# with another value of these the weights mean something else
_MEANING = ("RpnParam.anchor_generate.", "NormParam.", "NormalizeParam.eps")


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """An image set that a detector was trained on."""

    name: str
    annotation: str
    images: int
    boxes: int
    sha256: str  # of the annotation file


@dataclass(frozen=True, kw_only=True)
class Description:
    """A detector without its weights."""

    graph: str  # the test graph in MXNet's JSON
    settings: tuple[str, ...]  # `Section.field=value`, valid overrides
    resize: str  # transform of the test input, a key of TEST_RESIZES, or the name of a user's class
    fit: tuple[int, ...]  # short and long side that it fits images into, before padding to ResizeParam
    class_names: tuple[str, ...]  # of the classes 1..K
    category_ids: tuple[int, ...]  # theirs in the data set's json
    config: str  # the config file
    train_sets: tuple[DataSet, ...]
    test_sets: tuple[ImageSet, ...]  # tested on if no other is given
    versions: Mapping[str, str]  # of the programs that trained it

    def to_json(self) -> dict[str, Any]:
        """Return the description as an object for JSON."""
        sets = [{key: getattr(one, key) for key in ("name", "annotation", "image_dir")} for one in self.test_sets]
        return asdict(self) | {"test_sets": sets, "versions": dict(self.versions)}

    @classmethod
    def from_json(cls, stored: Any) -> Description:
        """Return the description in a checkpoint's metadata. Raises ValueError for anything else."""
        if not isinstance(stored, dict) or stored.keys() != {entry.name for entry in fields(cls)}:
            raise ValueError("its description of the detector lacks fields or has unknown ones")
        try:
            return cls(
                graph=_text(stored["graph"]),
                settings=tuple(map(_text, stored["settings"])),
                resize=_text(stored["resize"]),
                fit=tuple(map(_number, stored["fit"])),
                class_names=tuple(map(_text, stored["class_names"])),
                category_ids=tuple(map(_number, stored["category_ids"])),
                config=_text(stored["config"]),
                train_sets=tuple(DataSet(**one) for one in stored["train_sets"]),
                test_sets=tuple(map(_image_set, stored["test_sets"])),
                versions={_text(key): _text(value) for key, value in stored["versions"].items()},
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"its description of the detector is not valid ({error})") from None


def _image_set(stored: Any) -> ImageSet:
    return ImageSet(_text(stored["name"]), _text(stored["annotation"]), _text(stored["image_dir"]))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {value!r:.80}")
    return value


def _number(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"expected a whole number, got {value!r:.80}")
    return value


def describe(config: Config, indexes: Sequence[CocoIndex], versions: Mapping[str, str]) -> Description:
    """Return the description of the detector that a config trains on the image sets of `indexes`."""
    resize, fit = _resize(config)
    return Description(
        graph=json.dumps(json.loads(config.ModelParam.test_symbol.tojson()), separators=(",", ":")),
        settings=tuple(f"{key}={value!r}" for key, value in detector_settings(config).items()),
        resize=resize,
        fit=fit,
        class_names=indexes[0].class_names,
        category_ids=indexes[0].category_ids,
        config=config.source,
        train_sets=tuple(map(_data_set, indexes)),
        test_sets=tuple(resolve(one, config.DatasetParam.data_root) for one in config.TestParam.image_set),
        versions=versions,
    )


def _resize(config: Config) -> tuple[str, tuple[int, ...]]:
    """Return the name of the transform that resizes test images, and the sides that it fits them into; () for a user's
    own class."""
    sample = config.test_transform.sample
    name = type(sample[1]).__name__ if len(sample) > 1 else "nothing"
    return name, (sample[1].p.short, sample[1].p.long) if name in TEST_RESIZES else ()


def _data_set(index: CocoIndex) -> DataSet:
    path = index.image_set.annotation
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    name, images = index.image_set.name, index.num_image
    return DataSet(name=name, annotation=path, images=images, boxes=len(index.box), sha256=digest)


def detector_settings(config: Config) -> dict[str, Any]:
    """Return the fields that change what a trained detector finds, by dotted key."""
    wanted = (*_GRAPH, *_INPUT, *_PRECISION, *_DETECTION)
    return {
        key: getattr(section, entry.name)
        for key, section, entry in leaves(config)
        if key.startswith(wanted) and "derived" not in entry.metadata
    }


def restore(description: Description, overrides: Sequence[str] = ()) -> Config:
    """Return a complete config for testing the described detector, with `overrides` applied.

    Its graph is the stored one, so that backbone, neck and head need not be known. Raises ValueError for an override
    of a field that is part of the graph, and as `config.load.load_config` does for one that is not valid.
    """
    graph = load_json(description.graph)
    config = Config()
    apply_overrides(config, description.settings)
    trained = detector_settings(config)
    config.DatasetParam.image_set = description.test_sets
    apply_overrides(config, overrides)
    changed = [key for key, value in detector_settings(config).items() if value != trained[key]]
    in_half = trained["General.fp16"] or trained["General.bf16"]  # else the graph has no casts
    if fixed := [key for key in changed if key.startswith(_GRAPH if in_half else (*_GRAPH, *_PRECISION))]:
        raise ValueError(
            f"--set {fixed[0]}: it is part of the graph that the checkpoint holds, with {trained[fixed[0]]!r}; to "
            "build another graph, give the config file with --config"
        )
    config.get_transform = _test_transform(description, (trained["ResizeParam.short"], trained["ResizeParam.long"]))
    check_described(config)
    derive_described(config, Path(description.config).stem, graph, description.class_names)
    fill(config, "source", description.config)
    fill(config.TestParam, "image_set", description.test_sets)
    fill(config, "notes", [])
    return config


def _test_transform(description: Description, trained: tuple[int, int]) -> Callable[[Config, bool], Transform]:
    """Return the get_transform of a described detector, for testing alone. trained: its input's short and long side."""
    if description.resize not in TEST_RESIZES:
        raise ValueError(
            f"the detector's images are resized by {description.resize}, a class of its config's: give the config "
            "file with --config"
        )

    def test_transform(config: Config, is_train: bool) -> Transform:
        transform = retina_transform(config, is_train=False)
        fit = description.fit if description.fit != trained else (config.ResizeParam.short, config.ResizeParam.long)
        transform.sample[1] = TEST_RESIZES[description.resize](replace(config.ResizeParam, short=fit[0], long=fit[1]))
        return transform

    return test_transform


@dataclass(frozen=True)
class Difference:
    """A setting of a test that differs from what the checkpoint was trained with."""

    key: str
    trained: Any
    now: Any

    @property
    def is_meaningless(self) -> bool:
        """True if the weights mean something else with the new value."""
        return self.key.startswith((*_MEANING, "class_names"))

    def __str__(self) -> str:
        return f"{self.key}: trained with {self.trained!r}, tested with {self.now!r}"


def differences(description: Description, config: Config) -> list[Difference]:
    """Return what a config changes of the detector that the description is of."""
    reference = Config()
    apply_overrides(reference, description.settings)
    trained, now = detector_settings(reference), detector_settings(config)
    found = [Difference(key, trained[key], now[key]) for key in now if trained[key] != now[key]]
    resize, fit = _resize(config)
    size = (reference.ResizeParam.short, reference.ResizeParam.long)
    # where the input's size is all that differs, ResizeParam says so already
    if resize != description.resize or (fit != description.fit and description.fit != size):
        shown = (
            f"{name} to {', '.join(map(str, sides))}"
            for name, sides in ((description.resize, description.fit), (resize, fit))
        )
        found.append(Difference("resize", *shown))
    names = config.DatasetParam.class_names
    if names and names != description.class_names:
        found.append(Difference("class_names", description.class_names, names))
    return found
