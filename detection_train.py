"""Train a detector from a config file.

python3 detection_train.py --config config/NASFPN/retina_r50v1b_nasfpn_640_7@256_25epoch.py
python3 detection_train.py --config ... --gpus cpu --set General.batch_image=1 --dry-run
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Sequence

from config.load import format_config, load_config


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a detector from a config file.")
    add_config_arguments(parser)
    parser.add_argument("--engine", choices=["torch", "mxnet"], default="torch", help="what computes; see README")
    parser.add_argument("--dry-run", action="store_true", help="describe the run and stop; needs no data")
    parser.add_argument("--resume", action="store_true", help="go on from the experiment's newest checkpoint")
    return parser.parse_args(arguments)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that training and testing share."""
    parser.add_argument("--config", required=True, help="a config file, e.g. one of config/NASFPN/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="change a field before anything is derived from it; may be repeated",
    )
    parser.add_argument("--gpus", metavar="0,1|cpu", help="the devices, instead of KvstoreParam.gpus")
    parser.add_argument("--processes", metavar="N", help="how many processes on the CPU, instead of 1")
    parser.add_argument("--data-root", metavar="DIR", help="the folder of the image sets, instead of data")


def overrides(arguments: argparse.Namespace) -> list[str]:
    """The --set values, and what --gpus and --data-root are short for."""
    if arguments.gpus is not None and not re.fullmatch(r"cpu|\d+(,\d+)*", arguments.gpus):
        raise ValueError(f"--gpus: expected cpu or device numbers such as 0, got {arguments.gpus!r}")
    short = {
        "KvstoreParam.gpus": arguments.gpus,
        "KvstoreParam.processes": arguments.processes,
        "DatasetParam.data_root": arguments.data_root,
    }
    return [*arguments.set, *(f"{key}={value}" for key, value in short.items() if value is not None)]


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = parse_arguments(arguments)
    config = load_config(parsed.config, is_train=True, overrides=overrides(parsed))
    if parsed.dry_run:
        from core.report.dry_run import describe_run

        print(format_config(config))
        print(describe_run(config))
        return
    from core.detection_module import check_run, fit
    from core.distributed.launch import launch
    from core.distributed.process_group import launched_size

    if parsed.engine == "torch" and launched_size() is None and config.KvstoreParam.num_device > 1:
        check_run(config, parsed.resume)
        given = list(sys.argv[1:] if arguments is None else arguments)
        sys.exit(launch(__file__, given, config.KvstoreParam.num_device, again=["--resume"]))
    status = fit(config, format_config(config), resume=parsed.resume, engine=parsed.engine)
    if status:
        sys.exit(status)


def run(program: Callable[[], None]) -> None:
    """Call a program's main; an error that a user can mend is one message and exit status 1."""
    try:
        program()
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        if os.environ.get("NECKLACE_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        from core.distributed.process_group import RETRY, LostProcessError

        if not isinstance(error, LostProcessError):
            raise
        print(error, file=sys.stderr)
        time.sleep(3)  # whoever broke off for a reason of its own shall be the first to end
        sys.exit(RETRY)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run(main)
