"""Shipped config files: each loads in both phases and agrees with its name and docstring."""

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import symbol
from config.load import load_config
from tests.small_config import NARROW

FOLDER = Path(__file__).parents[2] / "config"
FILES = sorted(FOLDER.glob("*/retina_*.py"))
SMALL = [
    *NARROW,
    "KvstoreParam.gpus=cpu",
    "General.fp16=False",
    "ResizeParam.short=128",
    "ResizeParam.long=128",
    "BackboneParam.depth=18",
    "RpnParam.proposal.pre_nms_top_n=100",
]
CLASSES = ["circle", "cross", "ring", "square", "star", "triangle"]
PUBLISHED = {  # neck, input, images per GPU, normalisation and its weight decay, synced loss, AP (None: not published)
    "retina_r50v1b_fpn_640_1@256_25epoch": ("RetinaNetNeckWithBN", 640, 8, "localbn", 0.0, False, "37.4"),
    "retina_r50v1b_nasfpn_640_7@256_25epoch": ("NASFPNNeck", 640, 8, "localbn", 1.0, False, "40.1"),
    "retina_r50v1b_nasfpn_1024_7@256_25epoch": ("NASFPNNeck", 1024, 4, "syncbn", 1.0, False, "44.2"),
    "retina_r50v1b_nasfpn_1280_7@384_25epoch": ("NASFPNNeck", 1280, 2, "syncbn", 1.0, True, "45.3"),
    "retina_r50v1b_tdbu_1280_3@384_25epoch": ("TopDownBottomUpFPNNeck", 1280, 3, "syncbn", 1.0, True, "44.7"),
    "retina_r50v1b_tdbu_640_3@384_25epoch": ("PAFPNNeckP3P7", 640, 8, "localbn", 0.0, False, None),
}


@pytest.fixture
def data_root(write_annotation: Callable[..., Path]) -> str:
    write_annotation("demo_train", CLASSES)
    return f"DatasetParam.data_root={write_annotation('demo_val', CLASSES)}"


def test_the_published_configs_are_there() -> None:
    assert set(PUBLISHED) <= {file.stem for file in FILES}


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_loads_and_its_shapes_agree(file: Path, is_train: bool, data_root: str) -> None:
    config = load_config(file, is_train, [data_root])
    assert config.General.name == file.stem
    size, repeats, width = re.search(r"_(\d+)_(\d+)@(\d+)_", file.stem).groups()
    assert (config.ResizeParam.short, config.ResizeParam.long) == (int(size), int(size))
    assert (config.NeckParam.num_stage, config.NeckParam.dim_reduced) == (int(repeats), int(width))
    assert f"_r{config.BackboneParam.depth}v1b_" in file.stem

    num_class = config.RpnParam.num_class
    side, num_base_anchor = int(size), 9
    cells = sum((side // stride) ** 2 for stride in (8, 16, 32, 64, 128))
    if is_train:
        _, outputs, _ = config.ModelParam.train_symbol.get_internals()["cls_logit_concat_output"].infer_shape(
            data=(2, 3, side, side)
        )
        assert outputs == [(2, cells * num_base_anchor, num_class - 1)]
    else:
        candidates = config.ModelParam.test_symbol.infer_shape(data=(2, 3, side, side), im_info=(2, 3))[1]
        assert candidates[0][2] == num_class
        assert candidates[1] == (*candidates[0][:2], 4)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_takes_a_step_and_predicts(file: Path, data_root: str) -> None:
    train, test = (load_config(file, is_train, [*SMALL, data_root]) for is_train in (True, False))
    record = {
        "image": torch.randint(0, 256, (2, 128, 128, 3), generator=torch.Generator().manual_seed(0)).byte(),
        "im_info": torch.tensor([[128.0, 128.0, 1.0], [96.0, 128.0, 0.5]]),
        "gt_bbox": torch.full((2, 100, 5), -1.0),
    }
    record["gt_bbox"][0, 0] = torch.tensor([8.0, 8.0, 71.0, 71.0, 1.0])
    for transform in train.transform.batch:
        transform.apply(record)
    inputs = {name: record[name] for name in (*train.data_name, *train.label_name)}
    shapes = {name: tuple(value.shape) for name, value in inputs.items()}
    model = symbol.lower(train.ModelParam.train_symbol, **shapes).train()
    loss = torch.stack(model(**inputs))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert (loss > 0).all()
    assert dict(model.named_parameters())["stage4_unit1_conv1_weight"].grad.abs().sum() > 0

    inputs = {name: record[name] for name in test.data_name}
    shapes = {name: tuple(value.shape) for name, value in inputs.items()}
    model = symbol.lower(test.ModelParam.test_symbol, **shapes).eval()
    with torch.no_grad():
        score, bbox = model(**inputs)
    assert score.shape == (2, 5 * 100, test.RpnParam.num_class)
    assert bbox.shape == (2, 5 * 100, 4)


@pytest.mark.parametrize("stem", PUBLISHED)
def test_the_published_settings(stem: str, data_root: str) -> None:
    neck, size, batch_image, normalizer, wd_mult, sync_loss, ap = PUBLISHED[stem]
    file = FOLDER / "NASFPN" / f"{stem}.py"
    train = load_config(file, True, [data_root])
    assert train.ResizeParam.short == train.ResizeParam.long == size
    assert train.KvstoreParam.batch_image == batch_image
    assert (train.NormalizeParam.type, train.NormalizeParam.wd_mult) == (normalizer, wd_mult)
    assert train.ModelParam.neck.__name__ == neck
    assert train.RpnParam.sync_loss is sync_loss
    assert len(train.KvstoreParam.gpus) == 8
    assert train.OptimizeParam.optimizer.lr == pytest.approx(0.01 * batch_image)  # 8 GPUs, 0.01 per 8 images
    assert train.DatasetParam.image_set == ("coco_train2017", "coco_val2017")
    assert load_config(file, False, [data_root]).DatasetParam.image_set == ("coco_test-dev2017",)
    record = f"{ap} (published)" if ap else "not published"
    assert record in ast.get_docstring(ast.parse(file.read_text()))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_file_is_short_and_carries_its_record(file: Path) -> None:
    tree = ast.parse(file.read_text())
    record = ast.get_docstring(tree)
    assert f"--config {file.relative_to(FOLDER.parent)}" in record
    code = [line for line in file.read_text().splitlines()[tree.body[0].end_lineno :] if line.strip()]
    assert len(code) <= 15
