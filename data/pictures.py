"""Open pictures, and check all pictures and videos of a data set before training starts."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data.conversations import BadRow, Row
from data.progress import progress
from vzip import UserError

MAX_BAD_SHARE = 0.01
"""Training is refused when more than this share of the rows can't be used."""


def open_picture(path: Path) -> Image.Image:
    """The picture as upright RGB. Raises OSError (missing, truncated, not a picture) or ValueError (decompression bomb)."""
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture)
            if upright.mode.startswith("I;16"):  # convert() would clip 16 bits of grey to white
                upright = Image.fromarray((np.asarray(upright) >> 8).astype("uint8"))
            return upright.convert("RGB")
    except (Image.DecompressionBombError, SyntaxError) as error:  # PIL raises SyntaxError on broken PNG chunks
        raise ValueError(str(error)) from error


def _fault(row: Row, folder: Path) -> BadRow | None:
    from data.videos import check_video  # not above: it opens frames with this module

    checks = [(image, open_picture) for image in row.images] + [(video, check_video) for video in row.videos]
    for path, check in checks:
        try:
            check(folder / path)
        except UserError:  # it is a ValueError, but of the installation and not of this row
            raise
        except FileNotFoundError:
            return BadRow(id=row.id, source=row.source, reason=f"{path}: missing")
        except (OSError, ValueError) as error:
            return BadRow(id=row.id, source=row.source, reason=f"{path}: {error}")
    return None


def check_pictures(rows: Sequence[Row], folder: Path) -> tuple[list[Row], list[BadRow]]:
    """Decode every picture and the start of every video once, in threads: usable rows, and the others with their reasons.

    Raises UserError if there are video files, but no PyAV to read them.
    """
    with ThreadPoolExecutor() as pool:
        faults = list(progress(pool.map(lambda row: _fault(row, folder), rows), total=len(rows), title="check pictures"))
    good = [row for row, fault in zip(rows, faults, strict=True) if fault is None]
    return good, [fault for fault in faults if fault is not None]


def refuse_if_too_bad(bad: Sequence[BadRow], num_rows: int) -> None:
    """Raises UserError, with counts by source and examples, if more than `MAX_BAD_SHARE` of the rows are bad."""
    if len(bad) <= MAX_BAD_SHARE * num_rows:
        return
    counts = ", ".join(f"{source}: {count}" for source, count in sorted(Counter(row.source for row in bad).items()))
    examples = "\n".join(f"  {row.id}: {row.reason}" for row in bad[:5])
    raise UserError(
        f"{len(bad)} of {num_rows} rows can't be used ({counts}); at most {MAX_BAD_SHARE:.0%} may be bad. First ones:\n"
        f"{examples}\nRepair them, or take them out of data.path; check data.image_folder if all pictures are missing."
    )
