"""Validation beyond field types: required fields, bounds, and rules between fields.

Every message names the field, its value and a valid replacement.
"""

from __future__ import annotations

from itertools import pairwise

from config.schema import AnchorGenerate, Config
from config.section import Bound, leaves


def check(config: Config) -> None:
    """Raise ValueError for the first invalid field. Runs before any field is derived."""
    _check_required(config)
    _check_bounds(config)
    _check_run(config)
    _check_network(config)
    _check_memonger(config)
    _check_compile(config)
    _check_input(config)
    _check_assignment(config)
    _check_schedule(config)


def check_described(config: Config) -> None:
    """Raise ValueError for the first invalid field of a config for testing that was restored from a checkpoint."""
    _check_bounds(config)
    _check_network(config)
    _check_input(config)


def _check_required(config: Config) -> None:
    for key, section, entry in leaves(config):
        if "required" in entry.metadata and not hasattr(section, entry.name):
            raise ValueError(f"{key} is not set; set it in the config file, such as {entry.metadata['required']}")


def _check_bounds(config: Config) -> None:
    for key, section, entry in leaves(config):
        bound: Bound | None = entry.metadata.get("bound")
        if bound is None:
            continue
        value = getattr(section, entry.name)
        if value is not None and not bound.holds(value):
            raise ValueError(f"{key}: expected {bound.expected}, got {value!r}")


def _check_run(config: Config) -> None:
    kvstore = config.KvstoreParam
    if kvstore.gpus and kvstore.processes != 1:
        raise ValueError(
            f"KvstoreParam.processes is {kvstore.processes}, but it applies to CPU training only: write 1, or "
            "train on the CPU with --gpus cpu"
        )
    if (kvstore.machines > 1) != (kvstore.kvstore == "dist_sync"):
        raise ValueError(
            f"KvstoreParam: expected kvstore dist_sync with 2 or more machines, and local or device with 1; got "
            f"{kvstore.kvstore} and machines {kvstore.machines}"
        )
    if config.TestParam.eval_epoch and config.TestParam.eval_image_set is None:
        raise ValueError(
            f"TestParam.eval_epoch is {config.TestParam.eval_epoch}, but no image set to evaluate is given; "
            f"set one, such as TestParam.eval_image_set='coco_val2017', or write TestParam.eval_epoch=0"
        )


def _check_network(config: Config) -> None:
    anchor = config.RpnParam.anchor_generate
    if anchor.stride != AnchorGenerate().stride:
        raise ValueError(
            f"RpnParam.anchor_generate.stride: expected {AnchorGenerate().stride}, the strides of the "
            f"pyramid's levels, got {anchor.stride}; to change the anchor sizes, set anchor_generate.scale"
        )
    if not (config.RpnParam.head.fp32_predict or config.General.fp16 or config.General.bf16):
        raise ValueError(
            "RpnParam.head.fp32_predict is False, but General.fp16 and bf16 are too, so that nothing is computed in a "
            "half type; write RpnParam.head.fp32_predict=True, or General.fp16=True"
        )
    model = config.ModelParam
    if config.NormalizeParam.type == "fixbn" and model.from_scratch and model.init_from is None:
        raise ValueError(
            "NormalizeParam.type=fixbn uses the statistics of pretrained weights, but "
            "ModelParam.from_scratch=True loads none: activations of random weights would diverge; write "
            "NormalizeParam.type=localbn"
        )


def _check_memonger(config: Config) -> None:
    model = config.ModelParam
    for name, value in (("memonger_until", model.memonger_until), ("memonger_budget", model.memonger_budget)):
        if value is not None and not model.memonger:
            raise ValueError(
                f"ModelParam.{name} is {value!r}, but ModelParam.memonger is False; write ModelParam.memonger=True to "
                f"recompute, or {name}=None"
            )


def _check_compile(config: Config) -> None:
    kvstore = config.KvstoreParam
    if not config.General.compile:
        return
    if config.ModelParam.memonger:
        raise ValueError(
            "General.compile and ModelParam.memonger are both set: the compiler decides itself what to recompute; "
            "write ModelParam.memonger=False, or General.compile=False"
        )
    if config.NormalizeParam.type == "syncbn" and kvstore.machines * kvstore.devices_per_machine > 1:
        raise ValueError(
            "General.compile is set with NormalizeParam.type=syncbn on several devices: the compiler does not take "
            "communication inside the network; write NormalizeParam.type=localbn, or General.compile=False"
        )


def _check_input(config: Config) -> None:
    resize = config.ResizeParam
    coarsest = max(config.RpnParam.anchor_generate.stride)
    for name, side in (("short", resize.short), ("long", resize.long)):
        if side % coarsest:
            below = side // coarsest * coarsest
            choice = f"{below} or {below + coarsest}" if below else f"{coarsest}"
            raise ValueError(
                f"ResizeParam.{name}: expected a multiple of {coarsest}, the coarsest stride, got {side}; "
                f"write {choice}"
            )
    if resize.short > resize.long:
        raise ValueError(
            f"ResizeParam.short ({resize.short}) exceeds ResizeParam.long ({resize.long}); set both, such as "
            f"ResizeParam.short={resize.short} and ResizeParam.long={resize.short}"
        )
    if resize.scale_min > resize.scale_max:
        raise ValueError(
            f"ResizeParam.scale_min ({resize.scale_min}) exceeds ResizeParam.scale_max ({resize.scale_max}); "
            f"set both, such as 0.8 and 1.2"
        )
    if config.RenameParam.mapping.get("image") != "data":
        raise ValueError(
            f"RenameParam.mapping: expected 'image' to be renamed to 'data', the graph's input, got "
            f"{config.RenameParam.mapping}"
        )


def _check_assignment(config: Config) -> None:
    assign = config.AnchorTarget2DParam.assign
    for name, threshold in (("neg_thr", assign.neg_thr), ("min_pos_thr", assign.min_pos_thr)):
        if threshold > assign.pos_thr:
            raise ValueError(
                f"AnchorTarget2DParam.assign.{name} ({threshold}) exceeds pos_thr ({assign.pos_thr}); "
                f"lower it to {assign.pos_thr} or raise pos_thr to {threshold}"
            )


def _check_schedule(config: Config) -> None:
    schedule, warmup = config.OptimizeParam.schedule, config.OptimizeParam.warmup
    inside = all(0 < epoch < schedule.end_epoch for epoch in schedule.lr_epoch)
    if not inside or any(first >= second for first, second in pairwise(schedule.lr_epoch)):
        steps = f"{0.6 * schedule.end_epoch:g},{0.8 * schedule.end_epoch:g}"
        raise ValueError(
            f"OptimizeParam.schedule.lr_epoch: expected increasing epochs between 0 and end_epoch "
            f"({schedule.end_epoch}), got {schedule.lr_epoch}; write for example {steps} (the published "
            f"fractions), or () for a constant lr"
        )
    first_change = min((*schedule.lr_epoch, schedule.end_epoch))
    if warmup.epoch > first_change:
        raise ValueError(
            f"OptimizeParam.warmup.epoch: expected a warm-up that ends by epoch {first_change:g}, "
            f"the first of lr_epoch and end_epoch, got {warmup.epoch:g}; write at most {first_change:g}"
        )
