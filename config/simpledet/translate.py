"""Translation of a SimpleDet config file into a `Config`.

Its get_config returns 13 values: nine classes (sections), transforms, names of data and labels, metrics. Most fields
have the same name and meaning here and are copied by name. Fields that SimpleDet states twice are derived from one
field here: the two must agree. Settings that work differently here or are ignored produce a note in the log.
"""

from __future__ import annotations

import ast
import difflib
import math
import re
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import models.FPG.builder as fpg
import models.NASFPN.builder as nasfpn
import models.retinanet.builder as retinanet
from config.NASFPN.recipe import retina_metric
from config.schema import Config
from config.section import assign, leaves
from config.simpledet.fields import agree, fields, is_identity, number, shown
from config.simpledet.names import Graph, Normalizer, Part, declared_classes, unsupported
from config.simpledet.schedule import Iterations
from config.simpledet.settle import Translation
from config.simpledet.transforms import read_transform
from models.backbone.resnet import default_prefix, variant_of

SECTIONS = (
    "General",
    "KvstoreParam",
    "RpnParam",
    "RoiParam",
    "BboxParam",
    "DatasetParam",
    "ModelParam",
    "OptimizeParam",
    "TestParam",
)
_OTHERS = ("BackboneParam", "NeckParam", "NormParam", "ResizeParam", "PadParam", "AnchorTarget2DParam", "RenameParam")
_RETURNED = "General, KvstoreParam, ..., TestParam, transform, data_name, label_name, metric_list"
_BACKBONE = re.compile(r"MSRAResNet(18|34|50|101|152)(V1b?)FPN")
_BACKBONES = ("ResNetV1bFPN", "MSRAResNetV1bFPN", "MSRAResNetV1FPN")
_NECKS = ("NASFPNNeck", "TopDownBottomUpFPNNeck", "PAFPNNeckP3P7", "RetinaNetNeckWithBN", "RetinaNetNeck")
_HEADS = ("RetinaNetHeadWithBN", "RetinaNetHead")
_NORMALIZERS = {"local": "localbn", "sync": "syncbn", "fix": "fixbn"}
_ROIDB = (
    "data/cache/*.roidb is not read, nor any other pickle: images and boxes come from the COCO json of the image sets"
)
_INPUT = (
    "images are resized, cropped and flipped as uint8 by the workers; Norm2DImage, ConvertImageFromHwcToChw and "
    "PyramidAnchorTarget2D then run on whole batches, on the training device"
)


def translate(result: tuple[Any, ...], is_train: bool, tree: ast.Module) -> Translation:
    """Return the translation of the result of a SimpleDet file's get_config(is_train).

    tree: the file's syntax tree.

    Raises ValueError for contradictory and for unsupported settings.
    """
    if len(result) != 13:
        raise ValueError(f"get_config: expected the 13 values of a SimpleDet file ({_RETURNED}), got {len(result)}")
    return _Reader(result, is_train).read(tree)


class _Reader:
    """Reader of the file's fields. Each step removes the fields that it reads; the remaining ones are reported."""

    def __init__(self, result: tuple[Any, ...], is_train: bool) -> None:
        self.is_train = is_train
        self.config = Config()
        self.notes = [_ROIDB]
        self._note_training(_INPUT)
        *sections, transform, self.data_name, self.label_name, self.metrics = result
        self.given: dict[str, Any] = {}  # fields still to be read: dotted key to value
        for name, section in zip(SECTIONS, sections, strict=True):
            self._add(name, section)
        self.graph = self._take_graph()
        for name, part in zip(("BackboneParam", "NeckParam"), self.graph.parts, strict=False):
            self._add(name, _only_argument(part, name))
        if _only_argument(self.graph.parts[2], "RpnParam") is not sections[2]:
            raise ValueError("RpnParam: the head was built from a different class than get_config returns")
        self.input = read_transform(transform, is_train)
        for name, section in self.input.sections.items():
            self._add(name, section)

    def read(self, tree: ast.Module) -> Translation:
        for step in (self._copies, self._normalizer, self._network, self._anchors, self._input, self._run, self._test):
            step()
        fixed, excluded = self._pretrain()
        annotation = self._take("TestParam.coco.annotation")
        translation = Translation(
            config=self.config,
            notes=self.notes,
            is_train=self.is_train,
            resize=self.input.resize,
            annotation=None if annotation is None or self.is_train else str(annotation),
            iterations=self._optimizer(),
            fixed=fixed,
            excluded=excluded,
            memonger_until=self._memonger_until(),
            label_name=self.label_name,
        )
        self._take_over()
        self._report_undeclared(tree)
        return translation

    def _add(self, name: str, section: Any) -> None:
        """Add a section's fields to `given`. None means unset in SimpleDet."""
        self.given |= {key: value for key, value in fields(name, section) if value is not None}

    def _note_training(self, note: str) -> None:
        """Add a note that concerns training only."""
        if self.is_train:
            self.notes.append(note)

    def _take(self, key: str, default: Any = None) -> Any:
        return self.given.pop(key, default)

    def _set(self, key: str) -> Any:
        """Copy a field of the same name into the config, and return its converted value."""
        path, _, name = key.rpartition(".")
        section = attrgetter(path)(self.config)
        if key in self.given:
            assign(section, name, self._take(key), key)
        return getattr(section, name)

    def _take_graph(self) -> Graph:
        name = "train_symbol" if self.is_train else "test_symbol"
        graph = self._take(f"ModelParam.{name}")
        self._take("ModelParam.test_symbol" if self.is_train else "ModelParam.train_symbol")
        is_known = isinstance(graph, Graph) and len(graph.parts) == 3 and graph.detector.name == "RetinaNet"
        if not is_known or not all(isinstance(part, Part) for part in graph.parts):
            found = f"{graph!r:.200}"
            if isinstance(graph, Graph):
                found = f"{graph.detector} of {', '.join(str(part) for part in graph.parts)}"
            raise ValueError(
                f"ModelParam.{name}: expected RetinaNet().get_{name}(backbone, neck, head), but {unsupported(found)}"
            )
        return graph

    def _copies(self) -> None:
        """Check the fields that repeat those of another section."""
        for name in ("fp16", "batch_image"):
            source = f"General.{name}"
            value = self._set(source)
            for key in [key for key in self.given if key.endswith(f".{name}")]:
                agree(key, self._take(key), source, value)
        if not self.is_train:
            self.config.TestParam.batch_image = self.config.General.batch_image

    def _normalizer(self) -> None:
        used = {key: self._take(key) for key in list(self.given) if key.endswith(".normalizer")}
        if not used:
            return
        first, normalizer = next(iter(used.items()))
        for key, value in used.items():
            agree(key, value, first, normalizer)
        if not isinstance(normalizer, Normalizer):
            raise ValueError(f"{first}: expected mxnext.complicate.normalizer_factory(...), got {normalizer!r:.200}")
        target, type = self.config.NormalizeParam, _NORMALIZERS.get(normalizer.type, normalizer.type)
        assign(target, "type", type, "normalizer_factory(type)")
        assign(target, "wd_mult", normalizer.wd_mult, "normalizer_factory(wd_mult)")
        assign(target, "momentum", normalizer.mom, "normalizer_factory(mom)")
        assign(target, "eps", normalizer.eps, "normalizer_factory(eps)")
        assign(target, "lr_mult", normalizer.lr_mult, "normalizer_factory(lr_mult)")
        num_gpu = len(self._set("KvstoreParam.gpus"))
        if type == "syncbn" and normalizer.ndev != num_gpu:
            self._note_training(
                f"normalizer_factory(ndev={normalizer.ndev}), but KvstoreParam.gpus has {num_gpu} devices: batch "
                "statistics are computed over all processes"
            )

    def _network(self) -> None:
        model, (backbone, neck, head) = self.config.ModelParam, self.graph.parts
        model.detector = retinanet.RetinaNet
        name, match = backbone.name, _BACKBONE.fullmatch(backbone.name)
        if match:
            self.given["BackboneParam.depth"] = int(match[1])
            name = {"V1b": "ResNetV1bFPN", "V1": "MSRAResNetV1FPN"}[match[2]]
        model.backbone = _class(backbone, _BACKBONES, name, "backbone")
        model.neck = _class(neck, _NECKS, neck.name, "neck")
        model.head = _class(head, _HEADS, head.name, "head")
        if issubclass(model.neck, retinanet.RetinaNetNeck):
            self.config.NeckParam.num_stage = 1

    def _anchors(self) -> None:
        """Read the anchors, which are declared in RpnParam for the graph and in AnchorTarget2DParam for the targets."""
        generate = "AnchorTarget2DParam.generate."
        for name, twin in {"scale": "scales", "ratio": "aspects", "stride": "stride"}.items():
            key = f"RpnParam.anchor_generate.{name}"
            value, copy = self._set(key), self._take(generate + twin)
            if copy is not None:
                agree(generate + twin, copy, key, value)
        for side in ("short", "long"):
            key = f"ResizeParam.{side}"
            value, copy = self._set(key), self._take(generate + side)
            if copy is not None:
                expected = tuple(math.ceil(value / stride) for stride in self.config.RpnParam.anchor_generate.stride)
                agree(generate + side, copy, f"{key} ({value}) divided by the strides", expected)
        sample = "AnchorTarget2DParam.sample."
        for key in (f"{sample}image_anchor", f"{sample}pos_fraction", "RpnParam.anchor_generate.image_anchor"):
            self._replace(key, "no anchor is sampled, the focal loss uses all of them")

    def _input(self) -> None:
        self.notes += self.input.notes
        param = self.config.ResizeParam
        for side in ("short", "long"):
            pad = self._take(f"PadParam.{side}")
            if pad is not None:
                agree(f"PadParam.{side}", pad, f"ResizeParam.{side}", getattr(param, side))
        sync_loss = self._set("RpnParam.sync_loss")
        if self.is_train and self.input.average != sync_loss:
            presence = "is" if self.input.average else "is not"
            raise ValueError(
                f"RpnParam.sync_loss is {sync_loss}, but AverageFgCount {presence} in transform: the loss is divided "
                "by the average that it computes; use both or neither"
            )
        self.config.DatasetParam.flip = self.input.flip
        self.config.get_metric = retina_metric
        foreign = [str(one) for one in self.metrics if getattr(one, "name", None) != "FGAccMetric"]
        if foreign:
            self._note_training(f"metric_list: {', '.join(foreign)} not computed, only FGAccMetric is supported")

    def _run(self) -> None:
        if self.given.get("KvstoreParam.kvstore") == "nccl":
            self.given["KvstoreParam.kvstore"] = "device"
            self._note_training(
                "KvstoreParam.kvstore: 'nccl' is 'device' here; gradients of GPUs are always reduced with NCCL"
            )
        if self.config.General.fp16:
            self._note_training("General.fp16: losses are not scaled by a fixed 128; float16 uses dynamic loss scaling")
        if self._take("ModelParam.random"):
            self._note_training("ModelParam.random: random numbers are seeded by General.seed, not by the time")

    def _memonger_until(self) -> str | None:
        """Return the value, which takes effect only if memonger is on; an override may turn it on."""
        until: str | None = self._set("ModelParam.memonger_until")
        self.config.ModelParam.memonger_until = None
        return until

    def _optimizer(self) -> Iterations | None:
        schedule = "OptimizeParam.schedule."
        images = max(1, len(self._set("KvstoreParam.gpus"))) * max(1, self.config.General.batch_image)
        if self._take("OptimizeParam.optimizer.lr_mode", "step") != "step":
            raise ValueError("OptimizeParam.optimizer.lr_mode: expected 'step', the only supported schedule")
        lr, warmup_lr = self._take("OptimizeParam.optimizer.lr"), self._take("OptimizeParam.warmup.lr")
        if lr is not None:
            self.config.OptimizeParam.optimizer.lr_per_image = number(lr, "OptimizeParam.optimizer.lr") / images
            if warmup_lr is not None:
                factor = number(warmup_lr, "OptimizeParam.warmup.lr", or_zero=True) / lr
                self.config.OptimizeParam.warmup.lr_factor = factor
        self._replace(f"{schedule}begin_epoch", "--resume continues from the newest checkpoint", quiet=0)
        steps, warmup_step = self._take(f"{schedule}lr_iter", ()), self._take("OptimizeParam.warmup.iter") or 0
        if not self.is_train:
            self.given |= {f"{schedule}lr_epoch": (), "OptimizeParam.warmup.epoch": 0.0}
            return None
        if not all(isinstance(step, int | float) for step in (*steps, warmup_step)):
            raise ValueError(f"{schedule}lr_iter and warmup.iter: expected numbers of iterations, got {steps!r:.200}")
        return Iterations(tuple(round(one) for one in steps), round(warmup_step), images)

    def _pretrain(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        prefix = "ModelParam.pretrain."
        self._replace(f"{prefix}epoch", f"the file is found by {prefix}prefix", quiet=0)
        variant = variant_of(self.config.ModelParam.backbone)
        if self.given.get(f"{prefix}prefix") == default_prefix(self._set("BackboneParam.depth"), variant):
            self._take(f"{prefix}prefix")  # the default, so that it follows overrides of the depth
        excluded = tuple(self._take(f"{prefix}excluded_param") or ())
        self.given[f"{prefix}fixed_param"] = self._take(f"{prefix}fixed_param") or ()
        return self._set(f"{prefix}fixed_param"), excluded

    def _test(self) -> None:
        for name, arguments in (("process_roidb", 1), ("process_output", 2)):
            process = self._take(f"TestParam.{name}")
            if process is not None and not is_identity(process, arguments):
                self.notes.append(f"TestParam.{name} is not called: each image is tested once, at one scale")
        run, prefix = self.given.get("General.name"), self._take("TestParam.model.prefix")
        if prefix is not None and run is not None and prefix != f"experiments/{run}/checkpoint":
            self.notes.append(f"TestParam.model.prefix {prefix!r} is not read: pass a file with --checkpoint FILE")
        if self.given.get("TestParam.model.epoch") == self.given.get("OptimizeParam.schedule.end_epoch"):
            self._take("TestParam.model.epoch")  # the newest checkpoint after a complete training
        nms = self.given.get("TestParam.nms.type")
        if callable(nms):
            raise ValueError("TestParam.nms.type: expected 'nms', 'soft_linear' or 'soft_gaussian', got a function")

    def _replace(self, key: str, instead: str, quiet: Any = None) -> None:
        value = self._take(key, quiet)
        if value != quiet:
            self._note_training(f"{key} = {shown(value)} is not read: {instead}")

    def _take_over(self) -> None:
        """Copy the remaining fields that have the same name here, and note the others."""
        known = {key: section for key, section, entry in leaves(self.config) if "derived" not in entry.metadata}
        for key, value in self.given.items():
            if key in known:
                assign(known[key], key.rpartition(".")[2], value, key)
            else:
                siblings = [one for one in known if one.rpartition(".")[0] == key.rpartition(".")[0]]
                near = difflib.get_close_matches(key, siblings, 1, 0.8)
                hint = f"; did you mean {near[0].rpartition('.')[2]}?" if near else ""
                self.notes.append(f"{key} = {shown(value)} is not read: there is no such setting{hint}")

    def _report_undeclared(self, tree: ast.Module) -> None:
        """Note the classes of get_config that are not read. A file uses NormalizeParam.normalizer itself."""
        for name, assigned in declared_classes(tree).items():
            lost = [field for field in assigned if (name, field) != ("NormalizeParam", "normalizer")]
            if name not in (*SECTIONS, *_OTHERS) and lost:
                self.notes.append(f"{name}.{', '.join(lost)} not read, except by the file itself")


def _only_argument(part: Part, name: str) -> Any:
    if len(part.args) != 1:
        raise ValueError(f"{part}: expected one argument, {name}, got {len(part.args)} arguments")
    return part.args[0]


def _class(part: Part, known: Sequence[str], name: str, what: str) -> type:
    if name not in known:
        raise ValueError(unsupported(f"the {what} {part}"))
    found: type = next(getattr(module, name) for module in (fpg, nasfpn, retinanet) if hasattr(module, name))
    return found
