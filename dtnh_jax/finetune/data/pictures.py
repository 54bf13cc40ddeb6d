"""One picture, of whatever mode and format, as an array of grey or RGB."""

import io
import os

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

_GREY_16_BIT = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def read_picture(
    file: str | os.PathLike[str] | io.BytesIO | io.BufferedReader,
) -> UInt8[np.ndarray, "h w c"]:
    """Decodes a picture.

    Args:
      file: a path, or an open file.

    Returns:
      One channel if the picture is grey, else three. Palettes, CMYK and the like become
      RGB; what is transparent becomes white, because the colours under it may be any.
      16-bit grey is cut to its upper 8 bits. Cameras store how they were held: the
      picture is turned upright. Of an animation it is the first frame.

    Raises:
      Exception: the picture is damaged; which one, depends on the format.
    """
    with Image.open(file) as opened:
        image = _grey_or_rgb(ImageOps.exif_transpose(opened))
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def is_readable(path: str | os.PathLike[str]) -> bool:
    """Whether a picture can be decoded to its end.

    JPEGs are decoded at an eighth of their size, which reads all of the file and is
    several times quicker.
    """
    try:
        with Image.open(path) as image:
            image.draft(None, (1, 1))
            image.load()
    except Exception:  # readers of damaged files raise whatever they stumble over
        return False
    return True


def _grey_or_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _GREY_16_BIT:
        # PIL would clip them at 255, which leaves white.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "1":
        return image.convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "L" else image.convert("RGB")
