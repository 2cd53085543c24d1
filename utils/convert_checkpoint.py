"""Convert weights between MXNet's .params and .safetensors, in the direction given by the file names.

    python3 utils/convert_checkpoint.py retina-0025.params retina.safetensors
    python3 utils/convert_checkpoint.py experiments/demo/checkpoint-0012.safetensors demo-0012.params

Names and shapes do not change, except for MXNet's prefixes `arg:` and `aux:`. The .safetensors file is a checkpoint,
for ModelParam.init_from and `detection_test.py --checkpoint`. Its epoch is that in the name of the .params file; it has
no class names. MXNet is not needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout is used in place

import safetensors.torch

from core.run.atomic_file import atomic_file
from core.weights.checkpoint import WEIGHTS_SUFFIX, read_tensors, refuse_state
from core.weights.first_weights import load_given_weights
from core.weights.params_file import SUFFIX, write_params


def convert(source: Path, target: Path, force: bool = False) -> int:
    """Write the tensors of `source` to `target` and return their number. `target` is written atomically.

    Raises:
        FileNotFoundError: no file `source`.
        FileExistsError: `target` exists, and `force` is not set.
        ValueError: the names do not end in .params and .safetensors, the source is damaged, or the other format cannot
            store its content.
        OSError: `target` cannot be written.
    """
    if {source.suffix, target.suffix} != {SUFFIX, WEIGHTS_SUFFIX}:
        raise ValueError(f"expected one {SUFFIX} and one {WEIGHTS_SUFFIX} file, got {source} and {target}")
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists: give another name, or --force to replace it")
    if source.suffix == SUFFIX:
        tensors, progress = load_given_weights(source)
        if "__metadata__" in tensors:
            raise ValueError(f"{source} holds '__metadata__', a name that {WEIGHTS_SUFFIX} keeps for itself: rename it")
        content = safetensors.torch.save(tensors, progress.to_metadata())
        with atomic_file(target) as handle:
            handle.write(content)
    else:
        refuse_state(source)
        tensors = read_tensors(source)
        write_params(target, tensors)
    return len(tensors)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Convert weights between MXNet's .params and .safetensors.")
    parser.add_argument("source", metavar="FROM", type=Path)
    parser.add_argument("target", metavar="TO", type=Path)
    parser.add_argument("--force", action="store_true", help="replace TO if it exists")
    parsed = parser.parse_args(arguments)
    try:
        number = convert(parsed.source, parsed.target, parsed.force)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{parsed.target}: {number} tensors")


if __name__ == "__main__":
    main()
