"""Training: a config in, checkpoints and a log out. L losses of the train graph."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import symbol as S
from core.checkpoint import Checkpoint, Progress, epoch_stem, latest, read_tensors, save_checkpoint, step_stem
from core.coco_index import open_index
from core.device import peak_memory, place, select_device, to_device
from core.evaluation import STAT_NAMES
from core.experiment import experiment_folder, find_start, store_config
from core.first_weights import load_first_weights
from core.image_set import resolve
from core.inference import build_test_module, test_image_set
from core.loader import TrainLoader, make_train_loader
from core.optimizer import SGD, multipliers
from core.schedule import LrSchedule
from core.stop_request import StopRequest
from core.train_log import TrainLog
from operator_cxx import library
from symbol.passes import without_fp16

if TYPE_CHECKING:
    from config.schema import Config

MIB = 2**20
METRIC_KEYS = {"FGAcc": "fg_acc"}  # the log's names


@dataclass(frozen=True)
class StepRecord:
    """A step, with numbers that are still on the device."""

    step: int
    lr: float
    files: list[str]
    values: Tensor  # (L + 1,) the losses and the gradient norm


@dataclass(frozen=True)
class Trainer:
    """What a training step needs."""

    config: Config
    device: torch.device
    module: nn.Module
    optimizer: SGD
    schedule: LrSchedule
    metrics: list[tuple[Any, slice]]  # each with the span of its outputs among the module's

    def step(self, batch: dict[str, Any], step: int) -> StepRecord:
        """One update. What it computes stays on the device; the losses are not waited for."""
        graph, lr = self.config.ModelParam.train_symbol, self.schedule.lr_at(step)
        for transform in self.config.transform.batch:
            transform.apply(batch)
        outputs = self.module(**{name: batch[name] for name in self.config.data_name + self.config.label_name})
        losses = torch.stack([loss.reshape(()) for loss in outputs[: len(graph)]])  # (L,)
        self.optimizer.zero_grad()
        losses.sum().backward()
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        self.optimizer.step(lr)
        for metric, span in self.metrics:
            labels = [batch[name] for name in metric.label_names]
            metric.update(labels, [output.detach() for output in outputs[span]])
        return StepRecord(step, lr, batch["files"], torch.cat([losses.detach(), norm.reshape(1)]))


def fit(config: Config, config_text: str, resume: bool = False) -> None:
    """Train from the first step, or from the newest checkpoint, to OptimizeParam.schedule.end_epoch.

    config_text is stored with the experiment. Raises ValueError, before anything is written, for an experiment folder
    that holds another run, for data or weights that do not fit; FloatingPointError for a loss that is not finite.
    SIGINT and SIGTERM end it after the step, with a checkpoint.
    """
    device = select_device(config.KvstoreParam.gpus)
    start = find_start(config, resume)
    loader = make_train_loader(config)
    _check_evaluation(config)
    trainer, notes = build_trainer(config, device, loader.iter_per_epoch, start)
    step = _first_step(start, loader)
    loader.start_step, loader.end_step = step, config.OptimizeParam.schedule.end_epoch * loader.iter_per_epoch
    notes += store_config(config, config_text)
    log = TrainLog(experiment_folder(config), step, loader.end_step, loader.iter_per_epoch)
    pending = []  # steps whose numbers the host has not read yet
    with StopRequest() as stop, log:
        for note in [*library.notes, *notes, *_describe(config, loader, trainer)]:
            log.info(note)
        batches = iter(loader)
        stopping = False
        while step < loader.end_step and not stopping:
            began = time.perf_counter()
            batch = to_device(next(batches), device)
            log.waited(time.perf_counter() - began)
            pending.append(trainer.step(batch, step))
            step += 1
            stopping, end_of_epoch = stop.requested, step % loader.iter_per_epoch == 0
            if end_of_epoch or stopping or step % config.General.log_frequency == 0:
                _log_steps(log, trainer, pending)  # waits for the device, and refuses what is not finite
                pending = []
            if end_of_epoch or stopping:
                _save(trainer, loader, step, log)
            if end_of_epoch and _is_evaluated(config, step // loader.iter_per_epoch):
                _evaluate(trainer, step, loader.iter_per_epoch, log)
                log.restart_clock()
        if step < loader.end_step:
            log.info(f"stopped after step {step}; the same command with --resume goes on from there")


def build_trainer(
    config: Config, device: torch.device, iter_per_epoch: int, start: Checkpoint | None
) -> tuple[Trainer, list[str]]:
    """The network with its first weights, the optimizer and the schedule; and lines for the log."""
    graph, optimizer_param = config.ModelParam.train_symbol, config.OptimizeParam.optimizer
    internals = graph.get_internals()
    watched = [internals[name] for metric in config.metric_list for name in metric.output_names]
    module = S.lower(without_fp16(S.Group([graph, *watched])), seed=config.General.seed)
    notes = load_first_weights(module, config, start)
    if config.General.fp16:
        notes.append("General.fp16 is set; this run computes in float32")
    place(module, device).train()
    fixed = () if config.ModelParam.from_scratch else tuple(config.ModelParam.pretrain.fixed_param)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.startswith(fixed))
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = SGD(
        trained.items(),
        *multipliers(graph.attr_dict(), trained),
        momentum=optimizer_param.momentum,
        wd=optimizer_param.wd,
        clip_gradient=optimizer_param.clip_gradient,
    )
    if start is not None:
        optimizer.load_state_dict(read_tensors(start.state))
    metrics, position = [], len(graph)
    for metric in config.metric_list:
        metrics.append((metric, slice(position, position + len(metric.output_names))))
        position += len(metric.output_names)
    return Trainer(config, device, module, optimizer, build_schedule(config, iter_per_epoch), metrics), notes


def build_schedule(config: Config, iter_per_epoch: int) -> LrSchedule:
    """The config's learning rate in steps."""
    optimize = config.OptimizeParam
    assert optimize.optimizer.lr is not None
    return LrSchedule(
        lr=optimize.optimizer.lr,
        iter_per_epoch=iter_per_epoch,
        end_epoch=optimize.schedule.end_epoch,
        lr_epoch=optimize.schedule.lr_epoch,
        lr_factor=optimize.schedule.lr_factor,
        warmup_epoch=optimize.warmup.epoch,
        warmup_lr_factor=optimize.warmup.lr_factor,
    )


def _first_step(start: Checkpoint | None, loader: TrainLoader) -> int:
    if start is None:
        return 0
    before, seed = start.progress, loader.dataset.seed
    if (before.iter_per_epoch, before.seed) != (loader.iter_per_epoch, seed):
        raise ValueError(
            f"{start.weights} was trained with {before.iter_per_epoch} steps an epoch and seed {before.seed}; now an "
            f"epoch has {loader.iter_per_epoch} steps and the seed is {seed}: resume with the batch size, the images "
            "and the seed that it was trained with"
        )
    return before.step


def _describe(config: Config, loader: TrainLoader, trainer: Trainer) -> list[str]:
    dataset = loader.dataset
    names = dataset.class_names
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return [
        f"{dataset.num_image} images, {len(dataset)} samples an epoch, {loader.iter_per_epoch} steps; "
        f"{len(names)} classes: {shown}",
        *trainer.schedule.describe(),
    ]


def _log_steps(log: TrainLog, trainer: Trainer, pending: list[StepRecord]) -> None:
    """Read the numbers of the pending steps from the device, refuse those that are not finite, and log their means."""
    names = [name.removesuffix("_output") for name in trainer.config.ModelParam.train_symbol.list_outputs()]
    values = torch.stack([record.values for record in pending]).double().cpu()  # (steps, L + 1)
    for record, row in zip(pending, values.tolist(), strict=True):
        if not all(map(math.isfinite, row)):
            raise FloatingPointError(
                _not_finite(trainer, record, dict(zip([*names, "gradient norm"], row, strict=True)))
            )
    means = dict(zip([*names, "grad_norm"], values.mean(dim=0).tolist(), strict=True))
    scores = {}
    for metric, _ in trainer.metrics:
        name, score = metric.get()
        scores[METRIC_KEYS.get(name, name)] = score
        metric.reset()
    num_image = sum(len(record.files) for record in pending)
    numbers = {"lr": pending[-1].lr, **means, **scores, "memory_mib": peak_memory(trainer.device) / MIB}
    log.steps(pending[-1].step + 1, num_image, numbers)


def _not_finite(trainer: Trainer, record: StepRecord, values: dict[str, float]) -> str:
    shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    newest = latest(experiment_folder(trainer.config))
    kept = f"the newest checkpoint is {newest.weights}" if newest else "there is no checkpoint yet"
    return (
        f"not finite at step {record.step}: {shown}; learning rate {record.lr:.6g}; "
        f"images {', '.join(record.files)}. Nothing was overwritten, {kept}. Try a lower OptimizeParam.optimizer.lr, "
        "a longer OptimizeParam.warmup.epoch, or OptimizeParam.optimizer.clip_gradient"
    )


def _save(trainer: Trainer, loader: TrainLoader, step: int, log: TrainLog) -> None:
    epoch, inside = divmod(step, loader.iter_per_epoch)
    general = trainer.config.General
    progress = Progress(
        epoch=epoch,
        step=step,
        seed=general.seed,
        experiment=str(general.name),
        iter_per_epoch=loader.iter_per_epoch,
        class_names=loader.dataset.class_names,
    )
    stem = step_stem(step) if inside else epoch_stem(epoch)
    folder = experiment_folder(trainer.config)
    saved = save_checkpoint(folder, stem, trainer.module.state_dict(), trainer.optimizer.state_dict(), progress)
    log.info(f"wrote {saved.weights}")


def _check_evaluation(config: Config) -> None:
    """Raises FileNotFoundError or ValueError where the evaluation between epochs would find no data."""
    test = config.TestParam
    if test.eval_epoch and test.eval_image_set is not None:
        open_index(resolve(test.eval_image_set, config.DatasetParam.data_root))
    if test.eval_epoch and test.coco.annotation is not None and not Path(test.coco.annotation).is_file():
        raise FileNotFoundError(f"TestParam.coco.annotation: no file {test.coco.annotation}")


def _is_evaluated(config: Config, epoch: int) -> bool:
    return config.TestParam.eval_epoch > 0 and epoch % config.TestParam.eval_epoch == 0


def _evaluate(trainer: Trainer, step: int, iter_per_epoch: int, log: TrainLog) -> None:
    config, image_set = trainer.config, trainer.config.TestParam.eval_image_set
    assert image_set is not None  # config.check
    module = build_test_module(config, trainer.module.state_dict(), trainer.device, "training")
    tested = test_image_set(config, module, image_set, experiment_folder(config), trainer.device)
    if tested.evaluation is None:
        log.info(f"wrote {tested.result}; the image set has no annotations to evaluate against")
        return
    stats = dict(zip(STAT_NAMES, tested.evaluation.stats, strict=True))
    log.event("eval", step=step, epoch=step // iter_per_epoch, **stats)
    log.info(f"epoch {step // iter_per_epoch}: " + ", ".join(f"{name} {value:.3f}" for name, value in stats.items()))
