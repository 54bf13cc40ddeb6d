"""Reads a picture of any mode and format as an array of grey or RGB.

Formats with more than 8 bits do not define which number is white: floats may go from 0
to 1 or to 255, and cameras fill 10 or 12 bits of 16. So `look` returns the largest
number of a picture, and all pictures of a set share one white.
"""

import contextlib
import hashlib
import io
import logging
import os
import pathlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

# The kind of numbers of modes with more than 8 bits.
_DEEP = {"F": "floats"} | dict.fromkeys(
    ("I", "I;16", "I;16L", "I;16B", "I;16N"), "integers"
)
_WHITES = (1.0, 255.0, 1023.0, 4095.0, 16383.0, 65535.0)
_DARK = 16  # the white of 12 bits, read as 16 bits
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
UNREADABLE = "can not be read"


class UnreadableError(OSError):
    """A picture can no longer be read."""


class ModeError(ValueError):
    """A picture's numbers are not brightness; the message is worded for several."""


class Look(NamedTuple):
    """The result of `look`."""

    digest: str = ""  # of the whole file
    problem: str = ""  # worded for several pictures, such as `UNREADABLE`
    kind: str = ""  # "floats" or "integers", for numbers of more than 8 bits
    highest: float = 0.0  # largest of those numbers


def read_picture(
    file: str | os.PathLike[str] | io.BytesIO | io.BufferedReader,
    white: Mapping[str, float] | None = None,
) -> UInt8[np.ndarray, "h w c"]:
    """Decodes a picture.

    Args:
      file: a path, or an open file.
      white: white by kind of numbers, the result of `white_of` for a set of pictures.
        By default that of this picture alone.

    Returns:
      One channel if the picture is grey, else three. Palettes, CMYK and other modes
      become RGB. Transparent pixels become white. Numbers of more than 8 bits are
      scaled. The picture is rotated upright if the camera's orientation can be read.
      An animation gives its first frame.

    Raises:
      Exception: the picture is damaged; the type depends on the format.
    """
    with Image.open(file) as image:
        return _pixels(image, white)


def look(file: str | os.PathLike[str] | bytes) -> Look:
    """Reads a picture completely, to check whether `read_picture` can.

    JPEGs are decoded at an eighth of their size, which reads the whole file and is
    several times faster.

    Args:
      file: a path, or the content of a file.
    """
    digest = ""
    try:
        content = file if isinstance(file, bytes) else pathlib.Path(file).read_bytes()
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        with Image.open(io.BytesIO(content)) as image:
            image.draft(None, (1, 1))
            pixels = _pixels(image)
            if not pixels.size:
                return Look(digest, UNREADABLE)
            if kind := _DEEP.get(image.mode, ""):
                return Look(digest, "", kind, float(np.asarray(image).max()))
    except Image.DecompressionBombError:
        return Look(digest, "are too large to be read")
    except ModeError as error:
        return Look(digest, str(error))
    except Exception:  # readers of damaged files raise any exception
        return Look(digest, UNREADABLE)
    return Look(digest)


def is_readable(path: str | os.PathLike[str]) -> bool:
    """Returns whether a picture can be decoded completely."""
    return not look(path).problem


def white_of(looks: Iterable[Look]) -> dict[str, float]:
    """Returns the white of a set of pictures: the first full scale that none exceeds.

    Example:
      >>> white_of([Look(kind="integers", highest=900), Look(kind="floats")])
      {'integers': 1023.0, 'floats': 1.0}
    """
    highest: dict[str, float] = {}
    for each in looks:
        if each.kind:
            highest[each.kind] = max(highest.get(each.kind, 0.0), each.highest)
    return {
        kind: next(white for white in _WHITES if white >= top)
        for kind, top in highest.items()
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences PIL's warnings, which do not name the file; `look` reports problems."""
    logger = logging.getLogger("PIL")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield
    finally:
        logger.setLevel(level)


def _pixels(
    image: Image.Image, white: Mapping[str, float] | None = None
) -> UInt8[np.ndarray, "h w c"]:
    is_deep = ";16" in str(getattr(image, "tile", ""))  # known until it is loaded
    image.load()
    pixels = np.asarray(_grey_or_rgb(_upright(image), white))
    if is_deep and image.mode not in _DEEP and pixels.max(initial=0) < _DARK:
        # PIL reads only the upper 8 bits, and the lower ones would be needed.
        raise ModeError(
            f"are of mode {image.mode} with 16 bits, of which the upper 8 are all but "
            "black,"
        )
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _upright(image: Image.Image) -> Image.Image:
    # Not by PIL's `exif_transpose`, which also rewrites all other metadata and fails if
    # any of them is damaged.
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # readers of damaged data raise any exception
        return image
    return image if turn is None else image.transpose(turn)


def _grey_or_rgb(image: Image.Image, white: Mapping[str, float] | None) -> Image.Image:
    if image.mode in _DEEP:
        return Image.fromarray(_scaled(image, white))
    if image.mode == "1":
        return image.convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image if image.mode == "L" else image.convert("RGB")


def _scaled(
    image: Image.Image, white: Mapping[str, float] | None
) -> UInt8[np.ndarray, "h w"]:
    """Returns numbers of more than 8 bits as numbers of 8 bits."""
    numbers: Any = np.asarray(image)
    kind, low, high = _DEEP[image.mode], numbers.min(), numbers.max()
    if not (low >= 0 and high <= _WHITES[-1]):
        raise ModeError(
            f"are of mode {image.mode} and have numbers that are not from 0 to "
            f"{_WHITES[-1]:g},"
        )
    if white is None or kind not in white:
        white = white_of([Look(kind=kind, highest=float(high))])
    scaled = np.round(numbers.astype(np.float64) * (255 / white[kind]))
    return np.clip(scaled, 0, 255).astype(np.uint8)
