"""Reading real images: a path, a PIL picture or an array to RGB."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


SMALLEST = 8  # pixels on a side


def load_image(image) -> Image.Image:
    """An RGB picture from a path, PIL image or array; transparency is laid over white, and the camera's rotation applied."""
    if isinstance(image, (str, Path)):
        image = _read(image)
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    if not isinstance(image, Image.Image):
        raise TypeError(f"Expected an image as a path, PIL image or H W 3 array, but got {type(image).__name__}.")
    if min(image.size) < SMALLEST:
        raise ValueError(
            f"Expected an image of at least {SMALLEST} x {SMALLEST} pixels, but got {image.width} x {image.height}."
        )
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip sixteen bits to eight
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"Expected 8 or 16 bits a channel, but got mode {image.mode!r}: scale it to 0..255 first.")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _read(path) -> Image.Image:
    """A picture file of no more pixels than Pillow finds safe: maps at an image's own size take as much memory."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                file.load()
                return file.copy()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(
            f"Expected an image file of at most {Image.MAX_IMAGE_PIXELS:,} pixels, but {str(path)!r} has more: make it "
            "smaller, or raise PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except Exception as error:  # of many kinds: of files, of each format
        reason = " ".join(str(error).split())
        raise ValueError(f"Expected a readable image file, but {str(path)!r} is not one: {reason}.") from error


def _from_array(array):
    if array.ndim != 3 or array.shape[-1] != 3 or not array.size:
        raise ValueError(f"Expected an array of shape H W 3, but got {array.shape}.")
    if array.dtype.kind not in "biuf":
        raise TypeError(f"Expected an array of numbers, but got one of {array.dtype}.")
    if array.dtype != np.uint8:
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ValueError("Expected a uint8 array, or a float array of finite values in [0, 1].")
        array = (array * 255).round().astype(np.uint8)
    return Image.fromarray(array)
