"""The schema of an experiment: one typed tree with a section per concern.

Section and field names are SimpleDet's. A `derived` field is computed by `config.derive` from other fields and cannot
be set. A `required` field has no default: the config file sets it. `at_least`, `above`, `between`, `positive` and
`bounded` give a field's bounds and its default. Boxes are xyxy in input pixels with inclusive corners; sizes are in
input pixels.
"""

# ruff: noqa: RUF009 (derived, required and the bounds return dataclass fields)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from config.image_set import ImageSet
from config.section import Section, above, at_least, between, bounded, derived, positive, required
from models.record import BatchTransform
from symbol import Symbol


@dataclass(kw_only=True, slots=True)
class General(Section):
    """Settings of the whole run."""

    name: str | None = bounded("a folder name or None (the config file's stem)", bool, None)  # under output_root
    output_root: str = "experiments"
    batch_image: int = at_least(1, 8)  # images per device per step
    fp16: bool = True  # half precision: float16 with dynamic loss scaling
    bf16: bool = False  # bfloat16 instead of float16
    tf32: bool | None = None  # float32 convolutions on a GPU in TF32; None: only in half-precision runs
    cuda_graph: bool = False  # on a GPU: forward and backward of full batches as CUDA graphs, at some cost in memory
    compile: bool = False  # torch.compile of the train graph: minutes at the start, per input shape
    deterministic: bool = False  # on a GPU: bitwise reproducible steps, at some cost in speed
    seed: int = at_least(0, 0)
    keep_checkpoints: int = at_least(0, 0)  # number of most recent epochs whose checkpoints are kept; 0: all
    checkpoint_minutes: float = at_least(0, 0.0)  # between checkpoints; 0: at the end of an epoch or of the run
    log_frequency: int = at_least(1, 10)  # steps between log lines
    # decoding processes; 0 decodes in the training process, None: by the cores at hand, at most 4
    loader_worker: int | None = at_least(0, None)


@dataclass(kw_only=True, slots=True)
class KvstoreParam(Section):
    """Devices, processes and machines."""

    kvstore: Literal["local", "device", "dist_sync"] = "local"  # dist_sync: several machines, under torchrun
    gpus: tuple[int, ...] = bounded(  # device numbers on each machine; () trains on the CPU
        "distinct device numbers, 0 or more",
        lambda gpus: len(set(gpus)) == len(gpus) and min(gpus, default=0) >= 0,
        (0, 1, 2, 3, 4, 5, 6, 7),
    )
    processes: int = at_least(1, 1)  # CPU training only (gpus is ()); with the mxnet engine: devices of one process
    machines: int = at_least(1, 1)
    num_device: int = derived("gpus, processes and machines of KvstoreParam")
    batch_image: int = derived("General.batch_image")
    fp16: bool = derived("General.fp16 and bf16")

    @property
    def devices_per_machine(self) -> int:
        return len(self.gpus) or self.processes


@dataclass(kw_only=True, slots=True)
class NormalizeParam(Section):
    """Batch normalisation of backbone, neck and head."""

    type: Literal["localbn", "syncbn", "fixbn"] = "localbn"
    wd_mult: float = at_least(0, 0.0)  # weight decay of gamma and beta, relative to OptimizeParam.optimizer.wd
    momentum: float = between(0, 1, 0.9)  # of the moving statistics; raise it if a level has few cells per batch
    eps: float = above(0, 1e-5)  # added to the variance
    lr_mult: float = at_least(0, 1.0)  # learning rate of gamma and beta, relative to lr; 0: not trained
    normalizer: Callable[..., Symbol] = derived("the other fields of NormalizeParam and KvstoreParam.num_device")


@dataclass(kw_only=True, slots=True)
class BackboneParam(Section):
    """The ResNet. ModelParam.backbone selects v1b (stride in the 3x3 convolution) or v1 (stride in the first 1x1)."""

    depth: Literal[18, 34, 50, 101, 152] = 50
    num_filter: int = at_least(1, 64)  # channels of the stem; those of all stages follow
    normalizer: Callable[..., Symbol] = derived("NormalizeParam")
    fp16: bool = derived("General.fp16 and bf16")


@dataclass(kw_only=True, slots=True)
class NeckParam(Section):
    """The stacked pyramid."""

    dim_reduced: int = at_least(1, 256)  # channels of every level
    num_stage: int = at_least(1, 7)  # repetitions of the pyramid
    S0_kernel: int = bounded(  # kernel of the lateral convolutions
        "an odd number (1, 3, ...), which preserves the feature map size", lambda side: side > 0 and side % 2 == 1, 1
    )
    normalizer: Callable[..., Symbol] = derived("NormalizeParam")
    fp16: bool = derived("General.fp16 and bf16")


@dataclass(kw_only=True, slots=True)
class AnchorGenerate(Section):
    scale: tuple[float, ...] = positive((4.0, 4.0 * 2 ** (1 / 3), 4.0 * 2 ** (2 / 3)))  # times the stride
    ratio: tuple[float, ...] = positive((0.5, 1.0, 2.0))  # height / width
    stride: tuple[int, ...] = (8, 16, 32, 64, 128)


@dataclass(kw_only=True, slots=True)
class Head(Section):
    conv_channel: int = at_least(1, 256)
    num_conv: int = at_least(1, 4)  # convolutions before the prediction, in each subnet
    fp32_predict: bool = True  # predictions in float32; False: in the half type of General.fp16 or bf16


@dataclass(kw_only=True, slots=True)
class Proposal(Section):
    pre_nms_top_n: int = at_least(1, 1000)  # candidates kept per level
    min_det_score: float = between(0, 1, 0.05)  # candidates below are dropped (0 on the coarsest level)


@dataclass(kw_only=True, slots=True)
class FocalLoss(Section):
    """Lin et al. 2017, "Focal Loss for Dense Object Detection", equation 5."""

    alpha: float = between(0, 1, 0.25)
    gamma: float = at_least(0, 2.0)


@dataclass(kw_only=True, slots=True)
class RpnParam(Section):
    """The RetinaNet head, its anchors, its losses and its decoding."""

    num_class: int | None = bounded(
        "the foreground classes + 1, at least 2, or None to count them in the annotations", lambda n: n >= 2, None
    )
    sync_loss: bool = False  # divide both losses by the foreground count averaged over all devices
    anchor_generate: AnchorGenerate = field(default_factory=AnchorGenerate)
    head: Head = field(default_factory=Head)
    proposal: Proposal = field(default_factory=Proposal)
    focal_loss: FocalLoss = field(default_factory=FocalLoss)
    normalizer: Callable[..., Symbol] = derived("NormalizeParam")
    fp16: bool = derived("General.fp16 and bf16")


@dataclass(kw_only=True, slots=True)
class DatasetParam(Section):
    """The images of this phase, training or testing."""

    image_set: tuple[str | ImageSet, ...] = bounded(
        "one or more distinct image sets, such as ('coco_train2017',)",
        lambda image_sets: 0 < len(image_sets) == len(set(image_sets)),
        ("coco_train2017", "coco_val2017"),
    )
    data_root: str = "data"
    flip: bool = True  # training: an epoch contains every image twice, once flipped
    bad_image: Literal["stop", "skip"] = "stop"  # training, for unreadable files; skip: another image replaces it
    bad_image_limit: int = at_least(1, 100)  # maximum number of skipped files per process
    class_names: tuple[str, ...] = derived("DatasetParam.image_set")  # empty if there are no annotations on disk


@dataclass(kw_only=True, slots=True)
class Pretrain(Section):
    prefix: str | None = None  # None: pretrain_model/resnet<depth>_v1b, v1: resnet-v1-<depth>; the suffix is optional
    fixed_param: tuple[str, ...] = ("conv0",)  # frozen parameters by name prefix; ignored from scratch


@dataclass(kw_only=True, slots=True)
class ModelParam(Section):
    """The classes that build the network, the source of its initial weights, and the graphs."""

    detector: type = required("config.ModelParam.detector = RetinaNet")
    backbone: type = required("config.ModelParam.backbone = ResNetV1bFPN")
    neck: type = required("config.ModelParam.neck = NASFPNNeck")
    head: type = required("config.ModelParam.head = RetinaNetHeadWithBN")
    from_scratch: bool = False
    init_from: str | None = None  # a checkpoint to fine-tune from: matching tensors are loaded, others reported
    memonger: bool = False  # recompute activations in the backward pass to save memory
    memonger_until: str | None = None  # recompute from the input up to this node; None: minimise memory
    # GiB, as counted by --dry-run: recompute only as much as needed
    memonger_budget: float | None = bounded("more than 0 (GiB)", lambda gib: gib > 0, None)
    pretrain: Pretrain = field(default_factory=Pretrain)
    train_symbol: Symbol = derived("backbone, neck and head")
    test_symbol: Symbol = derived("backbone, neck and head")


@dataclass(kw_only=True, slots=True)
class Optimizer(Section):
    type: Literal["sgd"] = "sgd"
    lr_per_image: float = above(0, 0.01 / 8)  # the linear rule: lr = lr_per_image * global_batch_size
    lr: float | None = above(0, None)  # None: from the linear rule
    momentum: float = between(0, 1, 0.9)
    wd: float = at_least(0, 1e-4)
    clip_gradient: float | None = above(0, None)  # each gradient element is clipped to [-clip, clip]


@dataclass(kw_only=True, slots=True)
class Schedule(Section):
    end_epoch: int = at_least(1, 25)
    lr_epoch: tuple[float, ...] = (15.0, 20.0)  # epochs after which lr is multiplied by lr_factor
    lr_factor: float = above(0, 0.1)


@dataclass(kw_only=True, slots=True)
class Warmup(Section):
    type: Literal["gradual"] = "gradual"
    epoch: float = at_least(0, 1.0)  # length
    lr_factor: float = between(0, 1, 0.1)  # lr starts at lr_factor * lr


@dataclass(kw_only=True, slots=True)
class OptimizeParam(Section):
    accumulate: int = at_least(1, 1)  # gradient accumulation: batches of General.batch_image per device per update
    global_batch_size: int = derived("General.batch_image, KvstoreParam.num_device and OptimizeParam.accumulate")
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    warmup: Warmup = field(default_factory=Warmup)


@dataclass(kw_only=True, slots=True)
class TestModel(Section):
    prefix: str = derived("General.name")  # experiments/<name>/checkpoint
    epoch: int | None = None  # None: the newest


@dataclass(kw_only=True, slots=True)
class Nms(Section):
    """Suppression of overlapping detections per class: "nms" drops those covered by a higher score; the soft variants
    lower their scores (Bodla et al. 2017, "Soft-NMS")."""

    type: Literal["nms", "soft_linear", "soft_gaussian"] = "nms"
    thr: float = between(0, 1, 0.5)  # IoU threshold (inclusive corners), per class; unused by soft_gaussian
    sigma: float = above(0, 0.5)  # soft_gaussian: scores are multiplied by exp(-IoU^2 / sigma)
    min_score: float = between(0, 1, 0.001)  # soft: detections are dropped once their score falls to this value


@dataclass(kw_only=True, slots=True)
class Coco(Section):
    annotation: str | None = None  # None: the image set's own


@dataclass(kw_only=True, slots=True)
class TestParam(Section):
    """Testing, including evaluation between training epochs."""

    min_det_score: float = between(0, 1, 0.0)
    max_det_per_image: int = at_least(1, 100)
    batch_image: int = at_least(1, 1)
    eval_epoch: int = at_least(0, 0)  # epochs between evaluations during training; 0: never
    eval_image_set: str | ImageSet | None = None  # image set of these evaluations
    image_set: tuple[str | ImageSet, ...] = derived("DatasetParam.image_set of testing, get_config(False)")
    model: TestModel = field(default_factory=TestModel)
    nms: Nms = field(default_factory=Nms)
    coco: Coco = field(default_factory=Coco)


@dataclass(kw_only=True, slots=True)
class NormParam(Section):
    mean: tuple[float, float, float] = (123.688, 116.779, 103.939)  # RGB
    std: tuple[float, float, float] = positive((58.393, 57.12, 57.375))


@dataclass(kw_only=True, slots=True)
class ResizeParam(Section):
    """The input size. Sides are multiples of 128, the coarsest stride."""

    short: int = at_least(1, 640)
    long: int = at_least(1, 640)
    scale_min: float = above(0, 0.8)  # training: scale to fit, times U(scale_min, scale_max)
    scale_max: float = 1.2


@dataclass(kw_only=True, slots=True)
class PadParam(Section):
    short: int = derived("ResizeParam.short")
    long: int = derived("ResizeParam.long")
    max_num_gt: int = at_least(1, 100)  # boxes per image; the largest are kept


@dataclass(kw_only=True, slots=True)
class Generate(Section):
    short: tuple[int, ...] = derived("ResizeParam.short and the strides")  # feature map sides
    long: tuple[int, ...] = derived("ResizeParam.long and the strides")
    stride: tuple[int, ...] = derived("RpnParam.anchor_generate.stride")
    scales: tuple[float, ...] = derived("RpnParam.anchor_generate.scale")
    aspects: tuple[float, ...] = derived("RpnParam.anchor_generate.ratio")


@dataclass(kw_only=True, slots=True)
class Assign(Section):
    allowed_border: float = at_least(0, 9999.0)
    pos_thr: float = between(0, 1, 0.5)
    neg_thr: float = between(0, 1, 0.5)
    min_pos_thr: float = between(0, 1, 0.0)


@dataclass(kw_only=True, slots=True)
class Sample(Section):
    """No sampling: RetinaNet trains on every anchor."""

    image_anchor: None = None
    pos_fraction: None = None


@dataclass(kw_only=True, slots=True)
class AnchorTarget2DParam(Section):
    generate: Generate = field(default_factory=Generate)
    assign: Assign = field(default_factory=Assign)
    sample: Sample = field(default_factory=Sample)


@dataclass(kw_only=True, slots=True)
class RenameParam(Section):
    mapping: dict[str, str] = field(default_factory=lambda: {"image": "data"})


@dataclass(kw_only=True, slots=True)
class Transform:
    """Input transforms in order: `sample` runs per record in a worker (uint8), `batch` per batch on the device.

    A sample transform has apply(record); batch transforms derive from BatchTransform.
    """

    sample: list[Any]
    batch: list[BatchTransform]


@dataclass(kw_only=True, slots=True)
class Config(Section):
    """The config tree. A config file's get_config(is_train) returns one; `config.load.load_config` completes it."""

    General: General = field(default_factory=General)
    KvstoreParam: KvstoreParam = field(default_factory=KvstoreParam)
    NormalizeParam: NormalizeParam = field(default_factory=NormalizeParam)
    BackboneParam: BackboneParam = field(default_factory=BackboneParam)
    NeckParam: NeckParam = field(default_factory=NeckParam)
    RpnParam: RpnParam = field(default_factory=RpnParam)
    DatasetParam: DatasetParam = field(default_factory=DatasetParam)
    ModelParam: ModelParam = field(default_factory=ModelParam)
    OptimizeParam: OptimizeParam = field(default_factory=OptimizeParam)
    TestParam: TestParam = field(default_factory=TestParam)
    NormParam: NormParam = field(default_factory=NormParam)
    ResizeParam: ResizeParam = field(default_factory=ResizeParam)
    PadParam: PadParam = field(default_factory=PadParam)
    AnchorTarget2DParam: AnchorTarget2DParam = field(default_factory=AnchorTarget2DParam)
    RenameParam: RenameParam = field(default_factory=RenameParam)
    get_transform: Callable[[Config, bool], Transform] = required("config.get_transform = retina_transform")
    get_metric: Callable[[Config], list[Any]] = required("config.get_metric = retina_metric")
    transform: Transform = derived("get_transform")  # of this phase
    test_transform: Transform = derived("get_transform")  # of testing, including evaluation between training epochs
    metric_list: list[Any] = derived("get_metric")
    data_name: tuple[str, ...] = derived("the graph")  # inputs of the graph that are data
    label_name: tuple[str, ...] = derived("the graph")  # inputs of the graph that are labels
    source: str = derived("the config file")  # its path
    notes: list[str] = derived("the config file")  # settings of a SimpleDet file that are ignored or changed
