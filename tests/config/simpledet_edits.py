"""Variants of the demo's SimpleDet file, made by text edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from config.load import load_config
from config.schema import Config

DEMO = Path(__file__).with_name("simpledet_demo.py")
Edit = tuple[str, str]
Load = Callable[..., Config]

COCO: tuple[Edit, ...] = (
    ('image_set = ("demo_train",) if', 'image_set = ("coco_train2017", "coco_val2017") if'),
    ('else ("demo_val",)', 'else ("coco_test-dev2017",)'),
    ("1 + 6", "1 + 80"),
    ("gpus = [0]", "gpus = [0, 1, 2, 3, 4, 5, 6, 7]"),
    ("depth = 18", "depth = 50"),
    ("from_scratch = True", "from_scratch = False"),
    ("end_epoch = 3", "end_epoch = 25"),
    ("[2000 // images_per_step]", "[244436 * epoch // images_per_step for epoch in (15, 20)]"),
    ("iter = 400 //", "iter = 244436 //"),
    ('"data/demo/annotations/instances_val.json"', '"data/coco/annotations/instances_val2017.json"'),
)
NO_FLIP: Edit = ("            Flip2DImageBbox(),\n", "")
SIDES_800_1333: tuple[Edit, ...] = (
    ("short = 128", "short = 800"),
    ("long = 128", "long = 1333"),
    ("short = (16, 8, 4, 2, 1)", "short = (100, 50, 25, 13, 7)"),
    ("long = (16, 8, 4, 2, 1)", "long = (167, 84, 42, 21, 11)"),
    ("        scale_min = 0.8\n        scale_max = 1.2\n", ""),
    ("import RandResizeCrop2DImageBbox, ResizeCrop2DImageBbox", "import ResizeCrop2DImageBbox"),
    ("            RandResizeCrop2DImageBbox(", "            Resize2DImageBbox("),
    ("        Pad2DImageBbox,\n", "        Pad2DImageBbox, Resize2DImageBbox,\n"),
)


def network(batch_image: int, size: int, dim: int, stages: int = 7) -> tuple[Edit, ...]:
    sides = tuple(size // stride for stride in (8, 16, 32, 64, 128))
    return (
        ("batch_image = 8 if", f"batch_image = {batch_image} if"),
        ("short = 128", f"short = {size}"),
        ("long = 128", f"long = {size}"),
        ("short = (16, 8, 4, 2, 1)", f"short = {sides}"),
        ("long = (16, 8, 4, 2, 1)", f"long = {sides}"),
        ("dim_reduced = 48", f"dim_reduced = {dim}"),
        ("num_stage = 2", f"num_stage = {stages}"),
    )


def loader(folder: Path) -> Load:
    """Return a function that loads the demo's file with edits from `folder`, without data."""

    def load(*edits: Edit, is_train: bool = True, overrides: Sequence[str] = (), name: str = "one@file") -> Config:
        text = DEMO.read_text()
        for old, new in edits:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path = folder / f"{name}.py"
        path.write_text(text)
        return load_config(path, is_train, [f"DatasetParam.data_root={folder / 'none'}", *overrides])

    return load
