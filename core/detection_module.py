"""Training: a config in, checkpoints and a log out. L losses of the train graph."""

from __future__ import annotations

import math
import os
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from config.image_set import resolve
from core.data.coco_index import open_index
from core.data.dataset import DetectionDataset
from core.data.loader import TrainLoader, make_train_loader
from core.data.sample_order import Position
from core.distributed.process_group import LostProcessError, World, join, launched_size
from core.engine.device import peak_memory, require_gpus, select_device, to_device
from core.engine.out_of_memory import explained_memory
from core.engine.precision import Precision
from core.engine.trainer import StepRecord, Trainer, build_trainer
from core.inference import build_test_module, test_image_set
from core.report.evaluation import STAT_NAMES
from core.report.train_log import NoLog, TrainLog
from core.run.experiment import experiment_folder, find_start, lock_experiment, store_config
from core.run.stop_request import StopRequest
from core.weights.checkpoint import Checkpoint, Progress, epoch_stem, latest, prune, save_checkpoint, step_stem
from operator_cxx import library

if TYPE_CHECKING:
    from config.schema import Config, KvstoreParam
    from core.engine_mxnet.trainer import MxnetTrainer

    AnyTrainer = Trainer | MxnetTrainer

MIB = 2**20
NORM = "gradient norm"
METRIC_KEYS = {"FGAcc": "fg_acc"}  # the log's names


def check_run(config: Config, resume: bool) -> None:
    """What can be known before the processes of a run start: its devices, its folder, its data.

    Raises ValueError and OSError as `fit` does.
    """
    require_gpus(config)
    kvstore = config.KvstoreParam
    if kvstore.machines > 1:
        raise ValueError(
            f"KvstoreParam.machines is {kvstore.machines}: start detection_train.py on every machine with "
            + _torchrun(kvstore.machines, kvstore.num_device // kvstore.machines)
        )
    find_start(config, resume)
    make_train_loader(config)  # which also makes the index, once
    _check_evaluation(config)


def fit(config: Config, config_text: str, resume: bool = False, engine: str = "torch") -> int:
    """Train from the first step, or from the newest checkpoint, to OptimizeParam.schedule.end_epoch.

    config_text is stored with the experiment; engine is torch or mxnet. In a process that a launcher started, this is
    one of those that train together: one for each device, with engine mxnet for each machine. Raises ValueError, before
    anything is written, for an experiment folder that holds another run, for data or weights that do not fit;
    FloatingPointError for a loss that is not finite; MemoryError for a step that does not fit; LostProcessError where
    another process died or stalled. SIGINT and SIGTERM end it after the step, with a checkpoint. Returns the exit
    status: 0, or that of a run which a signal ended.
    """
    _require_processes(config.KvstoreParam, engine)
    device = torch.device("cpu")  # MXNet takes batches from there
    if engine == "torch":
        require_gpus(config)
        device = select_device(config.KvstoreParam.gpus, int(os.environ.get("LOCAL_RANK", "0")))
    with join(device) as world:
        return _train(config, config_text, resume, device, world, engine)


def _require_processes(kvstore: KvstoreParam, engine: str) -> None:
    launched = launched_size() or 1
    if engine == "torch" and launched != kvstore.num_device:
        raise ValueError(
            f"the launcher started {launched} processes, and the config is for {kvstore.num_device} devices "
            "(KvstoreParam.gpus, processes, machines): start as many, one a device, or change the config with --gpus "
            "or --set"
        )
    if engine == "mxnet" and launched != kvstore.machines:
        raise ValueError(
            f"KvstoreParam.machines is {kvstore.machines}, and {launched} process(es) were started: the engine mxnet "
            "has one on each machine, for all of its devices; start detection_train.py "
            + (f"on each with {_torchrun(kvstore.machines, 1)}" if kvstore.machines > 1 else "without a launcher")
        )


def _torchrun(machines: int, num_process: int) -> str:
    return f"torchrun --nnodes {machines} --nproc-per-node {num_process} --rdzv-backend c10d --rdzv-endpoint HOST"


def _train(config: Config, config_text: str, resume: bool, device: torch.device, world: World, engine: str) -> int:
    start = find_start(config, resume)
    num_device = config.KvstoreParam.num_device // world.size  # of this process
    loader = make_train_loader(config, rank=world.rank, size=world.size, num_device=num_device)
    _check_evaluation(config)
    trainer: AnyTrainer
    if engine == "mxnet":
        from core.engine_mxnet import trainer as mxnet_engine  # its operators are built for it alone

        trainer, built = mxnet_engine.build_trainer(config, loader.iter_per_epoch, start, world)
    else:
        with explained_memory(config, device, "the start"):
            trainer, built = build_trainer(config, device, loader.iter_per_epoch, start, world)
    step = _first_step(start, loader)
    if world.size > 1:
        weights = sum(value.double().sum().item() for value in trainer.module.state_dict().values())
        computed_in = get_args(Precision).index(trainer.computed_in)
        world.require_equal(
            {"first step": step, "samples an epoch": len(loader.dataset), "first weights": weights}
            | {"the type that they compute in (General.fp16, bf16)": computed_in}
        )
    loader.end_step = config.OptimizeParam.schedule.end_epoch * loader.iter_per_epoch
    notes, folder = [*config.notes, *library.notes, *built], experiment_folder(config)
    with ExitStack() as held:
        log: TrainLog | NoLog = NoLog()
        if world.is_first:
            notes += held.enter_context(lock_experiment(folder))
            if find_start(config, resume) != start:
                raise ValueError(
                    f"{folder} changed while this run started: another one wrote there. Give the same command again"
                )
            notes += store_config(config, config_text)
            if start is not None:
                prune(start, config.General.keep_checkpoints)
            begun = start.progress.epochs if start is not None else 0.0
            log = held.enter_context(TrainLog(folder, step, loader.end_step, loader.iter_per_epoch, begun))
        for note in [*notes, *_describe(config, loader, trainer)]:
            log.info(note)
        if trainer.kvstore is not None:
            held.enter_context(trainer.kvstore)
        return _run_steps(trainer, loader, step, log)


def _run_steps(trainer: AnyTrainer, loader: TrainLoader, step: int, log: TrainLog | NoLog) -> int:
    """Steps from `step` to the loader's end, or until a process is asked to stop. Returns what `fit` does."""
    config, world = trainer.config, trainer.world
    assert loader.end_step is not None
    pending: list[StepRecord] = []  # steps whose numbers the host has not read yet
    with StopRequest(launched=launched_size() is not None) as stop, closing(iter(loader)) as batches:
        saved_at = time.monotonic()
        _evaluate_if_missed(trainer, loader, step, log)
        stopping = world.any(stop.requested)
        while step < loader.end_step and not stopping:
            began = time.perf_counter()
            world.doing(f"reading the images of step {step}")
            with explained_memory(config, trainer.device, f"step {step}"):
                parts = [to_device(next(batches), trainer.device) for _ in range(loader.accumulate)]
            log.waited(time.perf_counter() - began)
            for path, reason in [one for part in parts for one in part["skipped"]]:
                tell = log.info if world.is_first else world.tell
                tell(f"rank {world.rank} skipped {path}: {reason}")
            files = [path for part in parts for path in part["files"]]
            world.doing(f"computing step {step} on {', '.join(files) or 'no image'}")
            with explained_memory(config, trainer.device, f"step {step}"):
                pending.append(trainer.step(parts, step))
            step += 1
            world.doing(f"waiting for the others after step {step}")
            stopping, end_of_epoch = world.any(stop.requested), step % loader.iter_per_epoch == 0
            saving = end_of_epoch or stopping or _is_due(config, saved_at, world)
            if saving or step % config.General.log_frequency == 0:
                for line in world.told() if world.is_first else ():
                    log.info(line)
                _log_steps(log, trainer, pending)  # waits for the device, and refuses what is not finite
                pending = []
            if saving and world.is_first:
                _save(trainer, loader, step, log)
            saved_at = time.monotonic() if saving else saved_at
            if end_of_epoch and _is_evaluated(config, step // loader.iter_per_epoch):
                _evaluate(trainer, step, loader.iter_per_epoch, log)
                stopping = stopping or world.any(stop.requested)
        if loader.start_step >= loader.end_step:
            log.info("nothing is left to train; to train on, resume with a larger OptimizeParam.schedule.end_epoch")
        elif step < loader.end_step:
            log.info(f"stopped after step {step}; the same command with --resume goes on from there")
            return stop.status
        return 0


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


def _describe(config: Config, loader: TrainLoader, trainer: AnyTrainer) -> list[str]:
    dataset = loader.dataset
    names = dataset.class_names
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return [
        f"{_with_boxes(dataset)}, {len(dataset)} samples an epoch, {loader.iter_per_epoch} steps; "
        f"{len(names)} classes: {shown}",
        *trainer.describe(),
        *trainer.schedule.describe(),
    ]


def _with_boxes(dataset: DetectionDataset) -> str:
    indexes = dataset.indexes
    counts = {
        "images without a box to train on": sum(index.num_image for index in indexes) - dataset.num_image,
        "boxes without area or outside of their image": sum(index.num_unfit for index in indexes),
        "crowd boxes": sum(index.num_crowd for index in indexes),
    }
    left_out = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"{dataset.num_image} images{f' (left out: {left_out})' if left_out else ''}"


def _log_steps(log: TrainLog | NoLog, trainer: AnyTrainer, pending: list[StepRecord]) -> None:
    """Read the numbers of the pending steps from the device, refuse those that are not finite, and log their means."""
    names = [name.removesuffix("_output") for name in trainer.config.ModelParam.train_symbol.list_outputs()]
    values = torch.stack([record.values for record in pending]).double().cpu()  # (steps, L + 1)
    scale = trainer.scale.read() if trainer.scale is not None else None
    counted = torch.ones(len(pending), dtype=torch.bool)
    if scale is not None and not scale.is_lost:  # skipped steps do not count
        counted = ~torch.stack([record.skipped for record in pending if record.skipped is not None]).cpu()
    values = values[counted]
    _require_finite(trainer, [r for r, kept in zip(pending, counted, strict=True) if kept], [*names, NORM], values)
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
    if scale is not None:
        means |= {"loss_scale": scale.value, "skipped": scale.skipped}
    memory = {"memory_mib": peak_memory(trainer.device) / MIB}
    log.steps(
        pending[-1].step + 1, round(num_image.item() * trainer.world.size), {"lr": pending[-1].lr} | means | memory
    )


def _require_finite(trainer: AnyTrainer, records: list[StepRecord], names: list[str], values: Tensor) -> None:
    """Raise FloatingPointError for the first step with a number that is not finite: `names` are those of the columns of
    values (steps, L + 1), the last one the gradient norm.

    A loss that is not spoils the gradients of all processes: that of the process with the loss is the error to see.
    """
    own = not bool(values[:, :-1].isfinite().all())
    theirs = trainer.world.any(own) and not own
    for record, row in zip(records, values.tolist(), strict=True):
        if not all(map(math.isfinite, row)):
            if theirs:
                raise LostProcessError("another process stops, as its loss is not finite")
            raise FloatingPointError(_not_finite(trainer, record, dict(zip(names, row, strict=True))))


def _not_finite(trainer: AnyTrainer, record: StepRecord, values: dict[str, float]) -> str:
    shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    newest = latest(experiment_folder(trainer.config))
    kept = f"the newest checkpoint is {newest.weights}" if newest else "there is no checkpoint yet"
    where = f" on rank {trainer.world.rank}" if trainer.world.size > 1 else ""
    half = ""
    if trainer.scale is not None:
        scale = trainer.scale.read()
        where += f", one of {scale.skipped_in_a_row} in a row" if record.skipped else ""
        where += f" (float16, loss scale {scale.value:g})"
        half = ", or bfloat16 (General.bf16)"
    return (
        f"not finite at step {record.step}{where}: {shown}; learning rate {record.lr:.6g}; "
        f"images {', '.join(record.files)}. Nothing was overwritten, {kept}. Try a lower OptimizeParam.optimizer.lr, "
        f"a longer OptimizeParam.warmup.epoch, or OptimizeParam.optimizer.clip_gradient{half}"
    )


def _save(trainer: AnyTrainer, loader: TrainLoader, step: int, log: TrainLog | NoLog) -> None:
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
    weights, state = trainer.module.state_dict(), trainer.state()
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


def _evaluate_if_missed(trainer: AnyTrainer, loader: TrainLoader, step: int, log: TrainLog | NoLog) -> None:
    """The evaluation at the end of an epoch, where the run was cut off in it."""
    epoch, inside = divmod(step, loader.iter_per_epoch)
    if not epoch or inside or not _is_evaluated(trainer.config, epoch):
        return
    if trainer.world.any(trainer.world.is_first and epoch not in log.evaluated):
        _evaluate(trainer, step, loader.iter_per_epoch, log)


def _evaluate(trainer: AnyTrainer, step: int, iter_per_epoch: int, log: TrainLog | NoLog) -> None:
    config, image_set = trainer.config, trainer.config.TestParam.eval_image_set
    assert image_set is not None  # config.check
    world, device, epoch = trainer.world, trainer.device, step // iter_per_epoch
    with explained_memory(config, device, f"the evaluation after epoch {epoch}", is_test=True):
        module = build_test_module(config, trainer.module.state_dict(), device, "training")
        tested = test_image_set(config, module, image_set, experiment_folder(config), device, world.rank, world.size)
    log.restart_clock()
    if tested is None:  # the first process has it
        return
    if tested.evaluation is None:
        log.event("tested", step=step, epoch=epoch)
        log.info(f"wrote {tested.result}; {tested.not_evaluated}")
        return
    stats = dict(zip(STAT_NAMES, tested.evaluation.stats, strict=True))
    log.event("eval", step=step, epoch=epoch, **stats)
    log.info(f"epoch {epoch}: " + ", ".join(f"{name} {value:.3f}" for name, value in stats.items()))
