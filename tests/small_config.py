"""Overrides for small networks and short trainings, shared by the tests. A later override replaces an earlier one."""

from pathlib import Path

DEMO = Path(__file__).parents[1] / "config" / "demo" / "retina_r18v1b_nasfpn_128_2@48_demo.py"
NARROW = ["BackboneParam.num_filter=8", "NeckParam.dim_reduced=8", "RpnParam.head.conv_channel=8"]
# the demo with a step that takes a tenth of a second
SMALL_NETWORK = ["General.loader_worker=0", *NARROW, "NeckParam.num_stage=1", "RpnParam.head.num_conv=1"]
SMALL_TRAINING = [
    *SMALL_NETWORK,
    "General.batch_image=4",
    "General.log_frequency=2",
    "TestParam.eval_epoch=0",
    "OptimizeParam.optimizer.lr=0.01",
    "OptimizeParam.schedule.end_epoch=3",
    "OptimizeParam.schedule.lr_epoch=2",
    "OptimizeParam.warmup.epoch=0.5",
]
