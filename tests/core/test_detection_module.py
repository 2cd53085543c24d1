"""Training end to end, on a dozen generated images with a very small network."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from config.load import format_config
from core import detection_module
from core.detection_module import fit
from core.engine import engine
from core.engine.trainer import Trainer
from core.weights.checkpoint import latest, load_weights
from models.record import Batch
from tests.core.conftest import Run
from tests.small_run import records, stop_at


def test_a_run_writes_checkpoints_its_config_and_its_log(run: Run, tmp_path: Path) -> None:
    run()
    folder = tmp_path / "run"
    tensors, progress = load_weights(folder / "checkpoint-0003.safetensors")
    assert (progress.epoch, progress.step) == (3, 15)
    assert progress.class_names == ("circle", "cross", "ring", "square", "star", "triangle")
    assert tensors.keys() >= {"bn0_moving_mean", "cls_pred_weight"}
    assert (folder / "checkpoint-0001.safetensors").exists()
    assert "NeckParam.num_stage = 1" in (folder / "config.txt").read_text()
    lines = records(folder)
    assert [line["step"] for line in lines] == [2, 4, 5, 6, 8, 10, 12, 14, 15]
    assert lines[-1].keys() == {
        *("step", "epoch", "lr", "cls_loss", "reg_loss", "fg_acc", "grad_norm"),
        *("img_per_s", "data_wait", "memory_mib", "eta_s"),
    }
    assert lines[-1]["lr"] == pytest.approx(0.001)  # a tenth after epoch 2
    first, last = lines[0], lines[-1]
    assert last["cls_loss"] + last["reg_loss"] < first["cls_loss"] + first["reg_loss"]
    assert "fg_acc" in (folder / "log.txt").read_text()


@pytest.mark.parametrize("step", [2, 4, 5, 11])  # inside an epoch, in its last step, just after, in a later epoch
def test_an_interrupted_run_resumes_to_the_same_bytes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run(name="whole")
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        run(name="parts")
    stopped = latest(tmp_path / "parts")
    assert stopped is not None
    assert stopped.progress.step == step + 1
    run(name="parts", resume=True)
    whole = load_file(tmp_path / "whole" / "checkpoint-0003.safetensors")
    parts = load_file(tmp_path / "parts" / "checkpoint-0003.safetensors")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert {line["step"] for line in records(tmp_path / "parts")} >= {2, 15}
    assert not list((tmp_path / "parts").glob("checkpoint-step*"))  # removed after later ones


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_exit_status_of_stopped_and_finished_runs(
    load: Run, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    config = load("OptimizeParam.schedule.end_epoch=1", "OptimizeParam.schedule.lr_epoch=()")
    # at 4 the request comes in the last step
    for step, resume, status in ((1, False, 128 + number), (4, True, 0), (0, True, 0)):
        with monkeypatch.context() as patch:
            stop_at(patch, step, number=number)
            assert fit(config, format_config(config), resume=resume) == status


def test_a_seed_repeats_and_another_differs(run: Run, tmp_path: Path) -> None:
    one_epoch = ("OptimizeParam.schedule.end_epoch=1", "OptimizeParam.schedule.lr_epoch=()")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(*one_epoch, f"General.seed={seed}", name=name)
    a, b, c = (load_file(tmp_path / name / "checkpoint-0001.safetensors")["conv0_weight"] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_finished_run_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    run("OptimizeParam.schedule.end_epoch=1", "OptimizeParam.schedule.lr_epoch=()")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError, match=r"holds a finished run \(1 epochs\).*General.name"):
        run("OptimizeParam.schedule.end_epoch=1", "OptimizeParam.schedule.lr_epoch=()")
    with pytest.raises(ValueError, match=r"unfinished run.*--resume"):
        run()
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("worker", [0, 1])
@pytest.mark.parametrize("end_epoch", [1, 2])  # of a run of two epochs
def test_a_finished_run_resumes_to_nothing(run: Run, tmp_path: Path, end_epoch: int, worker: int) -> None:
    common = ("OptimizeParam.schedule.lr_epoch=()", f"General.loader_worker={worker}")
    run("OptimizeParam.schedule.end_epoch=2", *common)
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*checkpoint*")}
    curves = records(tmp_path / "run")
    run(f"OptimizeParam.schedule.end_epoch={end_epoch}", *common, resume=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").glob("*checkpoint*")} == before
    assert records(tmp_path / "run") == curves
    assert "nothing is left to train" in (tmp_path / "run" / "log.txt").read_text()


def test_an_interrupted_evaluation_is_repeated_on_resume(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = (
        *("OptimizeParam.schedule.end_epoch=2", "OptimizeParam.schedule.lr_epoch=()"),
        *("TestParam.eval_epoch=1", "TestParam.eval_image_set=demo_val"),
    )
    run(*common, name="whole")
    whole = [record for record in records(tmp_path / "whole") if record.get("event") == "eval"]
    assert [record["step"] for record in whole] == [5, 10]
    plain = detection_module._evaluate

    def killed(trainer: Trainer, step: int, *more: Any) -> None:
        if step == cut:
            raise KeyboardInterrupt
        plain(trainer, step, *more)

    for cut in (5, 10):
        with monkeypatch.context() as patch:
            patch.setattr(detection_module, "_evaluate", killed)
            with pytest.raises(KeyboardInterrupt):
                run(*common, resume=cut > 5)
    for _ in range(2):  # the second time nothing is missing
        run(*common, resume=True)
    assert [record for record in records(tmp_path / "run") if record.get("event") == "eval"] == whole


def test_a_folder_that_changes_while_a_run_starts_is_an_error(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        run()
    plain = engine.build_trainer

    def overtaken(*arguments: Any) -> Any:
        built = plain(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "build_trainer", plain)
            stop_at(patch, 8)
            run(resume=True)
        return built

    with monkeypatch.context() as patch:
        patch.setattr(engine, "build_trainer", overtaken)
        with pytest.raises(ValueError, match="changed while this run started"):
            run(resume=True)
    newest = latest(tmp_path / "run")
    assert newest is not None
    assert newest.progress.step == 9
    run(resume=True)


def test_resume_refuses_another_seed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        run()
    with pytest.raises(ValueError, match="the seed is 5"):
        run("General.seed=5", resume=True)


def test_resume_with_another_global_batch_size_takes_the_rest_of_the_epoch(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 18 samples: 2 steps of 4, then 5 of 2, and epochs 2 and 3 of 9 steps
    seen: list[str] = []
    plain = Trainer.step

    def recorded(self: Trainer, batches: list[Batch], number: int) -> Any:
        seen.extend(path for batch in batches for path in batch["files"])
        return plain(self, batches, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", recorded)
        stop_at(patch, 1)
        run()
    assert len(seen) == 8
    monkeypatch.setattr(Trainer, "step", recorded)
    run("General.batch_image=2", resume=True)
    assert len(seen) == 3 * 18
    counts = {path: seen[:18].count(path) for path in seen}
    assert list(counts.values()) == [2] * 9
    newest = latest(tmp_path / "run")
    assert newest is not None
    assert (newest.progress.epoch, newest.progress.step) == (3, 27)


def test_a_loss_that_is_not_finite_stops_and_names_step_rate_and_images(run: Run, tmp_path: Path) -> None:
    run("OptimizeParam.schedule.end_epoch=1", "OptimizeParam.schedule.lr_epoch=()")
    before = (tmp_path / "run" / "checkpoint-0001.safetensors").read_bytes()
    with pytest.raises(FloatingPointError) as error:
        run("OptimizeParam.optimizer.lr=1e30", resume=True)
    message = str(error.value)
    assert "not finite at step 6" in message  # one update at 1e30 is enough
    assert "learning rate 1e+30" in message
    assert message.count(".jpg") == 4
    assert "checkpoint-0001.safetensors" in message
    assert (tmp_path / "run" / "checkpoint-0001.safetensors").read_bytes() == before
    assert not (tmp_path / "run" / "checkpoint-0002.safetensors").exists()


def test_missing_images_are_skipped_if_the_config_says_so(run: Run, data_root: Path, tmp_path: Path) -> None:
    lacking = tmp_path / "lacking"
    shutil.copytree(data_root, lacking)
    victim = sorted((lacking / "demo" / "images" / "train").iterdir())[2]
    victim.unlink()
    here = (
        f"DatasetParam.data_root={lacking}",
        "OptimizeParam.schedule.end_epoch=1",
        "OptimizeParam.schedule.lr_epoch=()",
    )
    with pytest.raises(FileNotFoundError, match=victim.name):
        run(*here)
    run(*here, "DatasetParam.bad_image=skip")
    text = (tmp_path / "run" / "log.txt").read_text()
    assert text.count(f"rank 0 skipped {victim}") == 1
    assert (tmp_path / "run" / "checkpoint-0001.safetensors").exists()


def test_boxes_and_images_that_are_left_out_are_counted(run: Run, data_root: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(data_root, changed)
    path = changed / "demo" / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    boxes = content["annotations"]
    of_one = [box for box in boxes if box["image_id"] == boxes[0]["image_id"]]
    of_others = [box for box in boxes if box not in of_one]
    for box in of_one:
        box["area"] = 0
    of_others[0]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    run(f"DatasetParam.data_root={changed}", "OptimizeParam.schedule.end_epoch=1", "OptimizeParam.schedule.lr_epoch=()")
    assert (
        f"8 images (left out: 1 images without a box to train on, {len(of_one)} boxes without area or outside of their "
        "image, 1 crowd boxes), 16 samples per epoch"
    ) in (tmp_path / "run" / "log.txt").read_text()


def test_a_truncated_image_is_named(run: Run, data_root: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(data_root, broken)
    victim = sorted((broken / "demo" / "images" / "train").iterdir())[2]
    victim.write_bytes(victim.read_bytes()[:400])
    with pytest.raises(ValueError, match=victim.name):
        run(f"DatasetParam.data_root={broken}")


def test_evaluation_between_epochs(run: Run, tmp_path: Path) -> None:
    run("TestParam.eval_epoch=2", "TestParam.eval_image_set=demo_val")
    events = [line for line in records(tmp_path / "run") if line.get("event") == "eval"]
    assert [(event["step"], event["epoch"]) for event in events] == [(10, 2)]
    assert 0 <= events[0]["AP"] <= 1
    assert (tmp_path / "run" / "demo_val_result.json").exists()
    scores = json.loads((tmp_path / "run" / "demo_val_scores.json").read_text())
    assert scores["stats"] == {key: value for key, value in events[0].items() if key not in ("event", "step", "epoch")}
    assert scores["checkpoint"] == "checkpoint-0002.safetensors"


def test_an_evaluation_that_does_not_fit_keeps_the_checkpoint(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(detection_module, "test_image_set", full)
    with pytest.raises(MemoryError, match=r"the evaluation after epoch 1 .*--set TestParam\.batch_image="):
        run("TestParam.eval_epoch=1", "TestParam.eval_image_set=demo_val")
    assert (tmp_path / "run" / "checkpoint-0001.safetensors").exists()


def test_an_evaluation_without_data_is_an_error_before_training(run: Run, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"instances_none\.json"):
        run("TestParam.eval_epoch=3", "TestParam.eval_image_set=demo_none")
    assert not (tmp_path / "run").exists()


def test_another_metric_or_none_is_logged(load: Run, tmp_path: Path) -> None:
    config = load()
    config.metric_list.clear()
    fit(config, format_config(config))
    (record, *_) = records(tmp_path / "run")
    assert "fg_acc" not in record
    assert record["cls_loss"] > 0


def test_fine_tuning_with_another_class_count_loads_what_fits(run: Run, data_root: Path, tmp_path: Path) -> None:
    run("OptimizeParam.schedule.end_epoch=1", "OptimizeParam.schedule.lr_epoch=()", name="base")
    weights = tmp_path / "base" / "checkpoint-0001.safetensors"
    two = tmp_path / "two"
    shutil.copytree(data_root, two)
    path = two / "demo" / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["categories"] = [{"id": 1, "name": "round"}, {"id": 2, "name": "edgy"}]
    for annotation in content["annotations"]:
        annotation["category_id"] = 1 + annotation["category_id"] % 2
    path.write_text(json.dumps(content))
    # a tiny learning rate: the loaded values are still there at the end
    config = run(
        f"ModelParam.init_from={weights}",
        f"DatasetParam.data_root={two}",
        "TestParam.eval_image_set=None",
        "RpnParam.num_class=None",
        "OptimizeParam.optimizer.lr=1e-20",
        name="tuned",
    )
    assert config.RpnParam.num_class == 3
    log = (tmp_path / "tuned" / "log.txt").read_text()
    assert "2 of another shape: cls_pred_weight" in log
    base = load_file(weights)
    tuned, progress = load_weights(tmp_path / "tuned" / "checkpoint-0003.safetensors")
    assert progress.class_names == ("round", "edgy")
    assert torch.equal(tuned["S1_P4_1_weight"], base["S1_P4_1_weight"])
    assert tuned["cls_pred_bias"].shape == (18,)


def test_the_pretrained_backbone_is_loaded_and_conv0_stays(run: Run, tmp_path: Path) -> None:
    run("OptimizeParam.schedule.end_epoch=1", "OptimizeParam.schedule.lr_epoch=()", name="base")
    weights = tmp_path / "base" / "checkpoint-0001.safetensors"
    run(
        "ModelParam.from_scratch=False",
        f"ModelParam.pretrain.prefix={weights}",
        "ModelParam.pretrain.fixed_param=conv0",
        name="tuned",
    )
    base, tuned = load_file(weights), load_file(tmp_path / "tuned" / "checkpoint-0003.safetensors")
    assert torch.equal(tuned["conv0_weight"], base["conv0_weight"])
    assert not torch.equal(tuned["stage1_unit1_conv1_weight"], base["stage1_unit1_conv1_weight"])
    assert "ResNet-18" in (tmp_path / "tuned" / "log.txt").read_text()


def test_a_missing_backbone_is_an_error_with_the_remedy(run: Run, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"get_backbone.py.*from_scratch=True"):
        run("ModelParam.from_scratch=False", f"ModelParam.pretrain.prefix={tmp_path}/none")
    assert not (tmp_path / "run").exists()


def test_more_than_one_gpu_is_refused_with_the_command_to_use(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--gpus"):
        run("KvstoreParam.gpus=0,1")
    assert not (tmp_path / "run").exists()


def test_a_run_that_recomputes_ends_in_the_same_bytes(run: Run, tmp_path: Path) -> None:
    run(name="storing")
    run("ModelParam.memonger=True", name="recomputing")
    storing, recomputing = (load_file(tmp_path / n / "checkpoint-0003.safetensors") for n in ("storing", "recomputing"))
    assert storing.keys() == recomputing.keys()
    assert all(torch.equal(storing[name], recomputing[name]) for name in storing)
    assert "memonger: recomputed up to" in (tmp_path / "recomputing" / "log.txt").read_text()


def test_accumulation_equals_a_larger_batch(run: Run, tmp_path: Path) -> None:
    run("General.batch_image=2", "OptimizeParam.accumulate=2")
    lines = records(tmp_path / "run")
    assert [line["step"] for line in lines] == [
        2,
        4,
        5,
        6,
        8,
        10,
        12,
        14,
        15,
    ]  # 5 steps of 4 per epoch, as in batches of 4
    assert "18 samples per epoch, 5 steps" in (tmp_path / "run" / "log.txt").read_text()
