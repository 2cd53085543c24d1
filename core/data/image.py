"""Decoding of image files to uint8 RGB arrays. H, W: sides of the pixel grid that the annotations refer to.

Pillow is the decoder: it detects truncated files, and decodes an ordinary JPEG to the same pixels as OpenCV.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

_ORIENTATION = 0x0112  # the EXIF tag
_TRANSPOSED = (5, 6, 7, 8)  # orientations that exchange height and width


def read_image(path: str, height: int, width: int) -> np.ndarray:
    """Return an image as (H, W, 3) uint8 RGB, H = height and W = width as the annotations state them.

    Annotations refer either to the stored pixels or to the picture after its EXIF orientation: the orientation is
    ignored if their size is the stored one, and applied if it is that of the rotated picture. Grey becomes three equal
    channels; of 16 bits the upper eight are kept; CMYK and palettes are converted; an alpha channel is dropped.

    Raises FileNotFoundError, and ValueError naming the file for one that is damaged, truncated, of another
    size, or of a pixel format without a fixed range.
    """
    with _explained(path), Image.open(path) as file:
        return _to_rgb(_oriented(file, path, height, width), path)


def read_picture(picture: str | Path | Image.Image) -> np.ndarray:
    """Return an image file, or an image of Pillow's, as (H, W, 3) uint8 RGB, turned as its EXIF orientation says.

    Pixel formats are converted as by `read_image`. Raises FileNotFoundError, and ValueError naming the file for one
    that is damaged, truncated, no image, or of a pixel format without a fixed range.
    """
    if isinstance(picture, Image.Image):
        return _to_rgb(ImageOps.exif_transpose(picture), "the image")
    path = str(picture)
    with _explained(path), Image.open(path) as file:
        return _to_rgb(ImageOps.exif_transpose(file), path)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn the errors of Pillow's decoders into ValueErrors with a message that names the file and the remedy."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"image file {path} not found") from None
    except (_ImageError, PermissionError):
        raise
    except Image.DecompressionBombError as error:
        raise _ImageError(f"image {path} is too large to be read safely: {error}; cut it into tiles") from error
    except Exception as error:  # Pillow's decoders raise errors of many types for damaged files
        raise _ImageError(
            f"cannot read image {path}: {error}; the file is damaged or truncated, or no image: fetch it again, or "
            "remove it"
        ) from error


class _ImageError(ValueError):
    """An error with a complete message: it names the file and the remedy."""


def _oriented(file: Image.Image, path: str, height: int, width: int) -> Image.Image:
    if file.size == (width, height):
        return file
    orientation = file.getexif().get(_ORIENTATION)
    if orientation in _TRANSPOSED and file.size == (height, width):
        return ImageOps.exif_transpose(file)
    raise _ImageError(
        f"{path}: the annotations say {height} x {width} (height x width), the file "
        f"is {file.size[1]} x {file.size[0]}; correct the sizes in the json, or fetch the "
        f"image that it describes"
    )


def _to_rgb(image: Image.Image, path: str) -> np.ndarray:
    if image.mode == "F":
        raise _ImageError(f"{path}: 32-bit floating-point pixels have no fixed range; convert it to 8 bits")
    if image.mode.startswith("I"):  # Pillow's modes for 16-bit grey
        grey = (np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("P", "PA"):  # Pillow warns when a palette's transparency is dropped implicitly
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))
