"""Pictures of two or more kinds on disk, small and easy to tell apart."""

import numpy as np
from PIL import Image


def draw(path, value, size=(20, 16), mode="RGB"):
    """Writes a picture of one colour, with some noise, in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 20, (size[1], size[0], 3))
    pixels = np.clip(value + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def folders(root, classes, each):
    """Writes as many pictures of each class, of sizes that differ."""
    for number, name in enumerate(classes):
        for index in range(each):
            value = 200 * number // max(len(classes) - 1, 1)
            draw(root / name / f"{index:03}.png", value, (20 + index, 16))
