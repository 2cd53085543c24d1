"""Plot a training run from its JSON-lines log.

    python3 utils/plot_loss.py experiments/<name>/log.jsonl --out loss.png

Three panels over the step: the losses, the learning rate, and foreground accuracy with the evaluations' AP.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

from core.report.log_curves import Record, read_log, series, smooth

LOSSES = (("cls_loss", "classification", "#0072b2"), ("reg_loss", "box", "#d55e00"))
LR_COLOUR, ACCURACY_COLOUR, AP_COLOUR = "#4b5d8f", "#009e73", "#aa3377"


def _plot_noisy(axes: Axes, records: list[Record], key: str, label: str, colour: str) -> None:
    """Plot the values in a light colour and their running mean in full."""
    steps, values = series(records, key)
    if len(steps) == 0:
        return
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(values), color=colour, linewidth=1.8, label=label)


def _plot_evaluations(panels: Sequence[Axes], evaluations: list[Record]) -> None:
    """Plot a dotted line through all panels at every evaluation, and its AP as a point in the last panel."""
    steps, values = series(evaluations, "AP")
    for panel in panels:
        for step in steps:
            panel.axvline(step, color=AP_COLOUR, alpha=0.35, linewidth=0.8, linestyle=":")
    panels[-1].plot(steps, values, color=AP_COLOUR, marker="o", markersize=4, linewidth=1, label="AP (evaluation)")
    panels[-1].annotate(
        f"AP {values[-1]:.3f}",
        (steps[-1], values[-1]),
        textcoords="offset points",
        xytext=(-4, 6),
        ha="right",
        color=AP_COLOUR,
    )


def plot_loss(jsonl_path: str | Path, png_path: str | Path) -> None:
    """Plot losses, learning rate, foreground accuracy and evaluations of a training log into a PNG file.

    Raises as read_log does, and FileNotFoundError if the log or the folder of the picture is missing.
    """
    train, evaluations = read_log(jsonl_path)
    figure = Figure(figsize=(9, 8), dpi=120, layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.4, 2))
    loss, rate, accuracy = panels
    for key, label, colour in LOSSES:
        _plot_noisy(loss, train, key, label, colour)
    rate.plot(*series(train, "lr"), color=LR_COLOUR, linewidth=1.5)
    _plot_noisy(accuracy, train, "fg_acc", "foreground accuracy", ACCURACY_COLOUR)
    if evaluations:
        _plot_evaluations(panels, evaluations)
    for panel, name in zip(panels, ("loss", "learning rate", "accuracy, AP"), strict=True):
        panel.set_ylabel(name)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        if panel.get_legend_handles_labels()[1]:
            panel.legend(frameon=False)
    figure.suptitle(Path(jsonl_path).resolve().parent.name)
    accuracy.set_xlabel("step")
    accuracy.set_xlim(left=0)
    figure.savefig(png_path, format="png")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw losses, learning rate and accuracy of a training log.")
    parser.add_argument("log", help="the JSON-lines log of a run")
    parser.add_argument("--out", help="PNG file to write (default: beside the log)")
    options = parser.parse_args(arguments)
    out = options.out or str(Path(options.log).with_suffix(".png"))
    try:
        plot_loss(options.log, out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from error
    print(out)


if __name__ == "__main__":
    main()
