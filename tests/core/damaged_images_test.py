"""A hundred image files of all formats that are damaged or odd: one line, or a picture."""

import hashlib
import io
import os
import struct
import warnings
from unittest import mock

import numpy as np
import pytest
from PIL import Image, ImageFile

from jaxrobust import data
from jaxrobust._validate import InputError
from jaxrobust.data import decoded

SIZE = (6, 8)
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "tif": "TIFF", "bmp": "BMP", "gif": "GIF",
           "avif": "AVIF", "jp2": "JPEG2000"}


def picture(width=40, height=30, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height // 2 + 1, width // 2 + 1, 3))
    image = Image.fromarray(pixels.astype(np.uint8)).resize((width, height))
    return image.convert(mode)


def content_of(suffix, image=None, **options):
    file = io.BytesIO()
    (picture() if image is None else image).save(file, FORMATS[suffix], **options)
    return file.getvalue()


def damaged(content, random):
    """Nine ways in which a file is damaged."""
    place = int(random.integers(1, len(content)))
    yield "cut", content[:place]
    yield "cut near the end", content[:-1 - place % 16]
    yield "its end alone", content[place:]
    yield "emptied", bytes(len(content))
    for number in range(3):
        place = int(random.integers(len(content)))
        flipped = content[place] ^ 1 << int(random.integers(8))
        yield f"a bit flipped {number}", content[:place] + bytes([flipped]) + content[place + 1 :]
    place = int(random.integers(min(64, len(content))))
    yield "a bit of the header flipped", content[:place] + bytes(
        [content[place] ^ 1 << int(random.integers(8))]) + content[place + 1 :]
    yield "a block overwritten", content[:place] + random.bytes(32) + content[place + 32 :]


def with_size(suffix, width, height):
    """A file whose header says another size."""
    content = bytearray(content_of(suffix))
    if suffix == "png":
        import zlib

        content[16:24] = struct.pack(">II", width, height)
        content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    elif suffix == "bmp":
        content[18:26] = struct.pack("<ii", width, height)
    elif suffix == "gif":
        content[6:10] = struct.pack("<HH", width, height)
    elif suffix == "jpg":
        place = content.index(b"\xff\xc0") + 5
        content[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def odd():
    """Files that are unusual, by name: the content, and whether it is a picture."""
    frames = [picture(), picture().rotate(180)]
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = (np.arange(1200).reshape(30, 40) * 54).astype(np.uint16)
    yield "empty.png", b"", False
    yield "text.jpg", b"no image", False
    yield "zip.png", b"PK\x03\x04" + bytes(100), False
    yield "page.html.jpg", b"<html><body>404</body></html>", False
    yield "program.png", b"\x7fELF" + bytes(100), False
    yield "postscript.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", False
    for suffix in FORMATS:
        yield f"one pixel.{suffix}", content_of(suffix, picture(1, 1)), True
        yield f"a line.{suffix}", content_of(suffix, picture(300, 1)), True
    yield "a jpeg.png", content_of("jpg"), True
    yield "a webp.tif", content_of("webp"), True
    yield "16 bit.png", content_of("png", Image.fromarray(wide)), True
    yield "16 bit.tif", content_of("tif", Image.fromarray(wide)), True
    yield "palette.png", content_of("png", picture(mode="P")), True
    yield "one bit.png", content_of("png", picture(mode="1")), True
    yield "cmyk.jpg", content_of("jpg", picture(mode="CMYK")), True
    yield "cmyk.tif", content_of("tif", picture(mode="CMYK")), True
    yield "lab.tif", content_of("tif", picture(mode="LAB")), True
    yield "grey alpha.png", content_of("png", picture(mode="LA")), True
    yield "ycbcr.jpg", content_of("jpg", picture(mode="YCbCr")), True
    yield "progressive.jpg", content_of("jpg", progressive=True), True
    for suffix in ("gif", "png", "webp", "avif"):
        yield f"animated.{suffix}", content_of(
            suffix, frames[0], save_all=True, append_images=frames[1:]), True
    yield "rotated.jpg", content_of("jpg", exif=exif), True
    yield "bad exif.jpg", content_of("jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), False
    yield "trailing.jpg", content_of("jpg") + b"more" * 100, True
    for suffix, largest in (("png", 2**31 - 1), ("bmp", 2**31 - 1), ("gif", 65535), ("jpg", 65500)):
        yield f"huge.{suffix}", with_size(suffix, largest, largest), False


def files():
    """All files by name, with whether they are pictures; None where either may be."""
    for suffix in FORMATS:
        seed = int(hashlib.sha256(suffix.encode()).hexdigest()[:8], 16)
        for what, content in damaged(content_of(suffix), np.random.default_rng(seed)):
            yield f"{what}.{suffix}", content, None
    yield from odd()


def test_a_hundred_damaged_and_odd_files_are_a_picture_or_one_line(tmp_path):
    number, pictures = 0, 0
    for name, content, good in files():
        path = tmp_path / name
        path.write_bytes(content)
        number += 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                image = data.read_image(path, SIZE)
            except InputError as error:
                assert not good, f"{name}: {error}"
                assert str(error).startswith(f"Cannot read the image {path}: ")
                assert len(str(error).splitlines()) == 1
            else:
                assert good is not False, name
                assert image.shape == (*SIZE, 3) and image.dtype == np.uint8
                pictures += 1
    assert number >= 100 and 40 < pictures < number


def test_a_pipe_in_the_place_of_an_image_is_one_line_and_is_not_waited_for(tmp_path):
    pipe = tmp_path / "a.png"
    os.mkfifo(pipe)
    # Without somebody who writes, the test would wait for ever where it should fail.
    writer = os.open(pipe, os.O_RDWR)
    try:
        os.write(writer, bytes(99))
        for read in (lambda: data.read_image(pipe, (2, 2)), lambda: decoded.stored_size(pipe)):
            with pytest.raises(InputError, match=r"^Cannot read .*a\.png: not a regular file\.$"):
                read()
    finally:
        os.close(writer)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_an_orientation_that_damage_hides_is_one_line_and_one_that_it_leaves_is_applied(
        suffix, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x8298] = "somebody with a long name"  # After the orientation, at the end.
    turned, whole = exif.tobytes(), Image.Exif().tobytes()
    header, path = len(b"Exif\0\0"), tmp_path / f"image.{suffix}"

    def read(exif):
        path.write_bytes(content_of(suffix, picture(20, 10), exif=exif))
        with warnings.catch_warnings():  # As commands do with Pillow's.
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", ".*EXIF|Truncated", module="PIL")
            return decoded.stored_size(path), data.read_image(path, SIZE)

    upright = read(whole)
    assert upright[0] == (10, 20)
    for good in (turned, turned[:-9]):  # The name is cut, the orientation is there.
        size, image = read(good)
        assert size == (20, 10) and not np.array_equal(image, upright[1])
    for bad in (turned[:header + 6], turned[:header + 12], b"Exif\0\0nothing at all",
                b"Exif\0\0MM\0*\xff\xff\xff\xff"):
        with pytest.raises(InputError, match=(
                f"^Cannot read the image {path}: its EXIF data is damaged, and thus unknown ")):
            read(bad)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "jpg"])
def test_no_memory_is_taken_for_the_size_that_a_header_claims(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(with_size(suffix, 65000, 65000))
    with mock.patch.object(ImageFile.ImageFile, "load", side_effect=AssertionError("decoded")), \
            pytest.raises(InputError, match="65000 x 65000 pixels, more than the"):
        data.read_image(path, SIZE)
