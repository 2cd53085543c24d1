"""Numbers of training steps: read from the device, checked, averaged over the ranks, and logged.

L losses of the train graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from core.distributed.process_group import LostProcessError
from core.engine.device import peak_memory
from core.engine.precision import LossScaleState
from core.protocol import StepRecord, Trainer
from core.report.train_log import NoLog, TrainLog
from core.run.experiment import experiment_folder
from core.weights.checkpoint import latest

MIB = 2**20
NORM = "gradient norm"
METRIC_KEYS = {"FGAcc": "fg_acc"}  # the log's names


def log_steps(log: TrainLog | NoLog, trainer: Trainer, pending: Sequence[StepRecord]) -> None:
    """Read the numbers of the pending steps, which waits for the device, and log their means over steps and ranks.

    Raises FloatingPointError for numbers that are not finite.
    """
    names = [name.removesuffix("_output") for name in trainer.config.ModelParam.train_symbol.list_outputs()]
    values = torch.stack([record.values for record in pending]).double().cpu()  # (steps, L + 1)
    scale = trainer.loss_scale()
    counted = torch.ones(len(pending), dtype=torch.bool)
    if scale is not None and not scale.is_lost:  # skipped steps do not count
        counted = ~torch.stack([record.found_inf for record in pending if record.found_inf is not None]).cpu()
    values = values[counted]
    records = [record for record, counts in zip(pending, counted, strict=True) if counts]
    _require_finite(trainer, records, [*names, NORM], values, scale)
    scores = {}
    for metric, _ in trainer.metrics:
        name, score = metric.get()
        scores[METRIC_KEYS.get(name, name)] = score
        metric.reset()
    num_image = torch.tensor(float(sum(len(record.files) for record in pending)), dtype=torch.float64)
    numbers = dict(zip([*names, "grad_norm"], values.mean(dim=0), strict=True))
    # a rank without foreground has no score: the mean is over those that have one
    known = torch.tensor([[score, 1.0] if math.isfinite(score) else [0.0, 0.0] for score in scores.values()])
    known = known.reshape(-1, 2).double()
    trainer.group.all_reduce_mean_([*numbers.values(), num_image, known], on_cpu=True)
    means = {"lr": pending[-1].lr} | {name: value.item() for name, value in numbers.items()}
    means |= {name: (total / share).item() for name, (total, share) in zip(scores, known, strict=True)}
    if scale is not None:
        means |= {"loss_scale": scale.value, "skipped": scale.skipped}
    means["memory_mib"] = peak_memory(trainer.device) / MIB
    log.steps(pending[-1].step + 1, round(num_image.item() * trainer.group.world_size), means)


def _require_finite(
    trainer: Trainer, records: list[StepRecord], names: list[str], values: Tensor, scale: LossScaleState | None
) -> None:
    """Raise FloatingPointError for the first step with a number that is not finite.

    names: those of the columns of values (steps, L + 1), the gradient norm last. A loss that is not finite spoils the
    gradients of all ranks: the error to report is that of the rank with the loss.
    """
    own = not bool(values[:, :-1].isfinite().all())
    others = trainer.group.any_rank(own) and not own
    for record, row in zip(records, values.tolist(), strict=True):
        if not all(map(math.isfinite, row)):
            if others:
                raise LostProcessError("another process stops, as its loss is not finite")
            raise FloatingPointError(_not_finite(trainer, record, dict(zip(names, row, strict=True)), scale))


def _not_finite(trainer: Trainer, record: StepRecord, values: dict[str, float], scale: LossScaleState | None) -> str:
    shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    newest = latest(experiment_folder(trainer.config))
    kept = f"the newest checkpoint is {newest.weights}" if newest else "there is no checkpoint yet"
    where = f" on rank {trainer.group.rank}" if trainer.group.world_size > 1 else ""
    half = ""
    if scale is not None:
        where += f", one of {scale.skipped_in_a_row} consecutive skipped steps" if record.found_inf else ""
        where += f" (float16, loss scale {scale.value:g})"
        half = ", or bfloat16 (General.bf16)"
    return (
        f"not finite at step {record.step}{where}: {shown}; learning rate {record.lr:.6g}; "
        f"images {', '.join(record.files)}. Nothing was overwritten, {kept}. Try a lower OptimizeParam.optimizer.lr, "
        f"a longer OptimizeParam.warmup.epoch, or OptimizeParam.optimizer.clip_gradient{half}"
    )
