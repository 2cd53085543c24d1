"""Derived fields of a config, one function per concern. Each reads only fields that are already complete."""

from __future__ import annotations

from pathlib import Path

from config.image_set import PUBLISHED, class_names, resolve
from config.schema import Config
from config.section import fill
from symbol import Symbol
from symbol.layers import normalizer_factory


def derive(config: Config, stem: str, is_train: bool) -> None:
    """Fill every derived field.

    stem: the config file's stem, which names the experiment if General.name is None.

    Raises ValueError if the classes of the image sets differ from each other or from RpnParam.num_class, and
    FileNotFoundError if they cannot be counted.
    """
    _derive_names(config, stem)
    _derive_devices_and_precision(config)
    _derive_normalizer(config)
    _derive_feature_sides(config)
    _derive_classes(config)
    _derive_learning_rate(config)
    _derive_graphs(config, is_train)
    _derive_input(config, is_train)


def derive_described(config: Config, stem: str, graph: Symbol, class_names: tuple[str, ...]) -> None:
    """Fill the derived fields that testing a checkpoint needs: its graph is given, in place of the config file's."""
    _derive_names(config, stem)
    _derive_devices_and_precision(config)
    _derive_normalizer(config)
    _derive_feature_sides(config)
    fill(config.DatasetParam, "class_names", class_names)
    fill(config.ModelParam, "test_symbol", graph)
    fill(config, "data_name", tuple(graph.list_inputs()))
    fill(config, "test_transform", config.get_transform(config, False))


def _derive_names(config: Config, stem: str) -> None:
    if config.General.name is None:
        config.General.name = stem
    prefix = Path(config.General.output_root) / config.General.name / "checkpoint"
    fill(config.TestParam.model, "prefix", str(prefix))


def _derive_devices_and_precision(config: Config) -> None:
    kvstore = config.KvstoreParam
    fill(kvstore, "num_device", kvstore.machines * kvstore.devices_per_machine)
    fill(kvstore, "batch_image", config.General.batch_image)
    for section in (config.KvstoreParam, config.BackboneParam, config.NeckParam, config.RpnParam):
        fill(section, "fp16", config.General.fp16 or config.General.bf16)


def _derive_normalizer(config: Config) -> None:
    normalize = config.NormalizeParam
    normalizer = normalizer_factory(
        type=normalize.type,
        ndev=config.KvstoreParam.num_device,
        wd_mult=normalize.wd_mult,
        momentum=normalize.momentum,
        eps=normalize.eps,
        lr_mult=normalize.lr_mult,
    )
    for section in (config.NormalizeParam, config.BackboneParam, config.NeckParam, config.RpnParam):
        fill(section, "normalizer", normalizer)


def _derive_feature_sides(config: Config) -> None:
    anchor, generate = config.RpnParam.anchor_generate, config.AnchorTarget2DParam.generate
    short, long = config.ResizeParam.short, config.ResizeParam.long
    fill(config.PadParam, "short", short)
    fill(config.PadParam, "long", long)
    fill(generate, "stride", anchor.stride)
    fill(generate, "scales", anchor.scale)
    fill(generate, "aspects", anchor.ratio)
    fill(generate, "short", tuple(short // stride for stride in anchor.stride))
    fill(generate, "long", tuple(long // stride for stride in anchor.stride))


def _derive_classes(config: Config) -> None:
    names = _annotated_classes(config)
    fill(config.DatasetParam, "class_names", names or ())
    given = config.RpnParam.num_class
    counted = len(names) if names is not None else None
    if counted is None and given is None:
        counted = _published_classes(config)
    if given is None and counted is None:
        image_set = resolve(config.DatasetParam.image_set[0], config.DatasetParam.data_root)
        raise FileNotFoundError(
            f"the classes of {image_set.name} cannot be counted: {image_set.annotation} does not exist; "
            f"{image_set.remedy}; or set RpnParam.num_class to the number of classes + 1"
        )
    if given is not None and counted is not None and given != counted + 1:
        image_sets = ", ".join(one if isinstance(one, str) else one.name for one in config.DatasetParam.image_set)
        raise ValueError(
            f"RpnParam.num_class is {given}, but the images of {image_sets} have {counted} classes: "
            f"write {counted + 1} (the background counts as one), or None to count them automatically"
        )
    if counted is not None:
        config.RpnParam.num_class = counted + 1


def _annotated_classes(config: Config) -> tuple[str, ...] | None:
    """Return the classes shared by all image sets of the experiment; None if no annotation file exists on disk."""
    data, evaluated = config.DatasetParam, config.TestParam.eval_image_set
    image_sets = [*data.image_set, *([] if evaluated is None else [evaluated])]
    first, names = "", None
    for image_set in [resolve(one, data.data_root) for one in image_sets]:
        if not Path(image_set.annotation).is_file():
            continue
        found = class_names(image_set)
        if names is not None and found != names:
            difference = sorted(set(found) ^ set(names)) or "the same names in another order"
            raise ValueError(
                f"DatasetParam.image_set: {first} has {len(names)} classes and {image_set.name} has "
                f"{len(found)}, which differ in {difference}; all image sets of an experiment "
                f"(including TestParam.eval_image_set) need equal categories"
            )
        first, names = image_set.name, found
    return names


def _published_classes(config: Config) -> int | None:
    """Return the published class count of the image sets, without their files; None if there is no single one."""
    published = [PUBLISHED.get(one) for one in config.DatasetParam.image_set if isinstance(one, str)]
    counts = {one.num_class for one in published if one is not None}
    return counts.pop() if len(counts) == 1 else None


def _derive_learning_rate(config: Config) -> None:
    optimizer, devices = config.OptimizeParam.optimizer, config.KvstoreParam.num_device
    fill(
        config.OptimizeParam,
        "global_batch_size",
        config.General.batch_image * devices * config.OptimizeParam.accumulate,
    )
    if optimizer.lr is None:
        optimizer.lr = optimizer.lr_per_image * config.OptimizeParam.global_batch_size


def _derive_graphs(config: Config, is_train: bool) -> None:
    model = config.ModelParam
    parts = (
        model.backbone(config.BackboneParam),
        model.neck(config.NeckParam),
        model.head(config.RpnParam),
    )
    detector = model.detector()
    fill(model, "train_symbol", detector.get_train_symbol(*parts))
    fill(model, "test_symbol", detector.get_test_symbol(*parts))
    inputs = (model.train_symbol if is_train else model.test_symbol).list_inputs()
    fill(config, "data_name", tuple(name for name in inputs if not name.startswith("rpn_")))
    fill(config, "label_name", tuple(name for name in inputs if name.startswith("rpn_")))


def _derive_input(config: Config, is_train: bool) -> None:
    fill(config, "transform", config.get_transform(config, is_train))
    fill(config, "test_transform", config.get_transform(config, False))
    fill(config, "metric_list", config.get_metric(config))
