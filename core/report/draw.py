"""Drawing of an image with its detections, and its ground truth beside them.

H, W: image sides in pixels; G ground-truth boxes; D detections. Boxes are xyxy in image pixels with inclusive
corners; classes are numbered 1..K in the order of class_names.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont

Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]

MIN_PANEL = 480  # smaller images are enlarged to this longer side, in pixels
PAPER: Colour = (250, 250, 250)
INK: Colour = (30, 30, 30)


def class_colour(index: int) -> Colour:
    """Return the RGB colour of class `index` (1..). Neighbours differ strongly in hue, distant classes in lightness."""
    hue = (index * 0.618034) % 1.0  # golden ratio: each hue falls into the widest gap of those before
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.9, 0.55)[index // 8 % 2], (1.0, 0.8)[index // 16 % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _place_label(box: Rectangle, size: tuple[float, float], area: tuple[int, int], taken: list[Rectangle]) -> Rectangle:
    """Return the first free rectangle in `area` for a label of `size`: above, below or inside its box."""
    x1, y1, x2, y2 = box
    width, height = size
    places = []
    for left in (x1, x2 - width):
        for top in (y1 - height, y2, y1, y2 - height):
            left = min(max(left, 0), max(area[0] - width, 0))
            top = min(max(top, 0), max(area[1] - height, 0))
            places.append((left, top, left + width, top + height))
    return next((p for p in places if not any(_overlap(p, t) for t in taken)), places[0])


def _draw_panel(
    image: Image.Image,
    scale: float,
    boxes: np.ndarray,
    classes: np.ndarray,
    labels: list[str],
    font: FreeTypeFont,
) -> None:
    """Draw boxes (n, 4) and labels on the enlarged image; labels are placed in the order of the boxes."""
    draw = ImageDraw.Draw(image)
    line = max(2, round(max(image.size) / 320))
    limit = np.array(image.size * 2) - 1
    corners = np.stack([boxes[:, :2] * scale, (boxes[:, 2:] + 1) * scale - 1], 1).reshape(-1, 4)  # (n, 2, 2) -> (n, 4)
    corners = np.clip(corners, 0, limit)
    corners[:, 2:] = np.maximum(corners[:, 2:], corners[:, :2])
    rectangles: list[Rectangle] = [(x1, y1, x2, y2) for x1, y1, x2, y2 in corners.round().tolist()]
    for (x1, y1, x2, y2), index in reversed(list(zip(rectangles, classes.tolist(), strict=True))):
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=INK, width=line + 2)  # visible on any background
        draw.rectangle((x1, y1, x2, y2), outline=class_colour(index), width=line)
    places: list[Rectangle] = []
    for rectangle, label in zip(rectangles, labels, strict=True):
        left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
        places.append(_place_label(rectangle, (right - left + 6, bottom - top + 6), image.size, places))
    for place, index, label in reversed(list(zip(places, classes.tolist(), labels, strict=True))):
        red, green, blue = colour = class_colour(index)
        text_colour = INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)
        left, top, _, _ = draw.textbbox((0, 0), label, font=font)
        draw.rectangle(place, fill=colour)
        draw.text((place[0] + 3 - left, place[1] + 3 - top), label, fill=text_colour, font=font)


def _draw_legend(names: dict[int, str], width: int, font: FreeTypeFont) -> Image.Image:
    """Return a legend with a swatch and a name for every class, wrapped to `width`."""
    swatch, gap = round(font.size * 0.8), round(font.size * 0.4)
    line_height = round(font.size * 1.7)
    places: list[tuple[int, int]] = []
    x, y = 8, 0
    for name in names.values():
        length = swatch + gap + round(font.getlength(name)) + 2 * gap
        if x > 8 and x + length > width:
            x, y = 8, y + line_height
        places.append((x, y))
        x += length
    legend = Image.new("RGB", (width, y + line_height), PAPER)
    draw = ImageDraw.Draw(legend)
    for (x, y), (index, name) in zip(places, names.items(), strict=True):
        middle = y + line_height // 2
        draw.rectangle(
            (x, middle - swatch // 2, x + swatch, middle + swatch // 2), fill=class_colour(index), outline=INK
        )
        draw.text((x + swatch + gap, middle), name, fill=INK, font=font, anchor="lm")
    return legend


def _check(image: np.ndarray, gt: np.ndarray, det: np.ndarray, class_names: Sequence[str]) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"image: expected uint8 (H, W, 3) RGB, got {image.dtype} {image.shape}")
    for name, rows, columns in (("gt", gt, 5), ("det", det, 6)):
        if rows.ndim != 2 or rows.shape[1] != columns:
            raise ValueError(f"{name}: expected shape (n, {columns}), got {rows.shape}")
        if not np.isfinite(rows).all():
            raise ValueError(f"{name}: a box, score or class is not finite")
        if len(rows) and rows[:, -1].max() > len(class_names):
            raise ValueError(f"{name}: class {rows[:, -1].max():g}, but class_names has {len(class_names)} names")


def draw_detections(
    image: np.ndarray, gt: np.ndarray | None, det: np.ndarray, class_names: Sequence[str], *, min_score: float = 0.3
) -> np.ndarray:
    """Draw an image with its detections, beside one with its ground truth; below, a legend of their classes.

    image: (H, W, 3) uint8 RGB; gt: (G, 5) x1, y1, x2, y2, class, None for an image without ground truth, which is drawn
    once; det: (D, 6) x1, y1, x2, y2, score, class. Boxes are xyxy in image pixels with inclusive corners; rows whose
    class is below 1 are padding. Detections that score below min_score are left out. Returns a uint8 RGB image. Raises
    ValueError for other shapes, values that are not finite and classes without a name.
    """
    has_truth, truth = gt is not None, np.asarray(np.empty((0, 5)) if gt is None else gt, np.float64)
    det = np.asarray(det, np.float64)
    _check(image, truth, det, class_names)
    truth = truth[truth[:, 4] >= 1]
    det = det[(det[:, 5] >= 1) & (det[:, 4] >= min_score)]
    det = det[np.argsort(-det[:, 4], kind="stable")]
    gt_class, det_class = truth[:, 4].astype(int), det[:, 5].astype(int)

    H, W = image.shape[:2]
    scale = max(1.0, MIN_PANEL / max(H, W))
    size = (max(1, round(W * scale)), max(1, round(H * scale)))
    font = ImageFont.load_default(max(13, round(max(size) / 44)))
    assert isinstance(font, FreeTypeFont), "with a size, Pillow's default font is scalable"
    plain = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    panels = []
    if has_truth:
        panels.append((plain.copy(), f"ground truth: {len(truth)}"))
        _draw_panel(panels[0][0], scale, truth[:, :4], gt_class, [class_names[c - 1] for c in gt_class], font)
    labels = [f"{class_names[c - 1]} {score:.2f}" for c, score in zip(det_class, det[:, 4], strict=True)]
    _draw_panel(plain, scale, det[:, :4], det_class, labels, font)
    panels.append((plain, f"detections: {len(det)} (score at least {min_score:g})"))

    header, gap = round(font.size * 1.9), max(8, round(font.size / 2))
    column = max(size[0], *(round(font.getlength(title)) + 16 for _, title in panels), 0)
    present = {c: class_names[c - 1] for c in sorted({*gt_class.tolist(), *det_class.tolist()})}
    legend = _draw_legend(present, len(panels) * (column + gap) - gap, font)
    sheet = Image.new("RGB", (legend.width, header + size[1] + gap + legend.height), PAPER)
    for number, (panel, title) in enumerate(panels):
        x = number * (column + gap)
        ImageDraw.Draw(sheet).text((x + 8, header // 2), title, fill=INK, font=font, anchor="lm")
        sheet.paste(panel, (x, header))
    sheet.paste(legend, (0, header + size[1] + gap))
    return np.asarray(sheet)
