"""Every odd kind of image file, made here, and what becomes of its pixels."""

from __future__ import annotations

import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import encode
from latticode.core.values import to_float, to_uint8
from latticode.data import ImageError, Preprocess, decode_image
from latticode.data.transforms import RESIZES

RED = (200, 10, 20)


# Odd images


def oriented() -> bytes:
    """2 wide, 1 high, left red, right black, to be shown turned by 90 degrees clockwise (orientation 6)."""
    image = Image.new("RGB", (16, 8))
    image.paste(RED, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(image, "PNG", exif=exif)


def animated() -> bytes:
    frames = [Image.new("RGB", (6, 6), colour) for colour in (RED, (0, 255, 0))]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)


def palette(transparent: bool) -> bytes:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, *RED])
    return encode(image, "PNG", **({"transparency": 1} if transparent else {}))


ODD = {
    "palette": (palette(False), RED),
    "transparent palette": (palette(True), (255, 255, 255)),
    "transparent palette with alphas": (
        encode(Image.open(io.BytesIO(palette(False))), "PNG", transparency=bytes([0, 255])),
        RED,
    ),
    "alpha": (encode(Image.new("RGBA", (4, 4), (200, 0, 0, 51))), (244, 204, 204)),
    "grey alpha": (encode(Image.new("LA", (4, 4), (0, 51))), (204, 204, 204)),
    "transparent colour": (encode(Image.new("RGB", (4, 4), RED), transparency=RED), (255, 255, 255)),
    "16-bit": (encode(Image.fromarray(np.full((4, 4), 25700, np.uint16))), (100, 100, 100)),
    "16-bit tiff": (encode(Image.fromarray(np.full((4, 4), 65535, np.uint16)), "TIFF"), (255, 255, 255)),
    "32-bit tiff": (encode(Image.fromarray(np.full((4, 4), 25700, np.int32)), "TIFF"), (100, 100, 100)),
    "float tiff": (encode(Image.fromarray(np.full((4, 4), 0.4, np.float32)), "TIFF"), (102, 102, 102)),
    "1-bit": (encode(Image.new("1", (4, 4), 1)), (255, 255, 255)),
    "grey": (encode(Image.new("L", (4, 4), 77)), (77, 77, 77)),
    "cmyk": (encode(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    "animated": (animated(), RED),
    "array": (np.full((4, 4), 77, np.uint8), (77, 77, 77)),
    "array with channel": (np.full((4, 4, 1), 77, np.uint8), (77, 77, 77)),
    "16-bit array": (np.full((4, 4), 25700, np.uint16), (100, 100, 100)),
    "bool array": (np.ones((4, 4), np.bool_), (255, 255, 255)),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_images_become_8_bit_grey_or_colour(kind):
    data, colour = ODD[kind]
    image = decode_image(data)
    assert image.mode in ("L", "RGB")
    np.testing.assert_allclose(Preprocess()(data).reshape(3, -1).T.astype(int), [colour] * image.width * image.height)
    assert Preprocess(channels=1)(data).shape == (1, image.height, image.width)


def test_cmyk_jpeg_is_close_to_its_colour():
    pixels = Preprocess()(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert np.abs(pixels[:, 8, 8].astype(int) - [255, 0, 0]).max() <= 3


def test_exif_orientation_is_applied():
    image = decode_image(oriented())
    assert image.size == (8, 16)
    assert image.getpixel((4, 2)) == RED
    assert image.getpixel((4, 13)) == (0, 0, 0)


def giant_header() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD = {
    "empty": (b"", "empty"),
    "noise": (b"no image at all", "not an image, or of an unknown format$"),
    "truncated jpeg": (encode(Image.effect_noise((64, 64), 80), "JPEG")[:600], "truncated"),
    "truncated png": (encode(Image.effect_noise((64, 64), 80))[:900], "truncated|broken|Truncated"),
    "gigantic": (giant_header(), "40000x30000 is more than 200 megapixels"),
    "float array": (np.full((4, 4), 3.0), "float64 pixels from 3.0 to 3.0"),
    "nan array": (np.full((4, 4), np.nan), "float64 pixels from nan"),
    "array of 5 channels": (np.zeros((4, 4, 5), np.uint8), r"\(4, 4, 5\)"),
    "array without pixels": (np.zeros((0, 4), np.uint8), "no pixels|Error"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_images_are_refused_with_name_and_reason(kind):
    data, reason = BAD[kind]
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageError, match=f"holiday: .*({reason})"):
        decode_image(data, "holiday")
    assert limit == Image.MAX_IMAGE_PIXELS


# Preprocessing


def gradient(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1)))


def test_own_size_is_kept_and_channels_come_first():
    assert Preprocess()(gradient(7, 5)).shape == (3, 5, 7)
    assert Preprocess(channels=1)(Image.new("RGB", (7, 5), (0, 255, 0)))[0, 0, 0] == 150  # luma of ITU-R 601


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40), (20, 20), (10, 6), (1, 300), (8, 8)])
def test_every_shape_becomes_the_asked_square(resize, width, height):
    for crop in ("center", "random", "squash"):
        pixels = Preprocess(8, resize=resize, crop=crop)(gradient(width, height), np.random.default_rng(0))
        assert (pixels.shape, pixels.dtype) == ((3, 8, 8), np.uint8)


def test_shrinking_is_antialiased_and_box_is_the_mean():
    stripes = np.tile(np.array([[0, 255]], np.uint8), (16, 8))
    for resize in ("bicubic", "bilinear", "lanczos", "box"):
        assert np.abs(Preprocess(4, 1, resize)(stripes).astype(int) - 127).max() < 40
    values = np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)
    means = values.reshape(4, 4, 4, 4).mean((1, 3))
    assert np.abs(Preprocess(4, 1, "box")(values)[0] - means).max() <= 1  # PIL rounds after each axis


def test_center_crop_equals_resizing_first():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 64), np.uint8))
    whole = np.asarray(image.resize((32, 16), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(Preprocess(16, 1)(image)[0], whole[:, 8:24])


def test_random_crop_cuts_windows_out_of_the_image_as_it_is():
    values = np.random.default_rng(0).integers(0, 256, (20, 30))
    crop = Preprocess(8, 1, crop="random")
    seen = set()
    for seed in range(20):
        pixels = crop(values.astype(np.uint8), np.random.default_rng(seed))[0]
        places = [(y, x) for y in range(13) for x in range(23) if (values[y : y + 8, x : x + 8] == pixels).all()]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 10
    np.testing.assert_array_equal(crop(values.astype(np.uint8))[0], values[6:14, 11:19])


def test_flip_needs_a_generator_and_happens_half_the_time():
    image, plain = gradient(8, 8), Preprocess(8, 1)(gradient(8, 8))
    flips = [
        not np.array_equal(Preprocess(8, 1, flip=True)(image, np.random.default_rng(s)), plain) for s in range(100)
    ]
    assert 30 < sum(flips) < 70
    np.testing.assert_array_equal(Preprocess(8, 1, flip=True)(image), plain)


def test_record_round_trips_through_json_and_is_strict():
    preprocess = Preprocess(32, 1, "lanczos", "random", flip=True)
    record = json.loads(json.dumps(preprocess.record()))
    assert Preprocess.from_record(record) == preprocess
    assert record["range"] == "[-1, 1]"
    with pytest.raises(ValueError, match="unknown preprocessing keys sise; valid: size"):
        Preprocess.from_record({**record, "sise": 3})
    with pytest.raises(ValueError, match=r"value range must be '\[-1, 1\]', got '\[0, 1\]'"):
        Preprocess.from_record({**record, "range": "[0, 1]"})


@pytest.mark.parametrize(
    "bad", [{"size": 0}, {"channels": 2}, {"resize": "cubic"}, {"crop": "left"}, {"crop": "random"}]
)
def test_bad_preprocessing_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Preprocess(**bad)


def test_every_pixel_value_survives_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    values = to_float(pixels)
    assert (values.min(), values.max(), values.dtype) == (-1, 1, torch.float32)
    assert torch.equal(to_uint8(values), pixels)
    assert to_uint8(torch.tensor([-9.0, 9.0, 0.0])).tolist() == [0, 255, 128]
