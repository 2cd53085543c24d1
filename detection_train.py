"""Train a detector from a config file.

python3 detection_train.py --config config/NASFPN/retina_r50v1b_nasfpn_640_7@256_25epoch.py
python3 detection_train.py --config ... --gpus cpu --set General.batch_image=1 --dry-run
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from config.load import format_config, load_config
from core.cli import add_config_arguments, overrides, run


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a detector from a config file.")
    add_config_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="describe the run and stop; needs no data")
    parser.add_argument("--resume", action="store_true", help="continue from the experiment's newest checkpoint")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; returns the exit status."""
    parsed = parse_arguments(arguments)
    config = load_config(parsed.config, is_train=True, overrides=overrides(parsed))
    if parsed.dry_run:
        from core.report.dry_run import describe_run

        print(format_config(config))
        print(describe_run(config))
        return 0
    from core.detection_module import check_run, fit
    from core.distributed.launch import launch
    from core.distributed.process_group import launched_size
    from core.engines import choose_engine

    num_process = choose_engine(parsed.engine).num_process(config, is_train=True)
    if launched_size() is None and num_process > 1:
        check_run(config, parsed.resume, parsed.engine)
        given = list(sys.argv[1:] if arguments is None else arguments)
        return launch(__file__, given, num_process, again=["--resume"])
    return fit(config, format_config(config), resume=parsed.resume, engine=parsed.engine)


if __name__ == "__main__":
    run(main)
