"""Benchmark the index of a large generated COCO json: building, opening, and the memory that workers add.

    python3 utils/benchmark_index.py
    python3 utils/benchmark_index.py --images 100000 --boxes 1000000

The json (130 bytes per box), empty image files, and the index are written to a temporary folder, which is removed at
the end; TMPDIR chooses another disk. Linux only: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.synchronize
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from config.image_set import ImageSet
from core.cli import run
from core.data.coco_index import open_index
from core.data.dataset import DetectionDataset

MIB = 2**20
CLASSES = 80
SIDES = (480, 640)  # height and width of every image
CHUNK = 10_000  # images formatted at a time

IMAGE = '{"license":4,"file_name":"%012d.jpg","height":480,"width":640,"date_captured":"2013-11-14 17:02:52","id":%d}'
BOX = '{"area":%.4f,"iscrowd":0,"image_id":%d,"bbox":[%.2f,%.2f,%.2f,%.2f],"category_id":%d,"id":%d}'


def draw(folder: Path, num_image: int, num_box: int) -> ImageSet:
    """Generate a COCO json with boxes assigned to the images in turn, and empty image files."""
    images, annotation = folder / "images", folder / "instances_many.json"
    images.mkdir()
    rng = np.random.default_rng(0)
    with annotation.open("w") as file:
        file.write('{"images":[')
        for i in range(num_image):
            os.mknod(f"{images}/{i:012d}.jpg")
            file.write(("," if i else "") + IMAGE % (i, i))
        file.write('],"annotations":[')
        for start in range(0, num_box, CHUNK):
            number = np.arange(start, min(start + CHUNK, num_box))
            corner = rng.random((len(number), 2)) * (SIDES[1] / 2, SIDES[0] / 2)  # x, y
            side = rng.random((len(number), 2)) * (SIDES[1] / 2 - 1, SIDES[0] / 2 - 1) + 1  # w, h
            columns = [side.prod(axis=1), number * num_image // num_box, *corner.T, *side.T]
            columns += [rng.integers(1, CLASSES + 1, len(number)), number]
            rows = zip(*(column.tolist() for column in columns), strict=True)
            file.write(("," if start else "") + ",".join(BOX % row for row in rows))
        categories = ",".join(f'{{"id":{i},"name":"class {i}"}}' for i in range(1, CLASSES + 1))
        file.write(f'],"categories":[{categories}]}}')
    return ImageSet("many", str(annotation), str(images))


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Return the result of a function in a new process, so that measurements do not warm each other up."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def timed_open(image_set: ImageSet, cache: str) -> str:
    """Return time and peak memory of `open_index`, which builds the index if there is none."""
    start, cpu_start = time.perf_counter(), time.process_time()
    open_index(image_set, cache)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return f"{seconds:8.2f} s ({cpu_seconds:.2f} s of CPU), peak memory {peak:.0f} MiB"


def worker_memory(image_set: ImageSet, cache: str, num_worker: int) -> tuple[float, float]:
    """Return MiB of a process with the data set, and those added by forked workers that have read all records' boxes.

    A page that several processes share counts once.
    """
    index = open_index(image_set, cache)
    dataset = DetectionDataset([index], [], flip=True)
    for column in (index.box, index.name_bytes, index.image_id):
        column.max()  # the pages of the index are in memory, once
    before = _shared_memory("self")
    fork = multiprocessing.get_context("fork")
    all_read, leave = fork.Barrier(num_worker + 1), fork.Event()
    workers = [
        fork.Process(target=_read_share, args=(dataset, i, num_worker, all_read, leave)) for i in range(num_worker)
    ]
    for worker in workers:
        worker.start()
    all_read.wait()
    total = _shared_memory("self") + sum(_shared_memory(str(worker.pid)) for worker in workers)
    leave.set()
    for worker in workers:
        worker.join()
    return before / MIB, (total - before) / MIB


def _read_share(
    dataset: DetectionDataset,
    worker: int,
    num_worker: int,
    all_read: multiprocessing.synchronize.Barrier,
    leave: multiprocessing.synchronize.Event,
) -> None:
    """Read as in shuffled training: each worker in all parts of the index. Plain samples only, which have all boxes."""
    order = np.random.default_rng(0).permutation(dataset.num_image)[worker::num_worker]
    for sample in order:
        dataset.record(0, int(sample))
    all_read.wait()
    leave.wait()


def _shared_memory(process: str) -> int:
    """Return the bytes of a process, in which a page shared by n processes counts 1/n (PSS)."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("smaps_rollup has a line Pss")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the index of a large COCO json.")
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--boxes", type=int, default=10_000_000)
    parser.add_argument("--workers", type=int, default=8)
    arguments = parser.parse_args()
    if min(arguments.images, arguments.boxes, arguments.workers) < 1:
        raise ValueError("--images, --boxes and --workers: expected 1 or more")
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name), f"{name}/cache"
        start = time.perf_counter()
        image_set = draw(folder, arguments.images, arguments.boxes)
        size = Path(image_set.annotation).stat().st_size
        print(f"{arguments.images} images, {arguments.boxes} boxes, json of {size / MIB:.0f} MiB")
        print(f"  generated {time.perf_counter() - start:8.2f} s", flush=True)
        print(f"  built in  {apart(timed_open, image_set, cache)}", flush=True)
        print(f"  opened in {apart(timed_open, image_set, cache)}", flush=True)
        os.utime(image_set.image_dir, (0, 0))  # as after adding or removing a file: the images are listed again
        print(f"  ... after a change among the images in {apart(timed_open, image_set, cache)}", flush=True)
        alone, added = apart(worker_memory, image_set, cache, arguments.workers)
        print(
            f"  memory    {alone:8.0f} MiB of a process with the index, {arguments.workers} workers add {added:.0f} MiB"
        )


if __name__ == "__main__":
    run(main)
