"""Training: a config in, checkpoints and a log out. L losses of the train graph."""

from __future__ import annotations

import math
import os
import time
from contextlib import ExitStack
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
from core.experiment import experiment_folder, find_start, lock_experiment, store_config
from core.first_weights import load_first_weights
from core.gradients import GradientAverage
from core.image_set import resolve
from core.inference import build_test_module, test_image_set
from core.loader import TrainLoader, make_train_loader
from core.optimizer import SGD, multipliers
from core.sample_order import Position
from core.schedule import LrSchedule
from core.stop_request import StopRequest
from core.train_log import NoLog, TrainLog
from core.world import ALONE, LostProcessError, World, join, launched_size
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
    world: World = ALONE
    average: GradientAverage | None = None  # of several processes

    def step(self, batch: dict[str, Any], step: int) -> StepRecord:
        """One update. What it computes stays on the device; the losses are not waited for."""
        graph, lr = self.config.ModelParam.train_symbol, self.schedule.lr_at(step)
        for transform in self.config.transform.batch:
            transform.apply(batch)
        outputs = self.module(**{name: batch[name] for name in self.config.data_name + self.config.label_name})
        losses = torch.stack([loss.reshape(()) for loss in outputs[: len(graph)]])  # (L,)
        self.optimizer.zero_grad()
        self._backward(losses.sum())
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        self.optimizer.step(lr)
        for metric, span in self.metrics:
            labels = [batch[name] for name in metric.label_names]
            metric.update(labels, [output.detach() for output in outputs[span]])
        return StepRecord(step, lr, batch["files"], torch.cat([losses.detach(), norm.reshape(1)]))

    def _backward(self, loss: Tensor) -> None:
        """Gradients, and moving statistics of local BN, averaged over the processes."""
        if self.average is None:
            loss.backward()
            return
        self.average.begin()
        loss.backward()
        self.average.finish()
        if self.config.NormalizeParam.type == "localbn":
            self.world.mean_(list(self.module.buffers()))


def check_run(config: Config, resume: bool) -> None:
    """What can be known before the processes of a run start: its devices, its folder, its data.

    Raises ValueError and OSError as `fit` does.
    """
    select_device(config.KvstoreParam.gpus)
    if config.KvstoreParam.machines > 1:
        raise ValueError(
            f"KvstoreParam.machines is {config.KvstoreParam.machines}: start detection_train.py on every machine with "
            f"torchrun --nnodes {config.KvstoreParam.machines} --nproc-per-node "
            f"{config.KvstoreParam.num_device // config.KvstoreParam.machines} --rdzv-backend c10d --rdzv-endpoint HOST"
        )
    find_start(config, resume)
    make_train_loader(config)  # which also makes the index, once
    _check_evaluation(config)


def fit(config: Config, config_text: str, resume: bool = False) -> None:
    """Train from the first step, or from the newest checkpoint, to OptimizeParam.schedule.end_epoch.

    config_text is stored with the experiment. In a process that a launcher started, this is one of
    KvstoreParam.num_device that train together. Raises ValueError, before anything is written, for an experiment folder
    that holds another run, for data or weights that do not fit; FloatingPointError for a loss that is not finite;
    LostProcessError where another process died or stalled. SIGINT and SIGTERM end it after the step, with a checkpoint.
    """
    launched, wanted = launched_size() or 1, config.KvstoreParam.num_device
    if launched != wanted:
        raise ValueError(
            f"the launcher started {launched} processes, and the config is for {wanted} devices (KvstoreParam.gpus, "
            "processes, machines): start as many, one a device, or change the config with --gpus or --set"
        )
    device = select_device(config.KvstoreParam.gpus, int(os.environ.get("LOCAL_RANK", "0")))
    with join(device) as world:
        _train(config, config_text, resume, device, world)


def _train(config: Config, config_text: str, resume: bool, device: torch.device, world: World) -> None:
    start = find_start(config, resume)
    loader = make_train_loader(config, rank=world.rank, size=world.size)
    _check_evaluation(config)
    trainer, built = build_trainer(config, device, loader.iter_per_epoch, start, world)
    step = _first_step(start, loader)
    if world.size > 1:
        weights = sum(p.detach().double().sum().item() for p in trainer.module.parameters())
        world.require_equal({"first step": step, "samples an epoch": len(loader.dataset), "first weights": weights})
    loader.end_step = config.OptimizeParam.schedule.end_epoch * loader.iter_per_epoch
    notes, folder = [*library.notes, *built], experiment_folder(config)
    with ExitStack() as held:
        log: TrainLog | NoLog = NoLog()
        if world.is_first:
            notes += held.enter_context(lock_experiment(folder))
            notes += store_config(config, config_text)
            log = held.enter_context(TrainLog(folder, step, loader.end_step, loader.iter_per_epoch))
        for note in [*notes, *_describe(config, loader, trainer)]:
            log.info(note)
        _run_steps(trainer, loader, step, log)


def _run_steps(trainer: Trainer, loader: TrainLoader, step: int, log: TrainLog | NoLog) -> None:
    """Steps from `step` to the loader's end, or until a process is asked to stop."""
    config, world = trainer.config, trainer.world
    assert loader.end_step is not None
    pending: list[StepRecord] = []  # steps whose numbers the host has not read yet
    with StopRequest(launched=launched_size() is not None) as stop:
        batches, saved_at = iter(loader), time.monotonic()
        stopping = False
        while step < loader.end_step and not stopping:
            began = time.perf_counter()
            world.doing(f"reading the images of step {step}")
            batch = to_device(next(batches), trainer.device)
            log.waited(time.perf_counter() - began)
            for path, reason in batch["skipped"]:
                told = log.info if world.is_first else print
                told(f"rank {world.rank} skipped {path}: {reason}")
            world.doing(f"computing step {step} on {', '.join(batch['files']) or 'no image'}")
            pending.append(trainer.step(batch, step))
            step += 1
            world.doing(f"waiting for the others after step {step}")
            stopping, end_of_epoch = world.any(stop.requested), step % loader.iter_per_epoch == 0
            saving = end_of_epoch or stopping or _is_due(config, saved_at, world)
            if saving or step % config.General.log_frequency == 0:
                _log_steps(log, trainer, pending)  # waits for the device, and refuses what is not finite
                pending = []
            if saving and world.is_first:
                _save(trainer, loader, step, log)
            saved_at = time.monotonic() if saving else saved_at
            if end_of_epoch and _is_evaluated(config, step // loader.iter_per_epoch):
                _evaluate(trainer, step, loader.iter_per_epoch, log)
                log.restart_clock()
        if step < loader.end_step:
            log.info(f"stopped after step {step}; the same command with --resume goes on from there")


def build_trainer(
    config: Config, device: torch.device, iter_per_epoch: int, start: Checkpoint | None, world: World = ALONE
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
    schedule = build_schedule(config, iter_per_epoch)
    average = GradientAverage(module.parameters(), world) if world.size > 1 else None
    return Trainer(config, device, module, optimizer, schedule, metrics, world, average), notes


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
    """The step to begin with, which the loader is set to. Another number of images a step than before counts anew."""
    if start is None:
        return 0
    before, seed, num_sample = start.progress, loader.dataset.seed, len(loader.dataset)
    if (before.num_sample, before.seed) != (num_sample, seed):
        raise ValueError(
            f"{start.weights} was trained with {before.num_sample} samples an epoch and seed {before.seed}; now an "
            f"epoch has {num_sample} samples and the seed is {seed}: resume with the images and the seed that it was "
            "trained with"
        )
    loader.start = Position(before.epoch, before.sample, before.portrait)
    return loader.start_step


def _describe(config: Config, loader: TrainLoader, trainer: Trainer) -> list[str]:
    dataset = loader.dataset
    names = dataset.class_names
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return [
        f"{dataset.num_image} images, {len(dataset)} samples an epoch, {loader.iter_per_epoch} steps; "
        f"{len(names)} classes: {shown}",
        *trainer.schedule.describe(),
    ]


def _log_steps(log: TrainLog | NoLog, trainer: Trainer, pending: list[StepRecord]) -> None:
    """Read the numbers of the pending steps from the device, refuse those that are not finite, and log their means."""
    names = [name.removesuffix("_output") for name in trainer.config.ModelParam.train_symbol.list_outputs()]
    values = torch.stack([record.values for record in pending]).double().cpu()  # (steps, L + 1)
    _require_finite(trainer, pending, dict(zip([*names, "gradient norm"], values.unbind(1), strict=True)))
    scores = {}
    for metric, _ in trainer.metrics:
        name, score = metric.get()
        scores[METRIC_KEYS.get(name, name)] = score
        metric.reset()
    num_image = torch.tensor(float(sum(len(record.files) for record in pending)), dtype=torch.float64)
    numbers = dict(zip([*names, "grad_norm"], values.mean(dim=0), strict=True))
    # a process without foreground has no score: the mean is of those that have one
    known = torch.tensor([[score, 1.0] if math.isfinite(score) else [0.0, 0.0] for score in scores.values()])
    known = known.reshape(-1, 2).double()
    trainer.world.mean_([*numbers.values(), num_image, known], of_cpu=True)
    means = {name: value.item() for name, value in numbers.items()}
    means |= {name: (total / share).item() for name, (total, share) in zip(scores, known, strict=True)}
    memory = {"memory_mib": peak_memory(trainer.device) / MIB}
    log.steps(
        pending[-1].step + 1, round(num_image.item() * trainer.world.size), {"lr": pending[-1].lr} | means | memory
    )


def _require_finite(trainer: Trainer, pending: list[StepRecord], values: dict[str, Tensor]) -> None:
    """Raise FloatingPointError for the first step with a number, (steps,) each, that is not finite.

    A loss that is not spoils the gradients of all processes: that of the process with the loss is the error to see.
    """
    losses = torch.stack(list(values.values())[:-1])
    own = not bool(losses.isfinite().all())
    theirs = trainer.world.any(own) and not own
    for i, record in enumerate(pending):
        row = {name: value[i].item() for name, value in values.items()}
        if not all(map(math.isfinite, row.values())):
            if theirs:
                raise LostProcessError("another process stops, as its loss is not finite")
            raise FloatingPointError(_not_finite(trainer, record, row))


def _not_finite(trainer: Trainer, record: StepRecord, values: dict[str, float]) -> str:
    shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    newest = latest(experiment_folder(trainer.config))
    kept = f"the newest checkpoint is {newest.weights}" if newest else "there is no checkpoint yet"
    where = f" on rank {trainer.world.rank}" if trainer.world.size > 1 else ""
    return (
        f"not finite at step {record.step}{where}: {shown}; learning rate {record.lr:.6g}; "
        f"images {', '.join(record.files)}. Nothing was overwritten, {kept}. Try a lower OptimizeParam.optimizer.lr, "
        "a longer OptimizeParam.warmup.epoch, or OptimizeParam.optimizer.clip_gradient"
    )


def _save(trainer: Trainer, loader: TrainLoader, step: int, log: TrainLog | NoLog) -> None:
    epoch, inside = divmod(step, loader.iter_per_epoch)
    general, position = trainer.config.General, loader.position_at(step)
    progress = Progress(
        epoch=epoch,
        step=step,
        seed=general.seed,
        experiment=str(general.name),
        num_sample=len(loader.dataset),
        sample=position.sample,
        portrait=position.portrait,
        class_names=loader.dataset.class_names,
    )
    stem = step_stem(step) if inside else epoch_stem(epoch)
    folder = experiment_folder(trainer.config)
    weights, state = trainer.module.state_dict(), trainer.optimizer.state_dict()
    saved = save_checkpoint(folder, stem, weights, state, progress, keep=general.keep_checkpoints)
    log.info(f"wrote {saved.weights}")


def _check_evaluation(config: Config) -> None:
    """Raises FileNotFoundError or ValueError where the evaluation between epochs would find no data."""
    test = config.TestParam
    if test.eval_epoch and test.eval_image_set is not None:
        open_index(resolve(test.eval_image_set, config.DatasetParam.data_root))
    if test.eval_epoch and test.coco.annotation is not None and not Path(test.coco.annotation).is_file():
        raise FileNotFoundError(f"TestParam.coco.annotation: no file {test.coco.annotation}")


def _is_due(config: Config, saved_at: float, world: World) -> bool:
    """Is it time for a checkpoint by the clock?"""
    minutes = config.General.checkpoint_minutes
    return minutes > 0 and world.any(world.is_first and time.monotonic() - saved_at >= 60 * minutes)


def _is_evaluated(config: Config, epoch: int) -> bool:
    return config.TestParam.eval_epoch > 0 and epoch % config.TestParam.eval_epoch == 0


def _evaluate(trainer: Trainer, step: int, iter_per_epoch: int, log: TrainLog | NoLog) -> None:
    config, image_set = trainer.config, trainer.config.TestParam.eval_image_set
    assert image_set is not None  # config.check
    module = build_test_module(config, trainer.module.state_dict(), trainer.device, "training")
    world = trainer.world
    tested = test_image_set(
        config, module, image_set, experiment_folder(config), trainer.device, world.rank, world.size
    )
    if tested is None:  # the first process has it
        return
    if tested.evaluation is None:
        log.info(f"wrote {tested.result}; the image set has no annotations to evaluate against")
        return
    stats = dict(zip(STAT_NAMES, tested.evaluation.stats, strict=True))
    log.event("eval", step=step, epoch=step // iter_per_epoch, **stats)
    log.info(f"epoch {step // iter_per_epoch}: " + ", ".join(f"{name} {value:.3f}" for name, value in stats.items()))
