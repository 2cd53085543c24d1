"""The published schedule and the edges of each phase, computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.engine.schedule import LrSchedule

# 25 epochs of 100 steps: warm-up in steps 0..99, milestones at steps 1500 and 2000
PUBLISHED = LrSchedule(
    lr=0.08,
    iter_per_epoch=100,
    end_epoch=25,
    lr_epoch=(15.0, 20.0),
    lr_factor=0.1,
    warmup_epoch=1.0,
    warmup_lr_factor=0.1,
)


@pytest.mark.parametrize(
    "step, lr",
    [
        (0, 0.008),
        (50, 0.008 + 0.072 / 2),
        (99, 0.008 + 0.072 * 0.99),
        (100, 0.08),
        (1499, 0.08),
        (1500, 0.008),
        (1999, 0.008),
        (2000, 0.0008),
        (2499, 0.0008),
    ],
)
def test_published_schedule(step: int, lr: float) -> None:
    assert PUBLISHED.lr_at(step) == pytest.approx(lr, rel=1e-12)


def test_fractions_of_an_epoch_round_to_the_nearest_step() -> None:
    schedule = replace(PUBLISHED, iter_per_epoch=7, warmup_epoch=0.5, lr_epoch=(1.5,), end_epoch=2)
    # 0.5 * 7 = 3.5 and 1.5 * 7 = 10.5 round half to even: 4 and 10
    assert schedule.lr_at(3) == pytest.approx(0.08 * (0.1 + 0.9 * 3 / 4))
    assert schedule.lr_at(4) == 0.08
    assert schedule.lr_at(9) == 0.08
    assert schedule.lr_at(10) == pytest.approx(0.008)


def test_without_warmup_and_milestones_the_rate_is_constant() -> None:
    schedule = replace(PUBLISHED, warmup_epoch=0.0, lr_epoch=())
    assert {schedule.lr_at(step) for step in (0, 1, 2499)} == {0.08}


def test_describe_names_every_phase() -> None:
    assert PUBLISHED.describe() == [
        "epoch 0 to 1, steps 0 to 100 (100 iterations): lr 0.008 to 0.08 (warm-up)",
        "epoch 1 to 15, steps 100 to 1500 (1400 iterations): lr 0.08",
        "epoch 15 to 20, steps 1500 to 2000 (500 iterations): lr 0.008",
        "epoch 20 to 25, steps 2000 to 2500 (500 iterations): lr 0.0008",
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"warmup_epoch": 16.0},
        {"warmup_epoch": -1.0},
        {"lr_epoch": (20.0, 15.0)},
        {"lr_epoch": (15.0, 15.0)},
        {"lr_epoch": (15.0, 25.0)},
        {"end_epoch": 20},
    ],
    ids=str,
)
def test_phases_that_overlap_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="phases of the schedule overlap"):
        replace(PUBLISHED, **change)


def test_an_epoch_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        replace(PUBLISHED, iter_per_epoch=0)
