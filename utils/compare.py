"""Compare the tests of several experiments on the same images.

    python3 utils/compare.py experiments/<baseline> experiments/<other> [experiments/<another> ...]

Prints their scores side by side, training speed and size, and, for every experiment against the first: the differences
with 95 % intervals (paired bootstrap: both are scored on the same resampled images), the classes that differ most, and
what one finds that the other misses. Reads <image_set>_result.json of each folder, which detection_test.py writes.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors

sys.path.insert(0, str(Path(__file__).parents[1]))

from config.image_set import require_annotation, resolve
from core.cli import run
from core.report.coco_files import Truth, read_found, read_json, read_truth
from core.report.detector_report.analysis import Analysis
from core.report.detector_report.bootstrap import RESAMPLED, draw_weights, interval
from core.report.evaluation import stat_names
from core.report.log_curves import read_log, series
from core.report.train_log import LOG_LINES
from core.weights.checkpoint import find_weights

SUFFIX = "_result.json"
NUM_CLASS = 5  # of the classes that differ most
NUM_IMAGE = 5  # of the images with most boxes that only one finds
MIB = 2**20


@dataclass(frozen=True)
class Experiment:
    """A tested experiment."""

    name: str
    folder: Path
    analysis: Analysis
    min_score: float  # from which on its detections count as found

    @property
    def found(self) -> np.ndarray:
        """(G,) bool: boxes that its detections find."""
        return self.analysis.kept_match.is_found


def common_image_set(folders: Sequence[Path], image_set: str | None) -> str:
    """Return the image set that all experiments were tested on. Raises ValueError if there is none, or a choice."""
    tested = []
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}: name the folders of experiments, experiments/<name>")
        tested.append({path.name.removesuffix(SUFFIX) for path in folder.glob(f"*{SUFFIX}")})
        if not tested[-1]:
            raise ValueError(f"{folder} has no <image_set>{SUFFIX}: test it with detection_test.py first")
    common = set.intersection(*tested)
    if image_set is not None and image_set not in common:
        raise ValueError(f"--image-set {image_set}: all experiments were tested on {sorted(common) or 'no common one'}")
    if image_set is None and len(common) != 1:
        every = "; ".join(
            f"{folder}: {', '.join(sorted(names))}" for folder, names in zip(folders, tested, strict=True)
        )
        advice = "choose one with --image-set" if common else "test them on the same images"
        raise ValueError(f"expected one image set that all experiments were tested on, got {every}: {advice}")
    return image_set or common.pop()


def read_experiments(
    folders: Sequence[Path], image_set: str, truth: Truth, min_score: float | None, max_det: int
) -> list[Experiment]:
    """Read the results. min_score: from which on detections count as found; None: each one's score of the best F1."""
    names = [folder.name for folder in folders]
    experiments = []
    for folder in folders:
        found = read_found(folder / f"{image_set}{SUFFIX}", truth)
        least = min_score
        if least is None:
            curve = Analysis(truth, found, 0.0, max_det).score_curve(None)
            least = curve.at(curve.best)[0] if curve.best is not None else 0.0
        name = folder.name if names.count(folder.name) == 1 else str(folder)
        experiments.append(Experiment(name, folder, Analysis(truth, found, least, max_det), least))
    return experiments


def score_lines(experiments: Sequence[Experiment], max_det: int) -> list[str]:
    """Return a table of the scores, training speed and size: a line per experiment."""
    width = max(len(one.name) for one in experiments)
    lines = [f"{'':<{width}}  " + "  ".join(f"{name:>5}" for name in stat_names(max_det))]
    for one in experiments:
        numbers = ("    -" if value < 0 else f"{value:.3f}" for value in one.analysis.evaluation.stats)
        lines.append(f"{one.name:<{width}}  " + "  ".join(numbers))
    lines += ["", f"{'':<{width}}  trained at images/s  parameters  weights file  detections"]
    for one in experiments:
        speed, parameters, size = training_speed(one.folder), *weights_size(one.folder)
        cells = (f"{speed:19.1f}" if speed else f"{'-':>19}", f"{parameters / 1e6:9.2f}M" if size else f"{'-':>10}")
        file = f"{size / MIB:8.1f} MiB" if size else f"{'-':>12}"
        lines.append(f"{one.name:<{width}}  {'  '.join(cells)}  {file}  {one.analysis.evaluation.num_detection:10}")
    return lines


def tested_max_det(folders: Sequence[Path], image_set: str) -> int:
    """Return the largest number of detections that the tests counted, from their scores files; 100 without any."""
    paths = [folder / f"{image_set}_scores.json" for folder in folders]
    return max([100, *(int(read_json(path)["max_det"]) for path in paths if path.is_file())])


def training_speed(folder: Path) -> float | None:
    """Return the median images per second of the run's log; None without a log."""
    if not (folder / LOG_LINES).is_file():
        return None
    steps, _ = read_log(folder / LOG_LINES)
    _, speeds = series(steps, "img_per_s")
    return float(np.median(speeds)) if len(speeds) else None


def weights_size(folder: Path) -> tuple[int, int]:
    """Return the numbers in the newest weights, BN statistics included, and the bytes of their file; 0 without one."""
    try:
        path = find_weights(folder)
    except FileNotFoundError:
        return 0, 0
    with safetensors.safe_open(path, framework="numpy") as file:
        count = sum(int(np.prod(file.get_slice(key).get_shape())) for key in file.keys())  # noqa: SIM118
    return count, path.stat().st_size


def difference_lines(first: Experiment, other: Experiment, num_resample: int) -> list[str]:
    """Return the differences of the scores, with intervals, and the classes that differ most."""
    one, two = first.analysis, other.analysis
    drawn = draw_weights(one.resampler.num_image, num_resample)
    differences = np.array([two.resampler.scores(weights) - one.resampler.scores(weights) for weights in drawn])
    lines = [f"{other.name} minus {first.name}"]
    for name, values in zip(RESAMPLED, differences.T, strict=True):
        low, high = interval(values)
        verdict = "larger" if low > 0 else "smaller" if high < 0 else "no clear difference"
        difference = two.evaluation.scores[name] - one.evaluation.scores[name]
        lines.append(f"  {name:<5} {difference:+.3f} ({low:+.3f} to {high:+.3f})  {verdict}")
    names = one.truth.class_names
    width = max(len(name) for name in names)
    pairs = zip(names, one.evaluation.classes, two.evaluation.classes, strict=True)
    classes = [(name, a.AP, b.AP) for name, a, b in pairs if a.num_box]
    classes.sort(key=lambda row: -abs(row[2] - row[1]))
    lines.append("  classes that differ most in AP:")
    for name, before, after in classes[:NUM_CLASS]:
        lines.append(f"    {name:<{width}}  {before:.3f} and {after:.3f}  {after - before:+.3f}")
    return lines


def found_lines(one: Experiment, other: Experiment) -> list[str]:
    """Return the boxes that `one` finds and `other` misses: how many, of which classes, in which images."""
    truth = one.analysis.truth
    only = one.found & ~other.found
    lines = [f"  found by {one.name}, missed by {other.name}: {int(only.sum())} boxes"]
    if only.any():
        classes = Counter(truth.class_names[k - 1] for k in truth.boxes.category[only].tolist()).most_common(NUM_CLASS)
        images = Counter(truth.boxes.image[only].tolist()).most_common(NUM_IMAGE)
        files = ((str(truth.images[i - 1].get("file_name", truth.image_ids[i - 1])), count) for i, count in images)
        lines.append("    classes: " + ", ".join(f"{name} {count}" for name, count in classes))
        lines.append("    images: " + ", ".join(f"{name} {count}" for name, count in files))
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare the tests of several experiments.")
    parser.add_argument("experiments", nargs="+", metavar="EXPERIMENT", help="folders; the first is the baseline")
    parser.add_argument("--image-set", metavar="NAME", help="needed if several are common to all experiments")
    parser.add_argument("--data-root", default="data", metavar="DIR", help="the folder of the image sets (data)")
    parser.add_argument("--annotation", metavar="FILE", help="the annotations, if they are not in --data-root")
    parser.add_argument(
        "--min-score", type=float, metavar="S", help="detections that count as found (each one's score of its best F1)"
    )
    parser.add_argument("--resamples", type=int, default=1000, metavar="N", help="of the bootstrap (1000)")
    parsed = parser.parse_args(arguments)
    folders = [Path(folder) for folder in parsed.experiments]
    if len(folders) < 2:
        raise ValueError("expected two experiments or more: the first is the baseline")
    if parsed.min_score is not None and not 0 <= parsed.min_score <= 1:
        raise ValueError(f"--min-score: expected a number from 0 to 1, got {parsed.min_score:g}")
    if parsed.resamples < 1:
        raise ValueError(f"--resamples: expected 1 or more, got {parsed.resamples}")
    image_set = common_image_set(folders, parsed.image_set)
    if parsed.annotation is None:
        described = resolve(image_set, parsed.data_root)
        require_annotation(described)
    truth = read_truth(parsed.annotation or described.annotation)
    max_det = tested_max_det(folders, image_set)
    experiments = read_experiments(folders, image_set, truth, parsed.min_score, max_det)
    print(f"{image_set}: {len(truth.images)} images, {int((~truth.boxes.crowd).sum())} boxes\n")
    print("\n".join(score_lines(experiments, max_det)))
    first, *others = experiments
    for other in others:
        print("\n" + "\n".join(difference_lines(first, other, parsed.resamples)))
        scores = f"{first.name} from {first.min_score:.3f}, {other.name} from {other.min_score:.3f}"
        print(f"  detections that count as found: {scores}")
        print("\n".join([*found_lines(other, first), *found_lines(first, other)]))
    print(f"\nintervals: 95 %, {parsed.resamples} paired bootstrap resamples of the images; a box is found at IoU 0.50")


if __name__ == "__main__":
    run(main)
