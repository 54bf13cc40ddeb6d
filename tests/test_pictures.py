"""Pictures as users have them: damaged, deep, turned, transparent, of odd modes."""

import io
import struct
import warnings
import zlib

import numpy as np
import pictures
import pytest
from PIL import Image, ImageCms, TiffImagePlugin

from dtnh_jax.finetune.data.class_folders import load_folder
from dtnh_jax.finetune.data.pictures import is_readable, look, read_picture
from dtnh_jax.finetune.data.survey import survey

# What cameras stored


def with_exif_chunk(content):
    """Returns a PNG whose chunk of Exif holds no Exif."""
    body = b"eXIfgarbage."
    chunk = struct.pack(">I", 8) + body + struct.pack(">I", zlib.crc32(body))
    return content[:33] + chunk + content[33:]  # behind the signature and the header


def turned_jpeg(size=(16, 8)):
    """Returns a JPEG that was held sideways, with a resolution of 0/0."""
    image = Image.new("RGB", size, "white")
    image.paste("black", (0, 0, size[0] // 2, size[1]))  # the left half
    exif = image.getexif()
    exif[0x0112] = 6
    exif[0x011A] = TiffImagePlugin.IFDRational(7, 3)
    file = io.BytesIO()
    image.save(file, "jpeg", exif=exif.tobytes())
    assert file.getvalue().count(struct.pack(">II", 7, 3)) == 1
    return file.getvalue().replace(struct.pack(">II", 7, 3), bytes(8))


def test_malformed_exif_is_no_reason_to_leave_a_picture_out(tmp_path):
    pictures.draw(tmp_path / "a.png", 40)
    plain = read_picture(tmp_path / "a.png")
    content = with_exif_chunk((tmp_path / "a.png").read_bytes())
    (tmp_path / "a.png").write_bytes(content)
    assert is_readable(tmp_path / "a.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), plain)


def test_a_picture_is_turned_though_a_number_beside_is_damaged(tmp_path):
    (tmp_path / "a.jpg").write_bytes(turned_jpeg())
    assert is_readable(tmp_path / "a.jpg")
    pixels = read_picture(tmp_path / "a.jpg")
    assert pixels.shape == (16, 8, 3)
    assert pixels[:7].max() < 30  # the left half is on top
    assert pixels[9:].min() > 225


# Which number is white


def floats(values):
    return Image.fromarray(np.array([values], np.float32))


def integers(values, bits=32):
    return Image.fromarray(np.array([values], {16: np.uint16, 32: np.int32}[bits]))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (floats([0, 0.5, 1]), [0, 128, 255]),
        (floats([0, 0.6, 200]), [0, 1, 200]),
        (floats([0, 300, 1023]), [0, 75, 255]),
        (integers([0, 7, 255]), [0, 7, 255]),
        (integers([0, 32768, 65535]), [0, 128, 255]),
        (integers([0, 7, 255], bits=16), [0, 7, 255]),
        (integers([0, 16, 4095], bits=16), [0, 1, 255]),
        (integers([0, 0, 0], bits=16), [0, 0, 0]),
    ],
)
def test_white_is_the_first_full_scale_that_nothing_exceeds(tmp_path, image, expected):
    image.save(tmp_path / "a.tif")
    assert read_picture(tmp_path / "a.tif")[0, :, 0].tolist() == expected


def test_a_set_has_one_white(tmp_path):
    for name, image in {
        "a/dark": floats([0, 0.25]),
        "a/grey": integers([10, 20], bits=16),
        "b/bright": floats([0, 0.875]),
        "b/white": integers([100, 4000], bits=16),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.save(tmp_path / f"{name}.tif")
    target = load_folder(tmp_path)
    assert target.white == {"floats": 1.0, "integers": 4095.0}
    assert target.notes == (
        "2 pictures hold floats of more than 8 bits up to 0.875: 1 is used as white.",
        "2 pictures hold integers of more than 8 bits up to 4000: 4095 is used as "
        "white.",
    )
    read = [target.examples[i]["image"][0, :, 0].tolist() for i in range(4)]
    assert read == [[0, 64], [1, 1], [0, 223], [6, 249]]


def test_integers_that_fill_their_bits_are_nothing_to_note(tmp_path):
    integers([3, 60000], bits=16).save(tmp_path / "a.png")
    assert survey([tmp_path / "a.png"], ["a"]).notes == ()


@pytest.mark.parametrize("value", [-1.0, 70000.0, np.nan, np.inf])
def test_numbers_that_are_no_brightness_are_left_out_with_their_mode(tmp_path, value):
    floats([0, value]).save(tmp_path / "a.tif")
    pictures.draw(tmp_path / "b.tif", 9)
    found = survey([tmp_path / "a.tif", tmp_path / "b.tif"], ["a.tif", "b.tif"])
    assert found.good == [1]
    assert found.notes == (
        "1 files are of mode F and have numbers that are not from 0 to 65535, and are "
        "left out: a.tif.",
    )


def test_what_exceeds_the_white_of_training_is_left_out(tmp_path):
    floats([0, 1]).save(tmp_path / "a.tif")
    floats([0, 200]).save(tmp_path / "b.tif")
    files = [tmp_path / "a.tif", tmp_path / "b.tif"]
    found = survey(files, ["a", "b"], {"floats": 1.0})
    assert found.good == [0]
    assert found.white == {"floats": 1.0}
    assert found.notes == (
        "1 files have numbers above 1, which was white in training, and are left out: "
        "b.",
    )


def png_of_16_bits(values):
    """Returns a PNG of one row, in colours of 16 bits, which PIL does not write."""
    row = b"\0" + np.repeat(np.array(values, ">u2"), 3).tobytes()
    header = struct.pack(">IIBBBBB", len(values), 1, 16, 2, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(row), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body))
        + name
        + body
        + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks.items()
    )


def test_colours_of_16_bits_that_would_be_black_are_left_out(tmp_path):
    full, low = png_of_16_bits([0, 300, 65535]), png_of_16_bits([0, 7, 255])
    (tmp_path / "a.png").write_bytes(full)
    assert read_picture(tmp_path / "a.png")[0, :, 1].tolist() == [0, 1, 255]
    assert survey([full, low], ["full", "low"]).notes == (
        "1 files are of mode RGB with 16 bits, of which the upper 8 are all but black, "
        "and are left out: low.",
    )


# Modes and sizes


def nothing(path):
    path.write_bytes(b"")


def without_pixels(path):
    path.write_bytes(b"P5 0 3 255\n")


def folder(path):
    path.mkdir()


@pytest.mark.parametrize("make", [nothing, without_pixels, folder])
def test_what_holds_no_picture_is_not_readable(tmp_path, make):
    make(tmp_path / "a.tif")
    assert not is_readable(tmp_path / "a.tif")


def test_of_an_animation_it_is_the_first_frame(tmp_path):
    first, second = (Image.new("P", (3, 2), number) for number in (1, 2))
    for image in (first, second):
        image.putpalette([0, 0, 0, 10, 20, 30, 200, 200, 200])
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert read_picture(tmp_path / "a.gif")[0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("mode", "name", "expected"),
    [
        ("LA", "a.png", [124, 124, 124]),
        ("RGBA", "a.webp", [200, 100, 50]),
        ("YCbCr", "a.jpg", [200, 100, 50]),
        ("CMYK", "a.jpg", [200, 100, 50]),
        ("LAB", "a.tif", [200, 100, 50]),
    ],
)
def test_other_modes_become_rgb(tmp_path, mode, name, expected):
    image = Image.new("RGB", (16, 16), (200, 100, 50))
    if mode == "LAB":
        profiles = [ImageCms.createProfile(space) for space in ("sRGB", "LAB")]
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    elif mode == "LA":
        image = image.convert("L").convert("LA")
    else:
        image = image.convert(mode)
    image.save(tmp_path / name)
    pixels = read_picture(tmp_path / name)
    assert pixels.shape == (16, 16, 3)
    np.testing.assert_allclose(pixels[0, 0], expected, atol=4)


def test_a_large_picture_is_read_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    pictures.draw(tmp_path / "a.png", 9, (15, 10))  # less than twice that
    pictures.draw(tmp_path / "b.png", 9, (30, 20))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = survey([tmp_path / "a.png", tmp_path / "b.png"], ["a", "b"])
    assert caught == []
    assert found.good == [0]
    assert found.notes == ("1 files are too large to be read and are left out: b.",)


def test_what_pil_logs_without_a_name_is_not_shown(tmp_path, caplog):
    pictures.draw(tmp_path / "a.tif", 9)
    content = (tmp_path / "a.tif").read_bytes()
    samples = struct.pack("<HHI", 277, 3, 1)  # a tag of one number
    assert content.count(samples) == 1
    start = content.index(samples) + len(samples)
    (tmp_path / "a.tif").write_bytes(
        content[:start] + b"\x03\x04" + content[start + 2 :]
    )
    assert survey([tmp_path / "a.tif"], ["a.tif"]).notes == (
        "1 files can not be read and are left out: a.tif.",
    )
    assert caplog.records == []
    assert not is_readable(tmp_path / "a.tif")
    assert "More samples per pixel" in caplog.text


def test_a_look_is_of_the_whole_file(tmp_path):
    pictures.draw(tmp_path / "a.png", 9)
    content = (tmp_path / "a.png").read_bytes()
    assert look(tmp_path / "a.png") == look(content)
    assert look(content + b"\0").digest != look(content).digest
