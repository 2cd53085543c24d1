"""The command line of both scripts: their common arguments, and errors as one message."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable


def add_config_arguments(parser: argparse.ArgumentParser, config_is_required: bool = True) -> None:
    """Add the arguments that training and testing share."""
    parser.add_argument("--config", required=config_is_required, help="a config file, e.g. one of config/NASFPN/")
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
    parser.add_argument("--engine", choices=["torch", "mxnet"], default="torch", help="the back end; see doc/mxnet.md")


def overrides(arguments: argparse.Namespace) -> list[str]:
    """Return the --set values, and those that --gpus, --processes and --data-root are short for."""
    if arguments.gpus is not None and not re.fullmatch(r"cpu|\d+(,\d+)*", arguments.gpus):
        raise ValueError(f"--gpus: expected cpu or device numbers such as 0, got {arguments.gpus!r}")
    short = {
        "KvstoreParam.gpus": arguments.gpus,
        "KvstoreParam.processes": arguments.processes,
        "DatasetParam.data_root": arguments.data_root,
    }
    return [*arguments.set, *(f"{key}={value}" for key, value in short.items() if value is not None)]


def run(program: Callable[[], int | None]) -> None:
    """Call a program's main and exit with its status; an error that a user can correct is one message and status 1."""
    try:
        sys.exit(program())
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        if os.environ.get("NECKLACE_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        from core.distributed.process_group import RETRY, LostProcessError

        if not isinstance(error, LostProcessError):
            raise
        print(error, file=sys.stderr)
        time.sleep(3)  # let the rank that failed exit first, so that its error is the one reported
        sys.exit(RETRY)
    except KeyboardInterrupt:
        sys.exit(130)
