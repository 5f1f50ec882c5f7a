"""Open pictures of every make, and say what share of a data set may be bad."""

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data.conversations import BadExample
from vzip import UserError

MAX_BAD_SHARE = 0.01
"""Training is refused when more than this share of the rows can't be used."""


FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""That are opened, whatever a file's name ends with. PIL knows more, one of which (EPS) runs what is in the file."""


def open_picture(picture: Path | bytes) -> Image.Image:
    """The picture in a file, or in its bytes, as upright RGB.

    Raises:
        OSError: a file that is missing, truncated or not a picture.
        ValueError: what is damaged otherwise, or a decompression bomb.
    """
    try:
        with Image.open(
            io.BytesIO(picture) if isinstance(picture, bytes) else picture, formats=FORMATS
        ) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I;16"):  # convert() would clip 16 bits of grey to white
                upright = Image.fromarray((np.asarray(upright) >> 8).astype("uint8"))
            return upright.convert("RGB")
    except (OSError, ValueError, MemoryError):
        raise
    except (
        Exception
    ) as error:  # PIL's decoders raise anything on bytes that are damaged: SyntaxError, struct.error, ...
        raise ValueError(f"{type(error).__name__}: {error}") from error


def check_bad_share(bad: Sequence[BadExample], num_examples: int) -> None:
    """Raises UserError, with counts by source and examples, if more than `MAX_BAD_SHARE` of the rows are bad."""
    if len(bad) <= MAX_BAD_SHARE * num_examples:
        return
    counts = ", ".join(
        f"{source}: {count}" for source, count in sorted(Counter(row.source for row in bad).items())
    )
    examples = "\n".join(f"  {row.id}: {row.reason}" for row in bad[:5])
    raise UserError(
        f"{len(bad)} of {num_examples} rows can't be used ({counts}); at most {MAX_BAD_SHARE:.0%} may be bad. First ones:\n"
        f"{examples}\nRepair them, or take them out of data.path. If all pictures are missing, check data.image_folder; "
        f"`make data` brings those that data.pictures says where to find."
    )
