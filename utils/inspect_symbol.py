"""Show a graph's JSON, MXNet's or ours: a table of its operators, and a picture of its pyramid.

    python3 utils/inspect_symbol.py FILE.json --shape data=1,3,640,640 --svg pyramid.svg

The picture has a row per level, the coarsest on top, and a column per step of a stage; its boxes are found by the names
of our models and SimpleDet's (stage4_..., S1_P4_1, P3_lateral, cls_conv1_s8). Sizes that cannot be inferred from the
given shapes are shown as `?`.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout is used in place

from core.run.atomic_file import atomic_file
from symbol import Node, Symbol, load_json
from symbol.ops import Shape
from symbol.shape import propagate

_HEAD = 10_000  # the last stage
_MOST_BOXES = 1000
_STAGE = re.compile(r"stage(\d{1,2})_")
_POOLED = re.compile(r"C(\d{1,2})$")
_STACKED = re.compile(r"S(\d{1,3})_P(\d{1,2})(?:_(\d{1,3}))?(?:_relu|_bn\w*)?$")
_FPN = re.compile(r"P(\d{1,2})_(lateral|sum|conv)(?:_bn)?$")
_SUBNET = re.compile(r"(?:cls|bbox)_\w*_s(\d{1,4})$")
_FPN_STEPS = {"lateral": 0, "sum": 1, "conv": 2}
_WIDTH, _HEIGHT, _BOX_WIDTH, _BOX_HEIGHT, _MARGIN = 58, 64, 42, 24, 46  # pixels
_COLOURS = ("#cfe2f3", "#d9ead3", "#fff2cc", "#fce5cd", "#f4cccc", "#d9d2e9")


@dataclass(frozen=True, order=True)
class Box:
    """A box of the picture: a stage of the backbone, a merge of the pyramid, or the head of a level."""

    stage: int  # 0 the backbone, 1 the pyramid's first stage or FPN, ...
    step: int  # within the stage
    level: int
    label: str
    title: str  # of its stage


def read_symbol(path: Path) -> Symbol:
    """Read the graph of a JSON file. Raises FileNotFoundError and, naming the file, ValueError."""
    try:
        return load_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def table(symbol: Symbol, shapes: dict[str, Shape]) -> list[str]:
    """Return a line per operator: op, name, shapes of its outputs and its parameters' elements, each parameter where it
    is first used; then their sum. Raises ValueError for shapes that contradict each other."""
    known = propagate(symbol.nodes(), shapes)
    counted = {*symbol.list_inputs(), *symbol.list_auxiliary_states()}
    rows = [("op", "name", "output", "parameters")]
    total, is_known = 0, True
    for node in symbol.nodes():
        if node.is_variable:
            continue
        own = {child.name: known.get((child, 0), ()) for child, _ in node.inputs if child.is_variable}
        new = [shape for name, shape in own.items() if name not in counted]
        counted |= own.keys()
        number = sum(math.prod(shape) for shape in new)
        follows = all(shape and 0 not in shape for shape in new)
        total, is_known = total + number, is_known and follows
        outputs = [_show(known.get((node, index), ())) for index in range(len(node.output_names()))]
        rows.append((node.op, node.name, ", ".join(outputs), (f"{number:,}" if follows else "?") if new else ""))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}".rstrip() for a, b, c, d in rows]
    inputs = {node.name: known.get((node, 0), ()) for node in symbol.nodes() if node.is_variable}
    taken = ", ".join(f"{name} {_show(inputs[name])}" for name in symbol.list_inputs())
    parameters = f"{total:,}" if is_known else "? (give --shape)"
    return [*lines, f"{len(rows) - 1} operators, {parameters} parameters; inputs: {taken}"]


def _show(shape: Shape) -> str:
    return "(" + ", ".join(str(side) if side else "?" for side in shape) + ")" if shape else "?"


def box_of(node: Node) -> Box | None:
    """Return the box that a node belongs to; None for wiring and nodes outside of the picture."""
    name = node.name
    if match := _STAGE.match(name) or _POOLED.match(name):
        level = int(match[1]) + (match.re is _STAGE)  # the first stage's stride is 4
        return Box(0, 0, level, f"C{level}", "backbone")
    if match := _STACKED.match(name):
        stage, level, step = int(match[1]), int(match[2]), int(match[3] or 0)
        return Box(stage + 1, step, level, f"P{level}" + (f"_{step}" if match[3] else ""), f"S{stage}")
    if match := _FPN.match(name):
        return Box(1, _FPN_STEPS[match[2]], int(match[1]), match[2], "FPN")
    if match := _SUBNET.match(name):
        return Box(_HEAD, 0, int(match[1]).bit_length() - 1, "head", "head")
    return None


def wiring(symbol: Symbol) -> dict[Box, dict[Box, None]]:
    """Return every box of a graph and the boxes that feed it, in the graph's order.

    Raises ValueError if no name is that of a pyramid, and for more boxes than a picture can show.
    """
    nodes = symbol.nodes()
    boxes = {node: box for node in nodes if (box := box_of(node))}
    if not any(0 < box.stage < _HEAD for box in boxes.values()):
        raise ValueError("no pyramid to draw: expected operators named like S1_P4_1 or P3_lateral")
    if (number := len(set(boxes.values()))) > _MOST_BOXES:
        raise ValueError(f"the pyramid has {number} boxes; expected {_MOST_BOXES} at most")
    feeds: dict[Box, dict[Box, None]] = {}
    reached: dict[Node, dict[Box, None]] = {}  # the boxes on which a node's output depends
    for node in nodes:
        box = boxes.get(node)
        sources: dict[Box, None] = {}
        # slice_like uses only the size of its second input
        for child, _ in node.inputs[: 1 if node.op == "slice_like" else None]:
            sources |= reached[child]
        if box is None:
            reached[node] = sources
        else:
            reached[node] = {box: None}
            feeds.setdefault(box, {}).update({source: None for source in sources if source != box})
    return feeds


def picture(feeds: dict[Box, dict[Box, None]]) -> str:
    """Return the wiring as SVG."""
    columns = {key: i for i, key in enumerate(sorted({(box.stage, box.step) for box in feeds}))}
    levels = {level: i for i, level in enumerate(sorted({box.level for box in feeds}, reverse=True))}

    def place(box: Box) -> tuple[int, int]:
        """Return a box's centre."""
        return _MARGIN + _WIDTH * columns[box.stage, box.step], _MARGIN + _HEIGHT * levels[box.level] + _HEIGHT // 2

    width, height = 2 * _MARGIN + _WIDTH * (len(columns) - 1), _MARGIN + _HEIGHT * len(levels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11" text-anchor="middle">',
        '<defs><marker id="tip" viewBox="0 0 6 6" refX="6" refY="3" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0 0L6 3L0 6z" fill="#777"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    titles: dict[str, list[int]] = {}
    for box in feeds:
        titles.setdefault(box.title, []).append(place(box)[0])
    for title, xs in titles.items():
        left, right = min(xs) - _BOX_WIDTH // 2 - 4, max(xs) + _BOX_WIDTH // 2 + 4
        parts.append(f'<rect x="{left}" y="26" width="{right - left}" height="{height - 34}" rx="6" fill="#f5f5f5"/>')
        parts.append(f'<text x="{(left + right) // 2}" y="19" font-weight="bold">{title}</text>')
    edges = [(place(source), place(box)) for box, sources in feeds.items() for source in sources]
    parts += [f'<path d="{_curve(*a, *b)}" fill="none" stroke="#777" marker-end="url(#tip)"/>' for a, b in edges]
    for box in feeds:
        x, y = place(box)
        parts.append(
            f'<rect x="{x - _BOX_WIDTH // 2}" y="{y - _BOX_HEIGHT // 2}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" '
            f'rx="4" fill="{_COLOURS[box.level % len(_COLOURS)]}" stroke="#555"/>'
        )
        parts.append(f'<text x="{x}" y="{y + 4}">{box.label}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _curve(x1: int, y1: int, x2: int, y2: int) -> str:
    """Return a path from box to box: straight within a column, bent around boxes in between, otherwise an S."""
    if x1 == x2 and abs(y2 - y1) > _HEIGHT:
        left = x1 - _BOX_WIDTH // 2
        return f"M{left} {y1}C{left - 16} {y1} {left - 16} {y2} {left} {y2}"
    if x1 == x2:
        side = 1 if y2 > y1 else -1
        return f"M{x1} {y1 + side * _BOX_HEIGHT // 2}L{x2} {y2 - side * _BOX_HEIGHT // 2}"
    start, end = x1 + _BOX_WIDTH // 2, x2 - _BOX_WIDTH // 2
    if y1 == y2:
        lift = 0 if x2 - x1 <= _WIDTH else 28
        return f"M{start} {y1}C{start + lift} {y1 - lift} {end - lift} {y2 - lift} {end} {y2}"
    bend = max(20, min(end - start, 3 * _WIDTH) // 2)
    return f"M{start} {y1}C{start + bend} {y1} {end - bend} {y2} {end} {y2}"


def parse_shape(text: str) -> tuple[str, Shape]:
    """Parse a name and its shape from `data=1,3,640,640`. Raises ValueError."""
    name, _, sides = text.partition("=")
    if not name or not re.fullmatch(r"\d{1,9}(,\d{1,9})*", sides):
        raise ValueError(f"--shape: expected NAME=SIDE,SIDE,... such as data=1,3,640,640, got {text!r:.80}")
    return name, tuple(int(side) for side in sides.split(","))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Show a graph's JSON: its operators, and its pyramid's wiring.")
    parser.add_argument("file", metavar="FILE.json", type=Path)
    parser.add_argument("--shape", metavar="NAME=SIDES", action="append", default=[], help="data=1,3,640,640")
    parser.add_argument("--svg", metavar="OUT", type=Path, help="draw the pyramid's wiring")
    parsed = parser.parse_args(arguments)
    try:
        symbol = read_symbol(parsed.file)
        print("\n".join(table(symbol, dict(parse_shape(text) for text in parsed.shape))))
        if parsed.svg:
            with atomic_file(parsed.svg) as handle:
                handle.write(picture(wiring(symbol)).encode())
            print(f"wrote {parsed.svg}")
    except BrokenPipeError:  # the reader, such as `| head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
