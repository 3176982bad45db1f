"""Image files of known formats, recognised by their first bytes, whatever the files are called."""

import io
import os
import struct
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:  # Pillow is of the application's dependencies alone.
    from PIL.ImageFile import ImageFile

FORMATS = "JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF or JPEG 2000"
"""In words. Pillow's other formats are not tried: some of them start other programs."""

_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_REDUCED, _NEW_SUBFILE_TYPE, _DNG_VERSION = 1, 254, 50706


def open_image(file: BinaryIO, limit: int | None) -> "ImageFile":
    """Opens an image with Pillow, reading its header only.

    It uses the formats' own classes, since ``Image.open`` only warns of an image that is somewhat
    too large, and warnings become errors only for all threads of a process.

    Args:
      file: open for reading.
      limit: the largest number of pixels; None for any number.

    Raises:
      Exception: of any kind, for a bad file. Its message is the reason.
    """
    from PIL import (
        BmpImagePlugin,
        GifImagePlugin,
        JpegImagePlugin,
        PngImagePlugin,
        WebPImagePlugin,
    )

    start = file.read(64)
    file.seek(0)
    if not start:
        raise ValueError("empty file")
    if start.startswith(b"\xff\xd8\xff"):
        image = JpegImagePlugin.JpegImageFile(file)
    elif start.startswith(b"\x89PNG\r\n\x1a\n"):
        image = PngImagePlugin.PngImageFile(file)
    elif start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        image = WebPImagePlugin.WebPImageFile(file)
    elif start.startswith((b"GIF87a", b"GIF89a")):
        # Pillow allocates the first frame when it opens the file.
        width, height = struct.unpack_from("<HH", start.ljust(10, b"\0"), 6)
        _check_pixels(width, height, limit)
        image = GifImagePlugin.GifImageFile(file)
    elif start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        image = _open_tiff(file, start)
    elif start.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n")):
        image = _open_optional(
            "Jpeg2KImagePlugin", "Jpeg2KImageFile", "jpg_2000", "JPEG 2000", file)
    elif start[4:8] == b"ftyp" and any(brand in start[8:] for brand in (b"avif", b"avis")):
        image = _open_optional("AvifImagePlugin", "AvifImageFile", "avif", "AVIF", file)
    elif start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"mif1", b"hevc"):
        raise ValueError(f"a HEIC image; convert it to {FORMATS}")
    elif start.startswith(b"BM") and len(start) >= 26:
        image = BmpImagePlugin.BmpImageFile(file)
    else:
        raise ValueError(f"not a {FORMATS} image")
    _check_pixels(image.width, image.height, limit)
    return image


def is_turned(image: "ImageFile") -> bool:
    """Whether the EXIF orientation of an image exchanges its height and width. Decodes a PNG.

    Raises:
      ValueError: if the EXIF data is so damaged that the orientation is unknown, of which Pillow
        would at most warn.
    """
    from PIL import ExifTags

    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        known = orientation is not None or _has_whole_directory(image.info.get("exif", b""))
    except (SyntaxError, struct.error):
        known = False
    if not known:
        raise ValueError("its EXIF data is damaged, and thus unknown whether the image has to be "
                         "turned; remove that data from the file")
    return (orientation or 1) >= 5


def _has_whole_directory(exif: bytes) -> bool:
    """Whether the first directory of EXIF data, with the orientation if it has one, is all there.
    """
    block = exif.removeprefix(b"Exif\0\0")
    if not block:
        return True
    order = "<" if block[:1] == b"I" else ">"
    place, = struct.unpack_from(f"{order}L", block, 4)
    count, = struct.unpack_from(f"{order}H", block, place)
    return place + 2 + 12 * count <= len(block)


def _check_pixels(width: int, height: int, limit: int | None) -> None:
    if limit is not None and width * height > limit:
        raise ValueError(
            f"{width} x {height} pixels, more than the {limit} that Pillow considers safe")


def _open_optional(module: str, name: str, feature: str, what: str, file: BinaryIO) -> "ImageFile":
    """An image of a format that Pillow can be built without."""
    import importlib

    from PIL import features

    if not features.check(feature):
        raise ValueError(f"a {what} image, which this build of Pillow does not support")
    return getattr(importlib.import_module(f"PIL.{module}"), name)(file)


def _open_tiff(file: BinaryIO, start: bytes) -> "ImageFile":
    from PIL import TiffImagePlugin

    _check_tiff_directory(file, start)
    file.seek(0)
    image = TiffImagePlugin.TiffImageFile(file)
    # Cameras' raw files are TIFF, with a thumbnail first.
    if (start[8:10] == b"CR" or _DNG_VERSION in image.tag_v2
            or image.tag_v2.get(_NEW_SUBFILE_TYPE, 0) & _REDUCED):
        raise ValueError(f"a camera's raw file; convert it to {FORMATS}")
    return image


def _check_tiff_directory(file: BinaryIO, start: bytes) -> None:
    """Raises ValueError if the first directory, or a value that it points to, is not in the file.

    Pillow would only warn of a truncated value, and continue without it.
    """
    order = "<" if start[:1] == b"I" else ">"
    if start[2:4] in (b"+\0", b"\0+"):
        return  # BigTIFF, for files beyond 4 GB: Pillow's own checks have to suffice.
    size = file.seek(0, os.SEEK_END)
    try:
        place, = struct.unpack_from(f"{order}L", start, 4)
        file.seek(place)
        count, = struct.unpack(f"{order}H", file.read(2))
        directory = io.BytesIO(file.read(12 * count))
        for _ in range(count):
            _, kind, number, value = struct.unpack(f"{order}HHLL", directory.read(12))
            length = _TIFF_SIZES.get(kind, 0) * number
            if length > 4 and value + length > size:
                raise ValueError("image file is truncated")
    except struct.error as error:
        raise ValueError("image file is truncated") from error
