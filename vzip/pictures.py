"""Open picture files of every common format as upright RGB."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that are opened, whatever a file's name ends with.

PIL knows more, one of which (EPS) runs the file.
"""


def upright_rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture to RGB, and turn it upright."""
    # A camera that is held sideways saves the picture sideways, and notes that in the EXIF data.
    upright = ImageOps.exif_transpose(picture)

    # convert() would clip 16 bits of grey to white.
    if upright.mode.startswith("I;16"):
        high_bytes = np.asarray(upright) >> 8
        upright = Image.fromarray(high_bytes.astype("uint8"))

    return upright.convert("RGB")


def open_picture(picture: Path | bytes) -> Image.Image:
    """Open a picture file, or the bytes of one, as upright RGB.

    Raises:
        OSError: the file is missing, truncated or not a picture.
        ValueError: the file is damaged in another way, or is a decompression bomb.
    """
    file = io.BytesIO(picture) if isinstance(picture, bytes) else picture
    try:
        with Image.open(file, formats=FORMATS) as opened:
            return upright_rgb(opened)
    except (OSError, ValueError, MemoryError):
        raise
    except Exception as error:
        # PIL's decoders raise anything on damaged bytes: SyntaxError, struct.error, ...
        raise ValueError(f"{type(error).__name__}: {error}") from error
