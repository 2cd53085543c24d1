"""The transforms of a SimpleDet config file, and their equivalents in this project."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from config.NASFPN.recipe import retina_transform
from config.schema import Config, Transform
from config.simpledet.names import Part
from core.detection_input import Resize2DImageBbox
from models.NASFPN.input import RandResizeCrop2DImageBbox, ResizeCrop2DImageBbox

# resizing transform of the file: equivalents in training and in testing
RESIZES: dict[str, tuple[type, type]] = {
    "RandResizeCrop2DImageBbox": (RandResizeCrop2DImageBbox, ResizeCrop2DImageBbox),
    "ResizeCrop2DImageBbox": (ResizeCrop2DImageBbox, ResizeCrop2DImageBbox),
    "Resize2DImageBbox": (Resize2DImageBbox, Resize2DImageBbox),
}
_SECTIONS = {
    "Norm2DImage": "NormParam",
    "Pad2DImageBbox": "PadParam",
    "PyramidAnchorTarget2D": "AnchorTarget2DParam",
    **dict.fromkeys(RESIZES, "ResizeParam"),
}
_ALWAYS = ("ReadRoiRecord", "Norm2DImage", "ConvertImageFromHwcToChw", "RenameRecord")
_TRAIN = ("Pad2DImageBbox", "PyramidAnchorTarget2D")
_KNOWN = (*_ALWAYS, *_TRAIN, *RESIZES, "Flip2DImageBbox", "AverageFgCount")


@dataclass
class Input:
    """Settings read from the transforms."""

    resize: str
    flip: bool  # in training
    average: bool  # average the foreground counts over the devices
    sections: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_transform(transform: Any, is_train: bool) -> Input:
    """Return the settings of a transform list. Raises ValueError for an unsupported or missing transform."""
    batch = []
    if isinstance(transform, dict):
        transform, batch = transform.get("sample", []), transform.get("batch", [])
    parts = [*transform, *batch]
    foreign = [one for one in parts if not isinstance(one, Part) or one.name not in _KNOWN]
    if foreign:
        raise ValueError(f"transform: {foreign[0]!s:.200} is not supported; supported are {', '.join(_KNOWN)}")
    by_name = {part.name: part for part in parts}
    resizes = [name for name in by_name if name in RESIZES]
    missing = [name for name in (*_ALWAYS, *(_TRAIN if is_train else ())) if name not in by_name]
    empty = [name for name, part in by_name.items() if name in _SECTIONS and not part.args]
    if empty:
        raise ValueError(f"transform: {empty[0]} needs the argument {_SECTIONS[empty[0]]}")
    if missing or len(resizes) != 1:
        missing += [] if resizes else [f"one of {', '.join(RESIZES)}"]
        problem = f"{', '.join(missing)} is missing" if missing else f"both {' and '.join(resizes)} are present"
        raise ValueError(f"transform: {problem}; see SimpleDet's RetinaNet files for a complete list")
    found = Input(
        resize=resizes[0],
        flip="Flip2DImageBbox" in by_name or not is_train,
        average="AverageFgCount" in by_name,
        sections={_SECTIONS[name]: part.args[0] for name, part in by_name.items() if name in _SECTIONS},
    )
    if by_name["ReadRoiRecord"].args not in ((), (None,)):
        found.notes.append("ReadRoiRecord(gt_select) is ignored: only boxes and classes are read")
    mapping = by_name["RenameRecord"].args
    found.sections["RenameParam"] = type("RenameParam", (), {"mapping": mapping[0] if mapping else {}})
    return found


def file_transform(resize: str, fit: tuple[int, int], padded: tuple[int, int]) -> Callable[[Config, bool], Transform]:
    """Return the recipe's get_transform with images resized by the file's transform `resize` to fit into `fit`.

    The input size is `padded`. Both are (short, long).
    """
    train, test = RESIZES[resize]
    if fit == padded and train is RandResizeCrop2DImageBbox:
        return retina_transform

    def resized_transform(config: Config, is_train: bool) -> Transform:
        transform = retina_transform(config, is_train)
        transform.sample[1] = (train if is_train else test)(replace(config.ResizeParam, short=fit[0], long=fit[1]))
        return transform

    return resized_transform
