"""Image folders: pixels of every format, bad files, the split, and the cache of decoded images."""

import concurrent.futures
import csv
import io
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections import Counter
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from PIL import Image, ImageFile

from jaxrobust import data
from jaxrobust._validate import InputError
from jaxrobust.data import decoded as decoding
from jaxrobust.data import folders

RNG = np.random.default_rng(0)
SIZE = (6, 8)  # Height and width.
COLOURS = RNG.integers(0, 256, (*SIZE, 3), np.uint8)
GREYS = COLOURS[..., 0]
FLAT = np.full(SIZE, 100, np.uint8)


def save(path, pixels, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def fill(folder, counts, suffix=".png"):
    """A folder with so many images of each class, every image of one grey level of its own."""
    level = 0
    for name, count in counts.items():
        for number in range(count):
            save(folder / name / f"{number:02}{suffix}", np.full((*SIZE, 3), level, np.uint8))
            level += 1
    return folder


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "weather", {"Rain": 10, "Shine": 5})


@pytest.fixture
def load(tmp_path):
    """``load_folder`` with a cache of this test and small images."""
    def load(path, **options):
        return data.load_folder(path, **{
            "cache_dir": tmp_path / "cache", "image_size": SIZE, "num_threads": 2} | options)
    return load


@pytest.fixture
def decoded():
    """The names of the files that are decoded, in any order."""
    names, decode = [], decoding._decode

    def count(path, *arguments):
        names.append(path.name)
        return decode(path, *arguments)

    with mock.patch.object(decoding, "_decode", count):
        yield names


def pixels_by_path(dataset):
    images = np.concatenate([dataset.train.images[:], dataset.test.images[:]])
    return dict(zip([file.path for file in dataset.files], images, strict=True))


def cache_files(tmp_path):
    return sorted(path.suffix for path in (tmp_path / "cache").iterdir())


# --- pixels -----------------------------------------------------------------------------------

def as_rgb(grey):
    return np.repeat(grey[..., None], 3, axis=-1)


def luma(colours):
    return np.rint(colours @ np.array([0.299, 0.587, 0.114]))


WIDE = (np.arange(48).reshape(SIZE) * 1394).astype(np.uint16)  # 16 bits, up to 65518.
PALETTE = RNG.integers(0, 256, (48, 3), np.uint8)
INDICES = np.arange(48, dtype=np.uint8).reshape(SIZE)


def palette_image():
    image = Image.frombytes("P", SIZE[::-1], INDICES.tobytes())
    image.putpalette(PALETTE.tobytes())
    return image


ALPHA = np.concatenate([COLOURS, GREYS[..., None]], axis=-1)
CASES = {
    "rgb.png": (COLOURS, {}, COLOURS),
    "rgb.bmp": (COLOURS, {}, COLOURS),
    "rgb.tif": (COLOURS, {}, COLOURS),
    "rgb_lzw.tiff": (COLOURS, {"compression": "tiff_lzw"}, COLOURS),
    "rgb_deflate.TIFF": (COLOURS, {"compression": "tiff_deflate"}, COLOURS),
    "rgb.jp2": (COLOURS, {}, COLOURS),
    "rgb.j2k": (COLOURS, {}, COLOURS),
    "rgba.tif": (ALPHA, {}, COLOURS),
    "grey.bmp": (GREYS, {}, as_rgb(GREYS)),
    "grey.jp2": (GREYS, {}, as_rgb(GREYS)),
    "grey.gif": (GREYS, {}, as_rgb(GREYS)),
    "grey16.tif": (WIDE, {}, as_rgb(np.rint(WIDE * (255 / 65535)))),
    "grey16_big_endian.tif": (WIDE.astype(">u2"), {}, as_rgb(np.rint(WIDE * (255 / 65535)))),
    "grey16.jp2": (WIDE, {}, as_rgb(np.rint(WIDE * (255 / 65535)))),
    "black_white.bmp": (GREYS > 99, {}, as_rgb(np.where(GREYS > 99, 255, 0))),
    "black_white.tif": (GREYS > 99, {"compression": "group4"},
                        as_rgb(np.where(GREYS > 99, 255, 0))),
    "palette.gif": (palette_image(), {}, PALETTE[INDICES]),
    "palette_one_transparent.gif": (palette_image(), {"transparency": 7}, PALETTE[INDICES]),
    "palette.bmp": (palette_image(), {}, PALETTE[INDICES]),
    "palette.tif": (palette_image(), {}, PALETTE[INDICES]),
    "rgb.webp": (COLOURS, {"lossless": True}, COLOURS),
    "rgba.png": (ALPHA, {}, COLOURS),
    "rgba.webp": (ALPHA, {"lossless": True, "exact": True}, COLOURS),
    "grey.png": (GREYS, {}, as_rgb(GREYS)),
    "grey_alpha.png": (np.stack([GREYS, FLAT], -1), {}, as_rgb(GREYS)),
    "black_white.png": (GREYS > 99, {}, as_rgb(np.where(GREYS > 99, 255, 0))),
    "grey16.png": (WIDE, {}, as_rgb(np.rint(WIDE * (255 / 65535)))),
    "palette.png": (palette_image(), {}, PALETTE[INDICES]),
    "palette_one_transparent.png": (palette_image(), {"transparency": 7}, PALETTE[INDICES]),
    "palette_transparent.png": (palette_image(), {"transparency": bytes(range(48))},
                                PALETTE[INDICES]),
    "rgb_transparent.png": (COLOURS, {"transparency": (1, 2, 3)}, COLOURS),
}


@pytest.mark.parametrize("name", CASES)
def test_every_lossless_form_becomes_rgb_and_grey_of_the_same_picture(name, tmp_path):
    pixels, options, expected = CASES[name]
    path = save(tmp_path / name, pixels, **options)
    image = data.read_image(path, SIZE)
    assert image.dtype == np.uint8 and image.shape == (*SIZE, 3)
    np.testing.assert_array_equal(image, expected)
    grey = data.read_image(path, SIZE, 1)
    assert grey.dtype == np.uint8 and grey.shape == (*SIZE, 1)
    # Pillow's luma has 16 bits behind the point.
    np.testing.assert_allclose(grey[..., 0], luma(expected.astype(float)), atol=1)


def test_16_bit_grey_reaches_both_ends_and_does_not_saturate(tmp_path):
    levels = np.array([[0, 128, 129, 255, 256, 257, 32768, 65406, 65407, 65535]], np.uint16)
    path = save(tmp_path / "a.png", levels)
    with Image.open(path) as image:
        assert image.mode == "I;16"
    assert data.read_image(path, levels.shape, 1)[0, :, 0].tolist() == [
        0, 0, 1, 1, 1, 1, 128, 254, 255, 255]


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(
        ">I", zlib.crc32(kind + content))


def test_16_bit_colours_keep_their_upper_bits(tmp_path):
    values = RNG.integers(0, 65536, (*SIZE, 3)).astype(">u2")
    values[0, 0] = 0, 65535, 32768
    rows = b"".join(b"\0" + row.tobytes() for row in values)  # Each with its filter: none.
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", struct.pack(">IIBBBBB", SIZE[1], SIZE[0], 16, 2, 0, 0, 0))
        + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b""))
    np.testing.assert_array_equal(data.read_image(tmp_path / "a.png", SIZE), values >> 8)


JPEGS = {
    # Colour -> what it looks like; JPEG is exact to a few levels on a flat picture.
    "RGB": ((200, 30, 90), (200, 30, 90)),
    "L": (77, (77, 77, 77)),
    # Cyan, magenta, yellow and black are what is taken away from white.
    "CMYK": ((255, 0, 0, 0), (0, 255, 255)),
}


@pytest.mark.parametrize("mode", JPEGS)
def test_jpegs_of_every_mode_become_rgb(mode, tmp_path):
    colour, expected = JPEGS[mode]
    path = save(tmp_path / "a.jpg", Image.new(mode, (16, 16), colour), quality=95)
    with Image.open(path) as image:
        assert image.mode == mode
    image = data.read_image(path, (16, 16))
    np.testing.assert_allclose(image, np.broadcast_to(expected, (16, 16, 3)), atol=2)
    np.testing.assert_allclose(
        data.read_image(path, (16, 16), 1), luma(np.array(expected, float)), atol=2)


# How a camera that wrote this orientation has turned the picture.
STORED_AS = {
    1: lambda image: image, 2: lambda image: image[:, ::-1], 3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1], 5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, 1), 7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: np.rot90(image, -1),
}


@pytest.mark.parametrize("orientation", STORED_AS)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".avif"])
def test_exif_orientation_is_undone(orientation, suffix, tmp_path):
    upright = np.full((32, 48, 3), 20, np.uint8)
    upright[:16, :16] = 220  # Its top left corner, and
    upright[:16, 32:] = 120  # another grey at the top right.
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a{suffix}", np.ascontiguousarray(STORED_AS[orientation](upright)),
                exif=exif, **{".webp": {"lossless": True}, ".tif": {}}.get(
                    suffix, {"quality": 95}))
    np.testing.assert_allclose(data.read_image(path, (32, 48)), upright, atol=3)


def triangle_resize(image, size):
    """Bilinear resizing whose triangle is as wide as the reduction, by its definition."""
    for axis, out in enumerate(size):
        inside = image.shape[axis]
        scale = inside / out
        centres = (np.arange(out) + 0.5) * scale
        distance = np.abs(np.arange(inside) + 0.5 - centres[:, None]) / max(scale, 1)
        weights = np.maximum(1 - distance, 0)
        weights /= weights.sum(1, keepdims=True)
        image = np.moveaxis(np.tensordot(weights, image, axes=(1, axis)), 0, axis)
    return image


@pytest.mark.parametrize("size", [(3, 4), (13, 5), (12, 16), (6, 8)])
def test_resizing_is_bilinear_and_does_not_alias(size, tmp_path):
    path = save(tmp_path / "a.png", COLOURS)
    np.testing.assert_allclose(
        data.read_image(path, size), triangle_resize(COLOURS.astype(float), size), atol=1.01)


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.fromarray(COLOURS), Image.fromarray(255 - COLOURS)]
    for name, options in {"a.png": {}, "a.webp": {"lossless": True}, "a.tif": {}}.items():
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(data.read_image(tmp_path / name, SIZE), COLOURS)
    for suffix, atol in ((".gif", 0), (".avif", 2)):  # Flat ones, which these keep, or nearly so.
        frames = [Image.new("L", SIZE[::-1], level) for level in (50, 200)]
        frames[0].save(tmp_path / f"b{suffix}", save_all=True, append_images=frames[1:])
        np.testing.assert_allclose(data.read_image(tmp_path / f"b{suffix}", SIZE), 50, atol=atol)


def test_a_format_that_this_pillow_was_built_without_is_named(tmp_path):
    for suffix, what in ((".avif", "AVIF"), (".jp2", "JPEG 2000")):
        path = save(tmp_path / f"a{suffix}", COLOURS)
        with mock.patch("PIL.features.check", return_value=False), pytest.raises(
                InputError, match=f"a {what} image, which this build of Pillow does not support.$"):
            data.read_image(path, SIZE)


def test_an_avif_photograph_is_the_picture_that_was_saved(tmp_path):
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:16, :24], picture[16:, 24:] = (200, 30, 90), (20, 160, 220)
    path = save(tmp_path / "photo", picture, format="AVIF", quality=95)  # Whatever its name is.
    assert np.abs(data.read_image(path, (32, 48)).astype(int) - picture).mean() < 4


def test_reading_one_image_is_checked(tmp_path):
    path = save(tmp_path / "a.png", COLOURS)
    with pytest.raises(InputError, match="^Expected channels=4 to be 1 or 3.$"):
        data.read_image(path, SIZE, 4)
    with pytest.raises(InputError, match=r"^Expected image_size=\(0, 5\) to be"):
        data.read_image(path, (0, 5))
    with pytest.raises(InputError, match=f"^Cannot read the image {tmp_path}/no.png: No such file"
                                         " or directory.$"):
        data.read_image(tmp_path / "no.png", SIZE)


# --- the data set -----------------------------------------------------------------------------

def test_a_folder_is_loaded_with_its_classes_and_normalisation(folder, load):
    dataset = load(folder)
    assert dataset.name == f"folder:{folder}" and dataset.class_names == ("Rain", "Shine")
    assert dataset.mean == (0.485, 0.456, 0.406) and dataset.std == (0.229, 0.224, 0.225)
    assert dataset.flip and dataset.skipped == ()
    assert dataset.train.images.shape == (12, *SIZE, 3)
    assert dataset.test.images.shape == (3, *SIZE, 3)
    pixels, labels = pixels_by_path(dataset), np.concatenate(
        [dataset.train.labels, dataset.test.labels])
    assert sorted(pixels) == [f"Rain/{n:02}.png" for n in range(10)] + [
        f"Shine/{n:02}.png" for n in range(5)]
    for level, path in enumerate(sorted(pixels)):
        np.testing.assert_array_equal(pixels[path], np.full((*SIZE, 3), level))
    for file, label in zip(dataset.files, labels, strict=True):
        assert file.path.split("/")[0] == file.label == dataset.class_names[label]
    for side in ("train", "test"):
        paths = [file.path for file in dataset.files if file.split == side]
        assert paths == sorted(paths)


def test_classes_may_be_nested_and_hidden_files_are_passed_over(folder, load):
    save(folder / "Shine" / "deep" / "er" / "x.webp", COLOURS)
    for hidden in ("Shine/.hidden.png", "Shine/.deep/x.png", ".git/x.png", ".x.png"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_bytes(b"no image")
    (folder / "README.txt").write_text("Beside the classes, and no image by its name.")
    files = load(folder).files
    assert len(files) == 16
    assert ("Shine/deep/er/x.webp", "Shine") in [file[:2] for file in files]


def test_links_to_folders_are_followed_and_a_loop_ends(folder, load, tmp_path):
    fill(tmp_path / "elsewhere", {"b": 15, "a": 5})  # Levels of grey that the others have not.
    (folder / "Fog").symlink_to(tmp_path / "elsewhere" / "a")
    (folder / "Rain" / "self").symlink_to(folder / "Rain")
    dataset = load(folder, outside_links=True)
    assert Counter(file.label for file in dataset.files) == {"Fog": 5, "Rain": 10, "Shine": 5}


def write_csv(path, rows, encoding="utf-8"):
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    path.write_text(text.getvalue(), encoding=encoding, newline="")
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_csv_file_names_the_images_and_their_classes(folder, load, encoding):
    rows = [("label", "path", "more")] + [
        (f"class {n % 2}", f"{'./' if n == 3 else ''}Rain/{n:02}.png", "x")
        for n in reversed(range(10))]
    dataset = load(write_csv(folder / "labels.csv", rows, encoding), test_share=0.4)
    assert dataset.class_names == ("class 0", "class 1")
    assert {file.path: file.label for file in dataset.files} == {
        f"Rain/{n:02}.png": f"class {n % 2}" for n in range(10)}
    assert Counter(file.split for file in dataset.files) == {"train": 6, "test": 4}
    for path, pixels in pixels_by_path(dataset).items():
        assert (pixels == int(path[5:7])).all()


def test_what_is_wrong_in_a_csv_file_is_named_by_its_line(folder, load):
    rows = [("path", "label")] + [(f"Rain/{n:02}.png", "ab"[n % 2]) for n in range(10)] + [
        ("Rain/none.png", "a"), ("", "a"), ("Shine/00.png", ""), ("Rain/01.png", "b"),
        ("Shine", "a"), ("Rain/gone.png", "c")]
    path = write_csv(folder / "labels.csv", rows)
    with pytest.raises(data.BadFiles) as error:
        load(path)
    assert error.value.lines == (
        "Rain/gone.png: No such file or directory", "Rain/none.png: No such file or directory",
        "Shine: not a file", "c: a class without a good image",
        "line 13: expected a path and a label", "line 14: expected a path and a label",
        "line 15: Rain/01.png is listed twice")
    assert load(path, skip_bad=True).skipped == error.value.lines


@pytest.mark.parametrize(("content", "expected"), [
    (b"", "Expected the columns path and label in .*labels.csv, got ''."),
    (b"file,label\na.png,b\n",
     "Expected the columns path and label in .*labels.csv, got 'file,label'."),
    (b"path,label\n\xff\xfe.png,b\n", "Cannot read .*labels.csv: 'utf-8' codec can't decode.*"),
    (b"path,label\n", "Expected images of at least 2 classes in .*labels.csv, got no image."),
], ids=["empty", "columns", "encoding", "no rows"])
def test_a_csv_file_that_cannot_be_used_is_one_line(content, expected, load, tmp_path):
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        load(path)
    assert re.fullmatch(expected, str(error.value))


def no_classes(folder):
    folder.mkdir()
    save(folder / ".hidden.png", COLOURS)


def another_file(folder):
    folder.write_text("path,label\n")


@pytest.mark.parametrize(("make", "options", "expected"), [
    (lambda folder: None, {}, "Expected a folder of images or a CSV file at {}, got nothing."),
    (another_file, {}, "Expected a folder of images or a CSV file at {}, got another file."),
    (no_classes, {}, "Expected images of at least 2 classes in {}, got no image."),
    (lambda folder: fill(folder, {"a": 5}), {},
     "Expected images of at least 2 classes in {}, got only 'a'."),
    (lambda folder: fill(folder, {"a": 9, "b": 1}), {},
     "Expected at least 5 images of every class in {} for both sides of the split with "
     "test_share=0.2, got 1 of 'b'."),
    (lambda folder: fill(folder, {"a": 20, "b": 2}), {},
     "Expected at least 6 images of every class in {} for both sides of the split with "
     "test_share=0.2, got 2 of 'b'."),  # 4 of 22 are drawn, so that 5 may have none among them.
    (lambda folder: fill(folder, {"a": 3, "b": 3}), {"test_share": 0.01},
     "Expected at least 100 images of every class in {} for both sides of the split with "
     "test_share=0.01, got 3 of 'b'."),
    (lambda folder: None, {"test_share": 1.0}, "Expected test_share=1.0 in (0, 1)."),
    (lambda folder: None, {"split_seed": -1}, "Expected split_seed=-1 in [0, 4294967296)."),
    (lambda folder: None, {"num_threads": 0}, "Expected num_threads=0 in [1, inf)."),
    (lambda folder: None, {"image_size": (5, 0)},
     "Expected image_size=(5, 0) to be (height, width) in pixels, each >= 1 and <= 16384."),
], ids=["nothing", "file", "empty", "one class", "one image", "two images", "small share",
        "share", "seed", "threads", "size"])
def test_what_cannot_be_a_data_set_is_one_line(
        make, options, expected, load, tmp_path, decoded):
    make(tmp_path / "images")
    with pytest.raises(InputError) as error:
        load(tmp_path / "images", **options)
    assert str(error.value) == expected.format(tmp_path / "images")
    if "2 classes" in expected:  # Which is seen before anything is decoded.
        assert not decoded and not (tmp_path / "cache").exists()


def test_without_pillow_the_extra_to_install_is_named(folder, load):
    with mock.patch.dict(sys.modules, {"PIL": None, "PIL.Image": None}):
        for call in (lambda: load(folder), lambda: data.read_image(folder / "x.png", SIZE)):
            with pytest.raises(
                    InputError, match=r"^[^\n]* needs Pillow .*pip install pillow$"):
                call()


def test_the_library_is_imported_without_pillow():
    script = "import sys; sys.modules['PIL'] = None; import jaxrobust.data"
    subprocess.run([sys.executable, "-c", script], check=True)


# --- bad files --------------------------------------------------------------------------------

NO_IMAGE = "not a JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF or JPEG 2000 image"


def png_header(width, height):
    """A PNG that says it has so many pixels, and has none."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 10**6) + b"IDAT"


def add_bad_files(folder):
    """Adds a file of every kind of bad one; returns their lines, as patterns."""
    bad = folder / "Rain"
    for suffix in CUT:
        whole = save(bad / f"cut.{suffix}", RNG.integers(0, 256, (64, 64, 3), np.uint8),
                     **OPTIONS.get(suffix, {})).read_bytes()
        (bad / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
        (bad / f"head.{suffix}").write_bytes(whole[:12])
    (bad / "empty.png").touch()
    (bad / "notes.docx").write_text("no image")
    (bad / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (bad / "sound.wav").write_bytes(b"RIFF\x00\x00\x00\x00WAVE")
    (bad / "zeros.jpg").write_bytes(bytes(100))
    save(bad / "float.tif", RNG.random(SIZE).astype(np.float32))
    save(bad / "integer.tif", WIDE.astype(np.int32))
    save(bad / "other.ppm", COLOURS)  # Which Pillow reads, too.
    save(bad / "raw.nef", COLOURS, format="TIFF", tiffinfo={254: 1})  # A thumbnail comes first.
    save(bad / "raw.dng", COLOURS, format="TIFF", tiffinfo={50706: b"\1\4\0\0"})
    (bad / "bomb.png").write_bytes(png_header(9500, 9500))  # Where Pillow would warn.
    (bad / "huge.png").write_bytes(png_header(50000, 50000))
    (bad / "gone.png").symlink_to(bad / "nothing")
    os.mkfifo(bad / "pipe.png")
    (folder / "Fog" / "deep").mkdir(parents=True)
    (folder / "Hail").mkdir()
    (folder / "Hail" / "a.png").write_bytes(b"no image")
    (folder / "Snow").symlink_to(folder / "nothing")
    save(folder / "stray.png", COLOURS)
    limit = Image.MAX_IMAGE_PIXELS
    lines = {
        "Fog: a class without a file", "Hail/a.png: " + NO_IMAGE,
        "Hail: a class without a good image",
        f"Rain/bomb.png: 9500 x 9500 pixels, more than the {limit} that Pillow considers safe",
        "Rain/empty.png: empty file",
        "Rain/float.tif: pixels of 32 bits, whose range is unknown",
        "Rain/integer.tif: pixels of 32 bits, whose range is unknown",
        "Rain/gone.png: No such file or directory",
        f"Rain/huge.png: 50000 x 50000 pixels, more than the {limit} that Pillow considers "
        "safe", "Rain/notes.docx: " + NO_IMAGE, "Rain/other.ppm: " + NO_IMAGE,
        "Rain/phone.heic: a HEIC image; convert it to .*",
        "Rain/pipe.png: not a file", "Rain/raw.nef: a camera's raw file; convert it to .*",
        "Rain/raw.dng: a camera's raw file; convert it to .*",
        "Rain/sound.wav: " + NO_IMAGE, "Rain/zeros.jpg: " + NO_IMAGE,
        "Snow: a broken link", "stray.png: in no class folder"}
    for suffix in CUT:
        cut = ".+" if suffix == "webp" else ".*([Tt]runcated|broken data|BMFF parsing failed).*"
        lines |= {rf"Rain/cut.{suffix}: {cut}", rf"Rain/head.{suffix}: .+"}
    return sorted(lines)


CUT = ("jpg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "jp2", "j2k")
OPTIONS = {"tiff": {"compression": "tiff_lzw"}}  # Its directory is at the end; that of .tif first.


def test_every_bad_file_and_class_is_named_with_its_reason(folder, load):
    patterns = add_bad_files(folder)
    with pytest.raises(data.BadFiles) as error:
        load(folder)
    for line, pattern in zip(error.value.lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), line
    assert str(error.value) == (
        f"Bad files in {folder}: {len(patterns)}, the first Fog: a class without a file.")


def test_bad_files_are_left_out_on_request_and_nothing_else_is(folder, load):
    good = load(folder)
    add_bad_files(folder)
    dataset = load(folder, skip_bad=True)
    with pytest.raises(data.BadFiles) as error:
        load(folder)
    assert dataset.skipped == error.value.lines
    assert dataset.files == good.files and dataset.class_names == good.class_names
    np.testing.assert_array_equal(dataset.train.images, good.train.images)
    np.testing.assert_array_equal(dataset.test.images, good.test.images)


def test_one_bad_file_is_named_when_it_is_read_alone(folder):
    for pattern in add_bad_files(folder):
        name, reason = pattern.split(": ", 1)
        if (folder / name).is_file():
            if name == "stray.png":
                continue
            with pytest.raises(InputError) as error:
                data.read_image(folder / name, SIZE)
            prefix = f"Cannot read the image {folder / name}: "
            assert str(error.value).startswith(prefix)
            assert re.fullmatch(reason + r"\.", str(error.value).removeprefix(prefix))


@pytest.mark.parametrize("suffix", CUT)
@pytest.mark.parametrize("limit", [1000, 4095])
def test_an_image_too_large_is_refused_before_it_is_decoded_and_without_a_warning(
        suffix, limit, tmp_path):
    path = save(tmp_path / f"a.{suffix}", np.zeros((64, 64, 3), np.uint8))
    undecoded = mock.Mock(side_effect=AssertionError("pixels were decoded"))
    with mock.patch.object(Image, "MAX_IMAGE_PIXELS", limit), mock.patch.object(
            ImageFile.ImageFile, "load", undecoded), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="64 x 64 pixels, more than|4096 pixels. exceeds"):
            data.read_image(path, SIZE)
    with mock.patch.object(Image, "MAX_IMAGE_PIXELS", 4096):
        data.read_image(path, SIZE)
    with mock.patch.object(Image, "MAX_IMAGE_PIXELS", None):
        data.read_image(path, SIZE)


def test_all_bad_or_too_few_left_is_one_line(load, tmp_path):
    folder = fill(tmp_path / "images", {"a": 9, "b": 3})
    for path in (folder / "b").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(InputError) as error:
        load(folder, skip_bad=True)
    assert str(error.value) == (f"Expected images of at least 2 classes in {folder}, got only 'a' "
                                "without the 4 bad ones.")
    save(folder / "b" / "good.png", COLOURS)
    with pytest.raises(InputError, match=r"test_share=0.2, got 1 of 'b' without the 3 bad ones\.$"):
        load(folder, skip_bad=True)


def test_names_are_one_line_whatever_they_are(folder, load):
    (folder / "Rain" / "two\nlines.png").write_bytes(b"no image")
    os.close(os.open(os.fsencode(folder / "Rain") + b"/\xff.png", os.O_CREAT))
    with pytest.raises(data.BadFiles) as error:
        load(folder)
    assert len(error.value.lines) == 2
    assert all(line.isprintable() for line in error.value.lines)
    save(folder / "Rain" / "two\nlines.png", COLOURS)
    (folder / "Rain" / "comma, \"quote\".png").write_bytes(
        (folder / "Rain" / "two\nlines.png").read_bytes())
    files = load(folder, skip_bad=True).files
    assert data.files_from_csv(data.files_to_csv(files)) == files
    assert len(files) == 17


def test_a_folder_that_cannot_be_read_is_named(folder, load):
    (folder / "Rain" / "deep").mkdir()
    scandir = os.scandir

    def denied(path):
        if pathlib.Path(path).name == "deep":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with mock.patch.object(os, "scandir", denied), pytest.raises(data.BadFiles) as error:
        load(folder)
    assert error.value.lines == ("Rain/deep: Permission denied",)


# --- split ------------------------------------------------------------------------------------

@hypothesis.settings(max_examples=40)
@hypothesis.given(st.lists(st.integers(5, 30), min_size=2, max_size=5), st.integers(0, 2**32 - 1),
                  st.sampled_from([0.2, 0.3, 0.5]))
def test_the_split_is_stratified_seeded_and_disjoint(counts, seed, share):
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    names, groups = [str(label) for label in range(len(counts))], np.arange(len(labels))
    sides = folders._split("here", labels, names, share, seed, 0, groups)
    rows = np.concatenate([sides["train"], sides["test"]])
    np.testing.assert_array_equal(np.sort(rows), np.arange(len(labels)))
    assert len(sides["test"]) == round(share * len(labels))
    taken = np.bincount(labels[sides["test"]], minlength=len(counts))
    assert (np.abs(taken - share * np.array(counts)) < 1.5).all()
    again = folders._split("here", labels, names, share, seed, 0, groups)
    for side in sides:
        np.testing.assert_array_equal(sides[side], again[side])


@hypothesis.settings(max_examples=60)
@hypothesis.given(st.lists(st.integers(1, 8), min_size=2, max_size=4), st.integers(0, 9))
def test_a_split_has_every_class_on_both_sides_or_is_one_line(counts, seed):
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    try:
        sides = folders._split("here", labels, [str(n) for n in range(len(counts))], 0.2, seed, 0,
                               np.arange(len(labels)))
    except InputError as error:
        smallest = min(counts)
        assert smallest < 5 and re.search(rf"test_share=0.2, got {smallest} of '\d'\.$", str(error))
    else:
        for rows in sides.values():
            assert set(labels[rows]) == set(range(len(counts)))


def test_another_seed_is_another_split_and_the_same_one_is_the_same(folder, load):
    first, again, other = (load(folder, split_seed=seed).files for seed in (0, 0, 1))
    assert first == again != other
    assert {file.path for file in first} == {file.path for file in other}
    for files in (first, other):
        assert Counter(file[1:] for file in files) == {
            ("Rain", "train"): 8, ("Rain", "test"): 2, ("Shine", "train"): 4, ("Shine", "test"): 1}


def test_splitting_off_too_little_for_a_class_is_named():
    labels = np.array([0] * 40 + [1] * 2, np.int32)
    split = data.Split(np.zeros((42, 1, 1, 3), np.uint8), labels)
    with pytest.raises(InputError, match="^Expected size=4 to leave every class of 42 examples on "
                                         "both sides, got one side without class 1.$"):
        data.split_off(split, 4, seed=0)


def test_the_split_is_saved_as_csv_and_read_back(folder, load):
    files = load(folder).files
    text = data.files_to_csv(files)
    assert text.splitlines()[0] == "path,label,split" and len(text.splitlines()) == 16
    assert data.files_from_csv(text) == files
    data.check_same_files(data.files_from_csv(text), files, "weather")


@pytest.mark.parametrize(("text", "expected"), [
    ("", "Expected the columns path,label,split, got ."),
    ("path,label\na,b\n", "Expected the columns path,label,split, got path,label."),
    ("path,label,split\na,b,train\na,b\n", "Expected 3 columns in row 2, got 2."),
])
def test_another_csv_text_is_named(text, expected):
    with pytest.raises(InputError) as error:
        data.files_from_csv(text)
    assert str(error.value) == expected


def test_what_has_changed_since_is_counted(folder, load):
    saved = load(folder).files
    (folder / "Rain" / "00.png").unlink()
    (folder / "Rain" / "01.png").unlink()
    save(folder / "Shine" / "new.png", COLOURS)
    current = load(folder).files
    common = {file.path for file in saved} & {file.path for file in current}
    moved = sum({file.path: file for file in saved}[path] != {
        file.path: file for file in current}[path] for path in common)
    with pytest.raises(InputError) as error:
        data.check_same_files(saved, current, "weather")
    assert str(error.value) == (
        f"Expected the images of weather to be unchanged, got 1 new, 2 gone and {moved} moved to "
        "another class or side of the split, the first Rain/00.png.")
    relabelled = [saved[0]._replace(label="Shine"), *saved[1:]]
    resplit = [*saved[:-1], saved[-1]._replace(split="train")]
    for other in (relabelled, resplit):
        with pytest.raises(InputError, match="got 0 new, 0 gone and 1 moved"):
            data.check_same_files(saved, other, "weather")


def test_a_data_set_whose_files_do_not_fit_is_named(folder, load):
    dataset = load(folder)
    fields = {name: getattr(dataset, name) for name in (
        "name", "train", "test", "class_names", "mean", "std", "flip")}
    for files in (dataset.files[1:], dataset.files[::-1]):
        with pytest.raises(InputError, match="Expected files of 12 training and then 3 test"):
            data.Dataset(**fields, files=files)


# --- in memory and stored ---------------------------------------------------------------------

def test_stored_images_are_those_in_memory_also_streamed(folder, load):
    pytest.importorskip("grain", reason="Streaming needs Grain.")
    (folder / "Rain" / "zz_bad.png").write_bytes(b"no image")  # Rows of the file are left out.
    (folder / "Rain" / "00_bad.png").write_bytes(b"no image")
    resident = load(folder, skip_bad=True)
    stored = load(folder, skip_bad=True, in_memory=False)
    assert stored.files == resident.files and stored.skipped == resident.skipped
    for lazy, split in ((stored.train, resident.train), (stored.test, resident.test)):
        assert isinstance(lazy.images, data.StoredImages)
        assert isinstance(split.images, np.ndarray)
        np.testing.assert_array_equal(lazy.images[:], split.images)
        np.testing.assert_array_equal(lazy.labels, split.labels)
    streams = [list(data.stream_batches(split, jax.random.key(0), batch_size=5, stop=7))
               for split in (stored.train, resident.train)]
    for (images, labels), (expected, expected_labels) in zip(*streams, strict=True):
        np.testing.assert_array_equal(images, expected)
        np.testing.assert_array_equal(labels, expected_labels)


def test_a_folder_is_a_data_set_by_name(folder, tmp_path):
    options = {"image_size": SIZE, "split_seed": 3, "test_share": 0.4}
    dataset = data.load_dataset(f"folder:{folder}", tmp_path, in_memory=False, **options)
    assert (tmp_path / "image_folders").is_dir()
    assert isinstance(dataset.train.images, data.StoredImages)
    direct = data.load_folder(folder, cache_dir=tmp_path / "other", **options)
    assert dataset.files == direct.files and dataset.name == direct.name
    data.load_dataset(f"folder:{folder}", tmp_path, cache_dir=tmp_path / "mine", **options)
    assert (tmp_path / "mine").is_dir()


@pytest.mark.parametrize(("name", "options", "expected"), [
    ("folder:", {}, "Expected a path after dataset='folder:', got none."),
    ("digits", {"image_size": (8, 8)},
     "Expected image_size only with dataset='folder:PATH', got dataset='digits'."),
    ("folders", {}, "Expected one of: digits, cifar10, svhn_cropped, folder:PATH."),
])
def test_names_that_are_no_folder_are_one_line(name, options, expected):
    with pytest.raises(InputError, match=re.escape(expected) + "$"):
        data.load_dataset(name, **options)


# --- the cache --------------------------------------------------------------------------------

def test_a_second_load_decodes_nothing_not_even_bad_files(folder, load, decoded, tmp_path):
    (folder / "Rain" / "bad.png").write_bytes(b"no image")
    with pytest.raises(data.BadFiles) as error:
        load(folder)
    assert len(decoded) == 16
    dataset = load(folder, skip_bad=True)
    load(folder, split_seed=1, test_share=0.5, in_memory=False, skip_bad=True)
    with pytest.raises(data.BadFiles) as again:
        load(folder)
    assert len(decoded) == 16 and again.value.lines == error.value.lines == dataset.skipped
    assert cache_files(tmp_path) == [".json", ".npy"]


def test_only_new_and_changed_files_are_decoded_again(folder, load, decoded, tmp_path):
    before = load(folder)
    decoded.clear()
    save(folder / "Rain" / "03.png", COLOURS)
    (folder / "Rain" / "04.png").touch()
    save(folder / "Rain" / "04a.png", GREYS)
    (folder / "Rain" / "05.png").unlink()
    (folder / "Shine" / "01.png").write_bytes(b"no image")
    after = load(folder, skip_bad=True)
    assert sorted(decoded) == ["01.png", "03.png", "04.png", "04a.png"]
    changed = {"Rain/03.png": COLOURS, "Rain/04a.png": as_rgb(GREYS)}
    old = pixels_by_path(before)
    for path, pixels in pixels_by_path(after).items():
        np.testing.assert_array_equal(pixels, changed[path] if path in changed else old[path])
    assert after.skipped == (f"Shine/01.png: {NO_IMAGE}",)
    assert cache_files(tmp_path) == [".json", ".npy"]
    decoded.clear()
    save(folder / "Shine" / "01.png", 255 - COLOURS)
    np.testing.assert_array_equal(pixels_by_path(load(folder))["Shine/01.png"], 255 - COLOURS)
    assert decoded == ["01.png"]


def test_sizes_and_folders_have_caches_of_their_own(folder, load, decoded, tmp_path):
    load(folder)
    assert load(folder, image_size=(3, 4)).train.images.shape[1:] == (3, 4, 3)
    assert load(folder, image_size=SIZE[::-1]).train.images.shape[1:] == (8, 6, 3)
    shutil.copytree(folder, tmp_path / "copy")
    save(tmp_path / "copy" / "Rain" / "00.png", COLOURS)
    load(tmp_path / "copy")
    assert len(decoded) == 60
    for path, options in ((folder, {}), (folder, {"image_size": (3, 4)}), (tmp_path / "copy", {})):
        load(path, **options)
    assert len(decoded) == 60


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path):
    os.truncate(path, 0)


def other_array(path):
    np.save(path, np.zeros((15, *SIZE, 3), np.float32))


def other_record(path):
    path.write_text("[1, 2]")


@pytest.mark.parametrize(("suffix", "damage"), [
    (".npy", cut), (".npy", empty), (".npy", other_array), (".npy", pathlib.Path.unlink),
    (".json", cut), (".json", empty), (".json", other_record), (".json", pathlib.Path.unlink),
], ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_a_damaged_cache_is_built_again(suffix, damage, folder, load, decoded, tmp_path):
    before = load(folder)
    file, = (tmp_path / "cache").glob(f"*{suffix}")
    damage(file)
    after = load(folder)
    assert len(decoded) == 30
    np.testing.assert_array_equal(after.train.images, before.train.images)
    load(folder)
    assert len(decoded) == 30
    assert cache_files(tmp_path) == [".json", ".npy"]


@pytest.mark.parametrize("what", ["__version__", "MAX_IMAGE_PIXELS"])
def test_another_pillow_decodes_again(what, folder, load, decoded):
    import PIL

    load(folder)
    with mock.patch.object(*{"__version__": (PIL, what, "1.0"),
                             "MAX_IMAGE_PIXELS": (Image, what, 10**6)}[what]):
        load(folder)
    assert len(decoded) == 30


def test_a_file_that_could_not_be_read_is_tried_again(folder, load):
    decode = decoding._decode

    def denied(path, *arguments):
        if path.name == "03.png":
            raise PermissionError(13, "Permission denied", str(path))
        return decode(path, *arguments)

    with mock.patch.object(decoding, "_decode", denied), pytest.raises(data.BadFiles) as error:
        load(folder)
    assert error.value.lines == ("Rain/03.png: Permission denied",
                                 "Shine/03.png: Permission denied")
    with mock.patch.object(decoding, "_decode", wraps=decode) as count:
        assert len(load(folder).files) == 15
    assert count.call_count == 2


def test_running_out_of_memory_is_no_bad_file(folder, load):
    with mock.patch.object(decoding, "_decode", side_effect=MemoryError), pytest.raises(
            MemoryError):
        load(folder, skip_bad=True)


def test_progress_is_reported_while_files_are_decoded_and_not_after(folder, load):
    calls = []
    load(folder, progress=lambda *call: calls.append(call))
    assert calls == [(done, 15) for done in range(1, 16)]
    load(folder, progress=lambda *call: calls.append(call))
    assert len(calls) == 15


def test_what_is_interrupted_leaves_nothing_and_stops_soon(folder, load, decoded, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    enough, decode = threading.Event(), decoding._decode

    def slow(*arguments):
        enough.wait(0.05)
        return decode(*arguments)

    with mock.patch.object(decoding, "_decode", slow), pytest.raises(KeyboardInterrupt):
        load(folder, progress=interrupt, num_threads=1)
    assert cache_files(tmp_path) == [] and len(decoded) < 15
    assert len(load(folder).files) == 15


def test_what_a_killed_process_left_is_removed_a_day_later(folder, load, tmp_path):
    load(folder)
    index, = (tmp_path / "cache").glob("*.json")
    old, new = (index.with_name(f"{index.stem}-{name}.tmp") for name in ("old", "new"))
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    load(folder)  # Nothing is written.
    assert old.exists()
    (folder / "Rain" / "00.png").touch()
    load(folder)
    assert not old.exists() and new.exists()


def test_a_full_disk_is_one_line_before_anything_is_decoded(folder, load, decoded, tmp_path):
    with mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=2159)), pytest.raises(
            InputError) as error:
        load(folder)
    assert str(error.value) == (
        f"Expected 0.000 GB of free space in {tmp_path}/cache for the decoded images of {folder}, "
        "got 0.000 GB.")
    assert not decoded
    with mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=2160)):
        load(folder)


class FullDisk(io.FileIO):
    """A new file, on a disk with room for no more than 1,000 bytes."""

    def write(self, content):
        if self.tell() + memoryview(content).nbytes > 1000:
            raise OSError(28, "No space left on device")
        return super().write(content)


def small_disk(path, mode):
    return FullDisk(path, mode) if mode == "wb" else open(path, mode)


@pytest.mark.parametrize("full", [
    mock.patch.object(os, "fsync", side_effect=OSError(28, "No space left on device")),
    mock.patch.object(decoding, "open", small_disk, create=True)], ids=["at the end", "before"])
def test_a_disk_that_fills_up_meanwhile_is_one_line_and_leaves_nothing(
        full, folder, load, tmp_path):
    with full, pytest.raises(InputError) as error:
        load(folder)
    assert str(error.value) == (
        f"Cannot write the decoded images to {tmp_path}/cache: No space left on device.")
    assert cache_files(tmp_path) == []


def test_a_cache_folder_that_cannot_be_made_is_one_line(folder, load, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as error:
        load(folder, cache_dir=tmp_path / "file" / "cache")
    assert str(error.value) == (
        f"Cannot write the decoded images to {tmp_path}/file/cache: Not a directory.")


def test_a_cache_inside_of_the_folder_would_be_a_class_and_is_refused(folder, load):
    with pytest.raises(InputError, match=f"^Expected cache_dir={folder}/cache outside of {folder}"):
        load(folder, cache_dir=folder / "cache")


def test_loads_at_once_all_get_the_whole(folder, load, tmp_path):
    expected = load(folder, cache_dir=tmp_path / "alone")
    start = threading.Barrier(6)

    def load_one(number):
        start.wait()
        # Half of them find that a file has changed.
        if number % 2:
            (folder / "Rain" / "00.png").touch()
        return load(folder, in_memory=bool(number % 3))

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for dataset in pool.map(load_one, range(6)):
            assert dataset.files == expected.files
            np.testing.assert_array_equal(dataset.train.images[:], expected.train.images)
            np.testing.assert_array_equal(dataset.test.images[:], expected.test.images)
    np.testing.assert_array_equal(load(folder).train.images, expected.train.images)
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_what_is_open_stays_as_it_was_when_the_cache_is_replaced(folder, load):
    opened = load(folder, in_memory=False)
    before = pixels_by_path(opened)
    for number, path in enumerate((folder / "Rain").iterdir()):
        save(path, np.roll(COLOURS, number, axis=0 if number < 6 else 1))
    load(folder)
    after = pixels_by_path(opened)
    for path in before:
        np.testing.assert_array_equal(after[path], before[path])
