"""Overrides of the demo for a network so small that a step takes a tenth of a second."""

from pathlib import Path

DEMO = Path(__file__).parents[1] / "config" / "demo" / "retina_r18v1b_nasfpn_128_2@48_demo.py"
SMALL_NETWORK = [
    "General.loader_worker=0",
    "BackboneParam.num_filter=8",
    "NeckParam.dim_reduced=8",
    "NeckParam.num_stage=1",
    "RpnParam.head.conv_channel=8",
    "RpnParam.head.num_conv=1",
]
