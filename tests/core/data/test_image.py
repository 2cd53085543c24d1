from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from core.data.image import read_image

H, W = 12, 20


def ramp() -> np.ndarray:
    """Return (H, W, 3) uint8 with distinct channels and directions."""
    y, x = np.mgrid[:H, :W]
    return np.stack([10 * y, 10 * x, 5 * y + 2 * x], axis=2).astype(np.uint8)


def save(path: Path, image: Image.Image, **options: Any) -> str:
    image.save(path, **options)
    return str(path)


def test_png_is_exact_rgb(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(ramp()))
    pixels = read_image(path, H, W)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, ramp())


def test_jpeg_has_the_pixels_of_opencv(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", Image.fromarray(ramp()))
    assert np.array_equal(read_image(path, H, W), cv2.imread(path)[:, :, ::-1])


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_grey_becomes_three_equal_channels(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(ramp()[:, :, 1]), **{"quality": 100})
    pixels = read_image(path, H, W)
    assert pixels.shape == (H, W, 3)
    assert np.abs(pixels.astype(int) - ramp()[:, :, 1:2]).max() <= 2


def test_16_bit_grey_keeps_the_upper_eight(tmp_path: Path) -> None:
    grey = ramp()[:, :, 1].astype(np.uint16) * 256 + 255
    path = save(tmp_path / "a.png", Image.fromarray(grey))
    assert np.array_equal(read_image(path, H, W), np.repeat(ramp()[:, :, 1:2], 3, axis=2))


def test_16_bit_colour_keeps_the_upper_eight(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), ramp()[:, :, ::-1].astype(np.uint16) * 256 + 100)
    assert np.array_equal(read_image(str(tmp_path / "a.png"), H, W), ramp())


def test_cmyk(tmp_path: Path) -> None:
    """Pure cyan ink is (0, 255, 255) and black ink (0, 0, 0); inverted decoding would give red and white."""
    ink = np.zeros((H, W, 4), np.uint8)
    ink[:, : W // 2, 0] = 255
    ink[:, W // 2 :, 3] = 255
    path = save(tmp_path / "a.jpg", Image.fromarray(ink, "CMYK"), quality=100)
    pixels = read_image(path, H, W).astype(int)
    assert np.abs(pixels[:, : W // 2 - 4] - [0, 255, 255]).max() <= 3
    assert np.abs(pixels[:, W // 2 + 4 :]).max() <= 3


def test_alpha_is_dropped(tmp_path: Path) -> None:
    alpha = np.full((H, W, 1), 7, np.uint8)
    path = save(tmp_path / "a.png", Image.fromarray(np.concatenate([ramp(), alpha], axis=2)))
    assert np.array_equal(read_image(path, H, W), ramp())


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (W, H), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    path = save(tmp_path / "a.png", image, transparency=bytes([0, 128]))
    assert (read_image(path, H, W) == [200, 100, 50]).all()


def test_bilevel(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.new("1", (W, H), 1))
    assert (read_image(path, H, W) == 255).all()


def rotated(tmp_path: Path, orientation: int) -> str:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(tmp_path / "a.png", Image.fromarray(ramp()), exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_is_ignored_where_the_annotations_have_the_stored_size(tmp_path: Path, orientation: int) -> None:
    assert np.array_equal(read_image(rotated(tmp_path, orientation), H, W), ramp())


@pytest.mark.parametrize(
    "orientation, upright",
    [
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),  # stored rotated to the left, shown rotated to the right
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_exif_is_applied_where_the_annotations_have_the_shown_size(
    tmp_path: Path, orientation: int, upright: Callable[[np.ndarray], np.ndarray]
) -> None:
    assert np.array_equal(read_image(rotated(tmp_path, orientation), W, H), upright(ramp()))


@pytest.mark.parametrize("sides", [(W, H), (H, W + 1), (H - 1, W)])
def test_another_size_names_file_and_both_sizes(tmp_path: Path, sides: tuple[int, int]) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(ramp()))
    with pytest.raises(ValueError, match=rf"a\.png: the annotations say {sides[0]} x {sides[1]} .* is 12 x 20"):
        read_image(path, *sides)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9])
def test_a_truncated_file_is_named(tmp_path: Path, suffix: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(noise))
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=rf"cannot read image .*a\.{suffix}: .*damaged or truncated") as caught:
        read_image(path, 64, 64)
    assert str(caught.value).count(path) >= 1


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"cannot read image .*a\.jpg"):
        read_image(str(tmp_path / "a.jpg"), H, W)


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tiff", Image.fromarray(ramp()[:, :, 0].astype(np.float32)))
    with pytest.raises(ValueError, match=r"^/[^ ]*a\.tiff: 32-bit.*no fixed range"):
        read_image(path, H, W)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg not found"):
        read_image(str(tmp_path / "gone.jpg"), H, W)
