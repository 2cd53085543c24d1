"""The memory of a step and its budget; what autograd keeps is checked in tests/symbol/memory/test_recompute.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from config.load import load_config
from core.engine.step_memory import GIB, MIB, plan_recompute, step_memory
from core.report.dry_run import describe_run
from symbol.memory import count_activations
from tests.core.report.test_network_table import small_graph
from tests.small_config import DEMO, SMALL_NETWORK

CONFIGS = Path(__file__).parents[3] / "config" / "NASFPN"


def small(*overrides: str) -> Any:
    return load_config(DEMO, is_train=True, overrides=(*SMALL_NETWORK, *overrides))


def memory(config: Any, batch_image: int = 8) -> Any:
    return step_memory(config.ModelParam.train_symbol, config.ModelParam, batch_image, 128, 128)


def test_a_step_holds_parameters_three_times_and_activations() -> None:
    config = small()
    found = memory(config)
    arguments, _, _ = config.ModelParam.train_symbol.infer_shape(data=(8, 3, 128, 128))
    names = config.ModelParam.train_symbol.list_arguments()
    shapes = [shape for name, shape in zip(names, arguments, strict=True) if name != "data" and "rpn" not in name]
    assert found.num_parameter == sum(map(math.prod, shapes))
    assert found.plan is None
    total = 12 * found.num_parameter + found.counted.kept_bytes
    assert found.lines()[-1] == f"in total about {total / MIB:,.0f} MiB"
    # all but the batch statistics grows with the batch
    assert memory(config, 16).counted.kept_bytes == pytest.approx(2 * found.counted.kept_bytes, rel=1e-3)


def test_memonger_reports_its_effect() -> None:
    found = memory(small("ModelParam.memonger=True"))
    assert found.plan.peak_bytes < found.counted.kept_bytes
    lines = found.lines()
    assert lines[:-2] == memory(small()).lines()
    assert lines[-2] == found.plan.describe()
    total = 12 * found.num_parameter + found.plan.peak_bytes
    assert lines[-1] == f"with memonger in total about {total / MIB:,.0f} MiB"


def test_without_memonger_there_is_no_plan() -> None:
    config = small()
    assert plan_recompute(config.ModelParam.train_symbol, config.ModelParam, 8, 128, 128) is None


def test_until_reaches_the_plan() -> None:
    param = small("ModelParam.memonger=True", "ModelParam.memonger_until=stage1_unit2_relu").ModelParam
    plan = plan_recompute(param.train_symbol, param, 8, 128, 128)
    assert plan is not None
    assert plan.until == "stage1_unit2_relu"


def test_a_budget_counts_the_parameters_too() -> None:
    free = memory(small())
    least = memory(small("ModelParam.memonger=True"))
    budget = (12 * free.num_parameter + (free.counted.kept_bytes + least.plan.peak_bytes) / 2) / GIB
    found = memory(small("ModelParam.memonger=True", f"ModelParam.memonger_budget={budget}"))
    assert least.plan.peak_bytes < found.plan.peak_bytes <= budget * GIB - 12 * free.num_parameter
    assert found.plan.cost < least.plan.cost


def test_a_budget_that_cannot_be_met_is_an_error_with_the_least() -> None:
    least = memory(small("ModelParam.memonger=True"), 64)
    gib = math.ceil(100 * (12 * least.num_parameter + least.plan.peak_bytes) / GIB) / 100
    config = small("ModelParam.memonger=True", "ModelParam.memonger_budget=0.005")
    with pytest.raises(ValueError, match=f"expected at least {gib:.2f} GiB.* of 64 images .*got 0.005: raise it"):
        memory(config, 64)
    config = small("ModelParam.memonger=True", f"ModelParam.memonger_budget={gib}")
    assert memory(config, 64).plan is not None


@pytest.mark.parametrize("field", ["memonger_until=conv0", "memonger_budget=4"])
def test_until_and_budget_require_memonger(field: str) -> None:
    name = field.split("=")[0]
    with pytest.raises(ValueError, match=rf"ModelParam.{name} is .*, but ModelParam.memonger is False; write"):
        small(f"ModelParam.{field}")
    with pytest.raises(ValueError, match=r"memonger_budget: expected more than 0 \(GiB\), got 0"):
        small("ModelParam.memonger=True", "ModelParam.memonger_budget=0")


def test_a_dry_run_shows_the_effect_in_the_precision_of_the_run() -> None:
    path = CONFIGS / "retina_r50v1b_fpn_640_1@256_25epoch.py"
    text = describe_run(load_config(path, is_train=True, overrides=("ModelParam.memonger=True",)))
    assert "Memory per step on each device (8 images, activations in float16)" in text
    assert "memonger: recomputed up to " in text
    assert "% more multiply-adds per step" in text
    plain = describe_run(load_config(path, is_train=True, overrides=("General.fp16=False",)))
    assert "activations in float32" in plain
    assert "memonger" not in plain


def test_activations_by_hand() -> None:
    counted = count_activations(small_graph(), {"data": (1, 3, 512, 512)})
    # data, conv0's output, relu0's, conv1's, relu1's (for C6 and the fine head), C6's (for the coarse head)
    kept = 3 * 512**2 + 2 * 4 * 256**2 + 2 * 8 * 256**2 + 8 * 128**2
    index = 8 * 8 * 128**2  # the positions of C6's maxima, eight bytes each
    statistics = 8 * (4 + 8)  # a batch's mean and deviation
    assert counted.kept_bytes == 4 * kept + index + statistics
