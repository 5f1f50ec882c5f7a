"""Open picture files of every common format as upright RGB, within limits.

A small file may hold a picture that fills the memory, or takes hours to decode. All such limits are
checked from the header, before a pixel is decoded. They are wide: instruction data, documents and
panoramas of phones lie far inside.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from vzip.files import check_is_file

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that are opened, whatever a file's name ends with.

PIL knows more, one of which (EPS) runs the file.
"""

MAX_BYTES = 100_000_000
"""Largest file. PIL keeps the texts and profiles of a file in memory, whatever the picture's size."""
MAX_COMMENT = 1_000_000
"""Most bytes in front of the first picture of a GIF. The time that PIL takes grows with their square."""
MAX_PIXELS = 50_000_000
"""Most pixels. Opening so many takes up to 0.7 GB, and a processor 0.5 GB."""
MAX_SIDE = 12_000
"""Longest side in pixels. Padding such a picture to a square takes a processor 1.8 GB."""
MAX_RATIO = 50
"""The longer side is at most so many times the shorter one.

Processors scale the shorter side up to the tower's, and the longer side with it: at 336 pixels, one
of 2,000 x 1 would take 2 GB.
"""
MIN_SIDE = 4
"""Shortest side in pixels. Some processors take a side of 3 pixels for the three channels."""
MAX_SCANS = 100
"""Most passes over a JPEG. Ten are usual, and each takes the time of a whole picture."""

TILE_SIDES = (322, 323)
"""TIFF's tags for the width and the height of tiles."""
BITS = 258
"""TIFF's tag for the bits of a pixel's values (BitsPerSample)."""
ZERO_IS = 262
"""TIFF's tag that is 0 where the value 0 means white (PhotometricInterpretation)."""


def check_size(width: int, height: int) -> None:
    """Raise ValueError for a picture that a processor could not take, or only with much memory."""
    longer = max(width, height)
    shorter = min(width, height)
    size = f"{width:,} x {height:,} px"
    if shorter < MIN_SIDE:
        raise ValueError(f"{size}: each side must have at least {MIN_SIDE} pixels")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{size}: at most {MAX_PIXELS:,} pixels are allowed")
    if longer > MAX_SIDE:
        raise ValueError(f"{size}: a side may have at most {MAX_SIDE:,} pixels")
    if longer > MAX_RATIO * shorter:
        raise ValueError(f"{size}: the longer side may be at most {MAX_RATIO} times the shorter one")


def _in_8_bits(picture: Image.Image, upright: Image.Image) -> Image.Image:
    """Scale grey values of more than 8 bits, which PIL's `convert` would clip to white.

    Raises ValueError if nothing says which value is white.

    Args:
        picture: the picture as it was opened, which knows its format.
        upright: the same after turning it.
    """
    # Pillow reads 16 bits of a PNG or PPM into 32 in some versions.
    is_deep_grey = upright.mode == "I" and picture.format in ("PNG", "PPM")
    if upright.mode.startswith("I;16") or is_deep_grey:
        # Some cameras and scanners write 12 bits, and only TIFF says so.
        tags = picture.tag_v2 if isinstance(picture, TiffImageFile) else {}
        bits = tags.get(BITS, (16,))[0]
        grey = (np.asarray(upright) >> (bits - 8)).astype("uint8")

        # 0 is mostly black. PIL looks at this only where there are 8 bits.
        return Image.fromarray(255 - grey if tags.get(ZERO_IS, 1) == 0 else grey)

    # White may be 1.0, 255, 65,535 or anything else. A guess would change the picture unseen.
    if upright.mode in ("I", "F"):
        raise ValueError(f"values of 32 bits (mode {upright.mode}) have no fixed white; save it in 8 bits")
    return upright


def upright_rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture to RGB, and turn it upright. Raises ValueError if it exceeds the limits."""
    check_size(*picture.size)

    # A camera that is held sideways saves the picture sideways, and notes that in the EXIF data.
    upright = ImageOps.exif_transpose(picture)
    return _in_8_bits(picture, upright).convert("RGB")


def _check_comments(file: BinaryIO) -> None:
    """Raise ValueError if a file is a GIF with long comments in front of its first picture."""
    header = file.read(13)
    if not header.startswith(b"GIF8") or len(header) < 13:
        return

    # A table of colours may follow the header.
    if header[10] & 0x80:
        file.seek(3 << ((header[10] & 7) + 1), io.SEEK_CUR)

    # An exclamation mark begins a comment, which is a list of blocks. Each starts with its length, and
    # the length 0 ends the list. A picture begins with a comma.
    while file.read(1) == b"!":
        file.seek(1, io.SEEK_CUR)
        while (length := file.read(1)) not in (b"", b"\0"):
            file.seek(length[0], io.SEEK_CUR)
            if file.tell() > MAX_COMMENT:
                raise ValueError(f"a GIF with more than {MAX_COMMENT:,} bytes of comments")


def _check_encoding(opened: Image.Image, picture: Path | bytes) -> None:
    """Raise ValueError if decoding would take far more than the picture's size."""
    # A tile may be larger than the picture, and is decoded whole.
    if isinstance(opened, TiffImageFile):
        width, height = [opened.tag_v2.get(tag, 0) for tag in TILE_SIDES]
        if width and height:
            check_size(width, height)

    # 0xFFDA begins a pass. Compressed values never contain it.
    if isinstance(opened, JpegImageFile):
        content = picture if isinstance(picture, bytes) else picture.read_bytes()
        num_scans = content.count(b"\xff\xda")
        if num_scans > MAX_SCANS:
            raise ValueError(f"a JPEG of {num_scans:,} scans; at most {MAX_SCANS} are allowed")


@contextmanager
def _open_header(picture: Path | bytes) -> Iterator[Image.Image]:
    """Open a picture without decoding it, and check all limits.

    Raises what `open_picture` does, also for errors of the `with` body.
    """
    # A pipe would never end, and PIL would read a device until memory ends.
    if isinstance(picture, Path):
        check_is_file(picture)
    num_bytes = len(picture) if isinstance(picture, bytes) else picture.stat().st_size
    if num_bytes > MAX_BYTES:
        raise ValueError(f"a file of {num_bytes:,} bytes; at most {MAX_BYTES:,} are allowed")

    # PIL gets the path and not the open file, because its messages name what it gets.
    with io.BytesIO(picture) if isinstance(picture, bytes) else picture.open("rb") as content:
        _check_comments(content)
    file = io.BytesIO(picture) if isinstance(picture, bytes) else picture
    try:
        with Image.open(file, formats=FORMATS) as opened:
            check_size(*opened.size)
            _check_encoding(opened, picture)
            yield opened
    except (OSError, ValueError, MemoryError):
        raise
    except Exception as error:
        # PIL's decoders raise anything on damaged bytes: SyntaxError, struct.error, ...
        raise ValueError(f"{type(error).__name__}: {error}") from error


def open_picture(picture: Path | bytes) -> Image.Image:
    """Open a picture file, or the bytes of one, as upright RGB.

    Raises:
        OSError: the file is missing, truncated or not a picture.
        ValueError: it is no ordinary file, is damaged in another way, or exceeds a limit.
    """
    with _open_header(picture) as opened:
        return upright_rgb(opened)


def stored_size(picture: Path) -> tuple[int, int]:
    """Read (width, height) from a picture's header, before it is turned upright.

    Raises what `open_picture` does, as far as the header tells.
    """
    with _open_header(picture) as opened:
        width, height = opened.size
        return width, height
