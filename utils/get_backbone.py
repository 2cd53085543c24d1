"""Download an ImageNet backbone to the path where training looks for it.

    python3 utils/get_backbone.py --depth 50

The weights are timm's copies of torchvision's (BSD-3-Clause), on the Hugging Face hub. They are ResNet v1b.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout is used in place

from core.run.atomic_file import atomic_file
from core.weights.backbone_names import depth_of
from core.weights.pretrain import read_backbone
from models.backbone.resnet import default_prefix

FILE_NAME = "model.safetensors"


def get_backbone(depth: int, out: Path) -> None:
    """Download ResNet-`depth` to `out`.

    Raises:
        ModuleNotFoundError: huggingface_hub is not installed.
        OSError: the download failed, or `out` cannot be written.
        ValueError: the downloaded file is not that network.
    """
    repository = f"timm/resnet{depth}.tv_in1k"
    by_hand = f"or download {FILE_NAME} of {repository} on the Hugging Face hub by other means and put it at {out}"
    try:
        from huggingface_hub import hf_hub_download
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"huggingface_hub is not installed: pip install huggingface-hub, {by_hand}") from None
    try:
        downloaded = Path(hf_hub_download(repository, FILE_NAME))
    except OSError as error:
        raise OSError(f"cannot download {FILE_NAME} of {repository}: {error}. Try again, {by_hand}") from error
    found = depth_of(read_backbone(downloaded).tensors)
    if found != depth:
        raise ValueError(f"{repository} holds ResNet-{found}, not ResNet-{depth}: give another file by hand")
    with atomic_file(out) as handle:
        handle.write(downloaded.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description="Download an ImageNet backbone to where training looks for it.")
    parser.add_argument("--depth", type=int, choices=(18, 34, 50, 101, 152), default=50)
    parser.add_argument("--out", type=Path, help="default: pretrain_model/resnet<depth>_v1b.safetensors")
    arguments = parser.parse_args()
    out = arguments.out or Path(default_prefix(arguments.depth, "v1b") + ".safetensors")
    try:
        get_backbone(arguments.depth, out)
    except (ModuleNotFoundError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(out)


if __name__ == "__main__":
    main()
