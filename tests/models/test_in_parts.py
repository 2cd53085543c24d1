"""A whole detector on parts of a batch: in two processes, and without images."""

import pytest
import torch

import symbol as S
from config.load import load_config
from operator_cxx import library
from symbol.passes import prepare, without_gradient
from tests.small_config import DEMO, NARROW
from tests.two_processes import run_in_processes

SYNCED = [*NARROW, "NormalizeParam.type=syncbn", "RpnParam.sync_loss=True"]
BOXES = [(8, 8, 71, 71, 1), (30, 20, 60, 90, 3), (64, 64, 120, 127, 2), (10, 70, 40, 100, 6)]


def step(images, overrides):
    """Return losses, gradients and moving statistics of the given images out of four, in float64."""
    config = load_config(str(DEMO), True, overrides)
    record = {
        "image": torch.randint(0, 256, (4, 128, 128, 3), generator=torch.Generator().manual_seed(0)).byte(),
        "im_info": torch.tensor([[128.0, 128.0, 1.0]] * 4),
        "gt_bbox": torch.tensor(BOXES).float()[:, None],
    }
    record = {name: value[images] for name, value in record.items()}
    for transform in config.transform.batch:
        transform.apply(record)
    inputs = {name: record[name].double() for name in (*config.data_name, *config.label_name)}
    module = S.lower(config.ModelParam.train_symbol, data=(4, 3, 128, 128)).double().train()
    losses = torch.stack(module(**inputs))
    losses.sum().backward()
    without = without_gradient(prepare(config.ModelParam.train_symbol)[1])
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if name not in without}
    return losses.detach(), gradients, dict(module.named_buffers())


def part(rank, parts):
    return step(parts[rank], SYNCED)


@pytest.mark.parametrize("parts", [([0, 1], [2, 3]), ([0, 1, 2, 3], [])], ids=["halves", "all and none"])
def test_two_processes_equal_one(parts):
    losses, gradients, moving = step([0, 1, 2, 3], SYNCED)
    ranks = run_in_processes(part, parts)
    assert (losses > 0).all()
    torch.testing.assert_close((ranks[0][0] + ranks[1][0]) / 2, losses, rtol=1e-6, atol=0)
    for name, whole in gradients.items():
        mean = (ranks[0][1][name] + ranks[1][1][name]) / 2
        assert (mean - whole).abs().max() <= 1e-5 * whole.abs().max() + 1e-9, name
    for _, _, own in ranks:
        for name, whole in moving.items():
            torch.testing.assert_close(own[name], whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "plain torch"])
@pytest.mark.parametrize("overrides", [NARROW, SYNCED], ids=["local", "synced"])
def test_no_images_give_no_loss_and_no_gradient(overrides, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(library, "loaded", {})
    losses, gradients, _ = step([], overrides)
    assert losses.tolist() == [0.0, 0.0]
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert not gradient.any(), name
