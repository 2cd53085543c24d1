"""Image files to uint8 RGB arrays. H, W: sides of the pixel grid that the annotations refer to.

Pillow decodes: it tells a truncated file from a whole one, and gives OpenCV's pixels for an ordinary JPEG.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

_ORIENTATION = 0x0112  # the EXIF tag
_TRANSPOSED = (5, 6, 7, 8)  # its values that exchange height and width


def read_image(path: str, height: int, width: int) -> np.ndarray:
    """The image of a file as (H, W, 3) uint8 RGB, H = height and W = width as the annotations state them.

    Annotations are drawn either on the pixels as stored or on the picture as a viewer shows it; their size
    tells which: where it is the stored size, an EXIF orientation is ignored, where it is that of the rotated
    picture, it is applied. Grey becomes three equal channels; 16 bits keep the upper eight; CMYK and palettes
    are converted; an alpha channel is dropped.

    Raises FileNotFoundError, and ValueError naming the file for one that is damaged, truncated, of another
    size, or of a pixel format without a fixed range.
    """
    try:
        with Image.open(path) as file:
            image = _oriented(file, path, height, width)
            pixels = _to_rgb(image, path)
    except FileNotFoundError:
        raise FileNotFoundError(f"image file {path} not found; it was there when the index was opened") from None
    except (_ImageError, PermissionError):
        raise
    except Image.DecompressionBombError as error:
        raise _ImageError(f"image {path} is too large to be read safely: {error}; cut it into tiles") from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise _ImageError(
            f"cannot read image {path}: {error}; the file is damaged or truncated: fetch it again, or remove "
            f"it from the annotations"
        ) from error
    return pixels


class _ImageError(ValueError):
    """An error whose message is complete: it names the file and the remedy."""


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
    if image.mode in ("P", "PA"):  # Pillow warns where a palette with transparency loses it unsaid
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))
