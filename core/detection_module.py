"""Training: a config in, checkpoints and a log out."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from config.description import Description, describe
from config.image_set import resolve
from core.data.coco_index import open_index
from core.data.dataset import DetectionDataset
from core.data.loader import TrainLoader, make_train_loader
from core.distributed.process_group import ProcessGroup, join, launched_size
from core.engine.device import BatchUpload
from core.engine.precision import Precision
from core.engines import choose_engine
from core.inference import test_image_set
from core.protocol import Engine, EngineName, StepRecord, Trainer
from core.report.step_numbers import log_steps
from core.report.train_log import NoLog, TrainLog
from core.run.experiment import experiment_folder, find_start, lock_experiment, store_config, store_graph, versions
from core.run.guard import Guard
from core.run.stop_request import StopRequest
from core.weights.checkpoint import Checkpoint, Progress, epoch_stem, prune, save_checkpoint, step_stem
from operator_cxx import library

if TYPE_CHECKING:
    from config.schema import Config


def check_run(config: Config, resume: bool, engine: EngineName = "torch") -> None:
    """Check a run's devices, folder and data before its processes are launched.

    Raises ValueError and OSError as `fit` does.
    """
    chosen = choose_engine(engine)
    chosen.select_device(config, is_train=True)
    if config.KvstoreParam.machines > 1:
        chosen.require_processes(config)
    make_train_loader(config, start=_progress(find_start(config, resume)))  # builds the index, once for all processes
    _check_evaluation(config)


def fit(config: Config, config_text: str, resume: bool = False, engine: EngineName = "torch") -> int:
    """Train from the first step, or from the newest checkpoint, to OptimizeParam.schedule.end_epoch.

    config_text is stored with the experiment. In a launched process this is one rank of the run: one per device, with
    the engine mxnet one per machine. Raises ValueError, before anything is written, for an experiment folder that holds
    another run and for data or weights that do not fit; FloatingPointError for a loss that is not finite; MemoryError
    for a step that does not fit; LostProcessError if another process died or stalled. SIGINT and SIGTERM end it after
    the current step, with a checkpoint. Returns the exit status: 0, or that of a run ended by a signal.
    """
    chosen = choose_engine(engine)
    chosen.require_processes(config)
    device = chosen.select_device(config, is_train=True)
    with join(device) as group, ExitStack() as held:
        start = find_start(config, resume)
        num_device = config.KvstoreParam.num_device // group.world_size  # of this process
        loader = make_train_loader(config, group.rank, group.world_size, num_device, _progress(start))
        _check_evaluation(config)
        trainer, notes = held.enter_context(chosen.build(config, device, loader.iter_per_epoch, start, group))
        _require_equal_ranks(trainer, loader)
        log: TrainLog | NoLog = NoLog()
        description = None
        if group.is_main_process:
            description = describe(config, loader.dataset.indexes, versions())
            notes += _claim_folder(config, config_text, resume, start, held)
            epochs = start.progress.epochs if start is not None else 0.0
            folder = experiment_folder(config)
            store_graph(config)
            log = held.enter_context(
                TrainLog(folder, loader.start_step, loader.end_step, loader.iter_per_epoch, epochs)
            )
        for note in [*config.notes, *library.notes, *notes, *_describe(loader, trainer)]:
            log.info(note)
        return _train(trainer, loader, log, chosen, description)


def _train(
    trainer: Trainer, loader: TrainLoader, log: TrainLog | NoLog, engine: Engine, description: Description | None
) -> int:
    """Train from the loader's first step to its last, or until any rank receives a stop request. Returns as `fit`.

    description: of the detector, on the main process.
    """
    config, group, device, step = trainer.config, trainer.group, trainer.device, loader.start_step
    guard, upload = Guard(config, device, group, log), BatchUpload(device)
    pending: list[StepRecord] = []  # steps whose numbers the host has not read yet
    with StopRequest(launched=launched_size() is not None) as stop, closing(iter(loader)) as batches:
        saved_at = time.monotonic()
        if _evaluation_is_missing(trainer, loader, log):
            _evaluate(trainer, step, loader.iter_per_epoch, guard, engine)
        stopping = group.any_rank(stop.requested)
        while step < loader.end_step and not stopping:
            # batches: all those of this process for one update
            with log.waiting(), guard.phase(f"reading the images of step {step}", at=f"step {step}"):
                parts = [upload(next(batches)) for _ in range(loader.accumulate)]
            for path, reason in [skipped for part in parts for skipped in part["skipped"]]:
                guard.report(f"rank {group.rank} skipped {path}: {reason}")

            # step: the host does not wait for the device
            files = ", ".join(path for part in parts for path in part["files"]) or "no image"
            with guard.phase(f"computing step {step} on {files}", at=f"step {step}"):
                pending.append(trainer.step(parts, step))
            for note in pending[-1].notes:
                guard.report(note)
            step += 1

            # log: every few steps, and before each checkpoint, so that none is written of weights that are not finite
            with guard.phase(f"waiting for the others after step {step}", at=f"step {step}"):
                stopping = group.any_rank(stop.requested)
                epoch, inside = divmod(step, loader.iter_per_epoch)
                saving = not inside or stopping or _is_due(config, saved_at, group)
                if saving or step % config.General.log_frequency == 0:
                    guard.relay()
                    log_steps(log, trainer, pending)
                    pending = []

            # save
            if saving:
                if group.is_main_process:
                    _save(trainer, loader, step, log, description)
                saved_at = time.monotonic()

            # evaluate
            if not inside and _is_evaluated(config, epoch):
                _evaluate(trainer, step, loader.iter_per_epoch, guard, engine)
                stopping = stopping or group.any_rank(stop.requested)
    if loader.start_step >= loader.end_step:
        log.info("nothing is left to train; to train further, resume with a larger OptimizeParam.schedule.end_epoch")
    if step >= loader.end_step:
        return 0
    log.info(f"stopped after step {step}; the same command with --resume continues from there")
    return stop.status


def _progress(start: Checkpoint | None) -> Progress | None:
    return start.progress if start is not None else None


def _require_equal_ranks(trainer: Trainer, loader: TrainLoader) -> None:
    """Raise ValueError if the ranks would not train the same network on the same samples."""
    if trainer.group.world_size == 1:
        return
    weights = sum(value.double().sum().item() for value in trainer.weights().values())
    precision = get_args(Precision).index(trainer.compute_dtype)
    trainer.group.require_equal(
        {"first step": loader.start_step, "samples per epoch": len(loader.dataset), "first weights": weights}
        | {"compute dtype (General.fp16, bf16)": precision}
    )


def _claim_folder(
    config: Config, config_text: str, resume: bool, start: Checkpoint | None, held: ExitStack
) -> list[str]:
    """Lock the experiment's folder for this run, until `held` closes, and store the config. Returns lines for the log.

    Raises ValueError if another run holds the lock, or has written there since `start` was found.
    """
    folder = experiment_folder(config)
    notes = held.enter_context(lock_experiment(folder))
    if find_start(config, resume) != start:
        raise ValueError(
            f"{folder} changed while this run started: another run wrote to it. Run the same command again"
        )
    notes = [*notes, *store_config(config, config_text)]
    if start is not None:
        prune(start, config.General.keep_checkpoints)
    return notes


def _describe(loader: TrainLoader, trainer: Trainer) -> list[str]:
    dataset = loader.dataset
    names = dataset.class_names
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return [
        f"{_image_counts(dataset)}, {len(dataset)} samples per epoch, {loader.iter_per_epoch} steps; "
        f"{len(names)} classes: {shown}",
        *trainer.describe(),
        *trainer.schedule.describe(),
    ]


def _image_counts(dataset: DetectionDataset) -> str:
    indexes = dataset.indexes
    counts = {
        "images without a box to train on": sum(index.num_image for index in indexes) - dataset.num_image,
        "boxes without area or outside of their image": sum(index.num_unfit for index in indexes),
        "crowd boxes": sum(index.num_crowd for index in indexes),
    }
    left_out = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"{dataset.num_image} images{f' (left out: {left_out})' if left_out else ''}"


def _is_due(config: Config, saved_at: float, group: ProcessGroup) -> bool:
    """Return True on every rank if General.checkpoint_minutes have passed since the last checkpoint."""
    minutes = config.General.checkpoint_minutes
    return minutes > 0 and group.any_rank(group.is_main_process and time.monotonic() - saved_at >= 60 * minutes)


def _save(
    trainer: Trainer, loader: TrainLoader, step: int, log: TrainLog | NoLog, description: Description | None
) -> None:
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
    keep = general.keep_checkpoints
    saved = save_checkpoint(folder, stem, trainer.weights(), trainer.state(), progress, keep, description)
    log.info(f"wrote {saved.weights}")


def _check_evaluation(config: Config) -> None:
    """Raise FileNotFoundError or ValueError if the data of the evaluation between epochs is missing."""
    test = config.TestParam
    if test.eval_epoch and test.eval_image_set is not None:
        open_index(resolve(test.eval_image_set, config.DatasetParam.data_root))
    if test.eval_epoch and test.coco.annotation is not None and not Path(test.coco.annotation).is_file():
        raise FileNotFoundError(f"TestParam.coco.annotation: no file {test.coco.annotation}")


def _is_evaluated(config: Config, epoch: int) -> bool:
    return config.TestParam.eval_epoch > 0 and epoch % config.TestParam.eval_epoch == 0


def _evaluation_is_missing(trainer: Trainer, loader: TrainLoader, log: TrainLog | NoLog) -> bool:
    """Return True on every rank if the run ended before the evaluation of the epoch that it resumes after."""
    epoch, inside = divmod(loader.start_step, loader.iter_per_epoch)
    if not epoch or inside or not _is_evaluated(trainer.config, epoch):
        return False
    return trainer.group.any_rank(trainer.group.is_main_process and epoch not in log.evaluated)


def _evaluate(trainer: Trainer, step: int, iter_per_epoch: int, guard: Guard, engine: Engine) -> None:
    """Test the current weights on TestParam.eval_image_set, each rank on its share, and log the scores."""
    config, image_set, log = trainer.config, trainer.config.TestParam.eval_image_set, guard.log
    assert image_set is not None  # config.check
    group, device, epoch = trainer.group, trainer.device, step // iter_per_epoch
    with guard.phase(f"evaluating after epoch {epoch}", at=f"the evaluation after epoch {epoch}", is_test=True):
        detector, _ = engine.build_detector(config, trainer.weights(), device, "training")
        name = f"{epoch_stem(epoch)}.safetensors"
        tested = test_image_set(config, detector, image_set, experiment_folder(config), device, group, checkpoint=name)
    log.restart_clock()
    if tested is None:  # only the main process has a result
        return
    if tested.evaluation is None:
        log.event("tested", step=step, epoch=epoch)
        log.info(f"wrote {tested.result}; {tested.not_evaluated}")
        return
    scores = tested.evaluation.scores
    log.event("eval", step=step, epoch=epoch, **scores)
    log.info(
        f"epoch {epoch}: "
        + ", ".join(f"{name} {f'{value:.3f}' if value >= 0 else '-'}" for name, value in scores.items())
    )
