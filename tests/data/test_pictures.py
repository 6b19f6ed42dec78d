"""A picture of any PIL mode becomes the RGB picture that a person would see."""

import io

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature

from ressa.data.columns import standard_examples
from ressa.data.pictures import as_rgb, converts_exactly, picture_key

RAMP = np.tile(np.linspace(0, 255, 16).round().astype(np.uint8), (4, 1))
GREY = PIL.Image.fromarray(RAMP)


def half_transparent(mode):
    "The ramp, whose left half is transparent over black."
    layers = PIL.Image.new("RGBA", GREY.size, (0, 0, 0, 0))
    layers.paste(GREY.crop((8, 0, 16, 4)), (8, 0))
    if mode == "P":
        palette = GREY.copy().convert("P")
        palette.putpixel((0, 0), 0)
        return palette
    if mode in ("RGBa",):
        return layers.convert("RGBa")
    if mode == "La":
        return layers.convert("LA").convert("La")
    if mode == "PA":
        grey = GREY.convert("PA")
        grey.putalpha(layers.getchannel("A"))
        return grey
    return layers.convert(mode)


def wide(dtype, most):
    return PIL.Image.fromarray((RAMP.astype(np.float64) / 255 * most).astype(dtype))


ON_WHITE = RAMP.copy()
ON_WHITE[:, :8] = 255
SHOWN = {  # mode → (picture, grey values that should be seen)
    "1": (GREY.point(lambda v: 255 * (v > 99)).convert("1"), 255 * (RAMP > 99)),
    "L": (GREY, RAMP),
    "P": (GREY.convert("P"), RAMP),
    "RGB": (GREY.convert("RGB"), RAMP),
    "RGBX": (GREY.convert("RGB").convert("RGBX"), RAMP),
    "CMYK": (GREY.convert("RGB").convert("CMYK"), RAMP),
    "YCbCr": (GREY.convert("RGB").convert("YCbCr"), RAMP),
    "HSV": (GREY.convert("RGB").convert("HSV"), RAMP),
    "RGBA": (half_transparent("RGBA"), ON_WHITE),
    "RGBa": (half_transparent("RGBa"), ON_WHITE),
    "LA": (half_transparent("LA"), ON_WHITE),
    "La": (half_transparent("La"), ON_WHITE),
    "PA": (half_transparent("PA"), ON_WHITE),
    "I;16": (wide(np.uint16, 65535), RAMP),
    "I;16L": (wide("<u2", 65535), RAMP),
    "I;16B": (wide(">u2", 65535), RAMP),
    "I;16N": (wide(np.uint16, 65535), RAMP),
    "I": (wide(np.int32, 65535), RAMP),
    "F": (wide(np.float32, 1), RAMP),
}


def test_no_mode_of_pil_is_left_out():
    assert set(PIL.Image.MODES) == {*SHOWN, "LAB"}


@pytest.mark.parametrize("mode", SHOWN)
def test_what_is_seen(mode):
    image, seen = SHOWN[mode]
    rgb = as_rgb(image)
    assert rgb.mode == "RGB"
    difference = np.abs(np.asarray(rgb).astype(int) - seen[..., None])
    assert difference.max() <= 2, mode
    if converts_exactly(image):
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(rgb))


def test_lab():
    red = PIL.Image.new("LAB", (2, 2), (136, 208, 195))  # L 53, a 80, b 67
    assert np.abs(np.asarray(as_rgb(red))[0, 0] - (255, 0, 0)).max() <= 12


def test_integers_of_32_bits_that_fit_in_8_are_kept():
    assert np.array_equal(np.asarray(as_rgb(wide(np.int32, 255)))[..., 0], RAMP)


@pytest.mark.parametrize(
    "image, message",
    [
        (wide(np.float32, 255), "float values from 0 to 255.*scale them"),
        (wide(np.float32, -1), "float values from -1 to"),
        (wide(np.int32, 2**30), "integers from 0 to .*scale them"),
        (wide(np.float32, np.nan), "NaN"),
    ],
)
def test_pictures_that_do_not_say_what_is_white(image, message):
    with pytest.raises(ValueError, match=message):
        as_rgb(image)
    data = Dataset.from_list(
        [{"image": i, "question": "?", "answer": "a"} for i in (GREY, image)]
    )
    with pytest.raises(ValueError, match=f"row 1: .*{message}"):
        standard_examples(data)


FORMATS = {  # format of a file → modes that it can hold
    "PNG": ("1", "L", "P", "RGB", "LA", "RGBA", "I;16"),
    "TIFF": ("1", "L", "P", "RGB", "LA", "RGBA", "CMYK", "I;16", "I", "F"),
    "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
    "GIF": ("1", "L", "P", "RGB", "RGBA"),
    "WEBP": ("L", "RGB", "RGBA", "P"),
    "BMP": ("1", "L", "P", "RGB"),
}
FILES = [(name, mode) for name, modes in FORMATS.items() for mode in modes]


@pytest.mark.parametrize("name, mode", FILES)
def test_every_format_of_files_through_a_data_set(name, mode):
    image, seen = SHOWN[mode]
    file = io.BytesIO()
    options = {"lossless": True} if name == "WEBP" else {}
    image.save(file, name, **options)
    row = {
        "image": {"bytes": file.getvalue(), "path": None},
        "question": "?",
        "answer": "a",
    }
    features = Features(
        image=ImageFeature(), question=Value("string"), answer=Value("string")
    )
    data = standard_examples(Dataset.from_list([row], features=features))
    shown = np.asarray(data[0]["image"]).astype(int)
    near = 14 if name in ("JPEG", "GIF") else 2
    assert np.abs(shown - seen[..., None]).max() <= near


def test_a_palette_with_a_transparent_colour():
    image = PIL.Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, 200, 0, 0])
    image.putpixel((1, 1), 1)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=0)
    shown = np.asarray(as_rgb(PIL.Image.open(file)))
    assert tuple(shown[0, 0]) == (255, 255, 255)
    assert tuple(shown[1, 1]) == (200, 0, 0)


def test_a_turned_picture_is_turned_before_it_is_stored_anew():
    image = half_transparent("RGBA")
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    row = {"image": {"bytes": file.getvalue(), "path": None}}
    data = Dataset.from_list([row]).cast_column("image", ImageFeature())
    data = data.add_column("question", ["?"]).add_column("answer", ["a"])
    shown = standard_examples(data)[0]["image"]
    assert shown.size == (4, 16)
    assert np.asarray(shown)[0, 0].tolist() == [255, 255, 255]


def test_ordinary_pictures_keep_their_bytes():
    file = io.BytesIO()
    GREY.convert("RGBA").save(file, "PNG")  # opaque
    row = {"image": {"bytes": file.getvalue(), "path": None}}
    data = Dataset.from_list([row]).cast_column("image", ImageFeature())
    data = data.add_column("question", ["?"]).add_column("answer", ["a"])
    stored = standard_examples(data).cast_column("image", ImageFeature(decode=False))
    assert stored[0]["image"]["bytes"] == file.getvalue()


def test_broken_pictures_are_named():
    good = io.BytesIO()
    GREY.save(good, "PNG")
    cells = [{"bytes": b, "path": None} for b in (good.getvalue(), b"no picture")]
    features = Features({"image": ImageFeature()})
    data = Dataset.from_dict({"image": cells}, features=features)
    data = data.add_column("question", ["?"] * 2).add_column("answer", ["a"] * 2)
    with pytest.raises(ValueError, match="row 1: its image cannot be read"):
        standard_examples(data)


def test_equal_pictures_have_one_key():
    assert picture_key(GREY) == picture_key(GREY.convert("RGB"))
    assert picture_key(GREY) == picture_key(wide(np.uint16, 65535))
    assert picture_key(GREY) != picture_key(GREY.transpose(PIL.Image.ROTATE_180))
    assert picture_key(GREY) != picture_key(GREY.resize((8, 8)))
