"""Check that the images and videos of a subset can be read, and are those that it was prepared with.

The headers and the bytes of all images are checked, and a sample is decoded.
"""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from data.conversations import BadExample
from data.examples.unchanged import change_of
from data.fetch.media_index import MediaIndex
from data.progress import progress
from vzip import UserError
from vzip.files import check_is_file
from vzip.pictures import open_picture, stored_size
from vzip.videos import check_video

NUM_DECODED = 1000
"""Images and videos in the sample that is decoded."""


@dataclass(frozen=True)
class _MediaFile:
    """An image or a video, with the first conversation that has it."""

    kind: str
    path: str
    """Below the folder of images and videos."""
    size: tuple[int, int] | None
    """Recorded (height, width) of an image in pixels, upright."""
    conversation_id: str
    source: str


def check_files(
    table: pa.Table, folder: Path, *, index: MediaIndex, seed: int = 0, num_decoded: int = NUM_DECODED
) -> list[BadExample]:
    """Find the images and videos that can't be read or have changed.

    Each one is reported once, with the first conversation that has it.

    Args:
        table: the columns of `data.examples.tokens.SCHEMA`.
        folder: the folder of images and videos.
        index: what was recorded of them when the subset was made.
        seed: seed of the sample.
        num_decoded: number of files in the sample that is decoded. Videos are decoded as far as
            `check_video` does.

    Raises:
        UserError: there are videos in the sample, but PyAV, which reads them, is not installed.
    """
    files = _files_of(table)
    # Sorted, so that the sample depends only on the seed and the files.
    sample = set(random.Random(seed).sample(sorted(files), min(num_decoded, len(files))))

    # Decoding all files would take hours. A sample finds faults that many files share.
    def check(key: tuple[str, str]) -> BadExample | None:
        file = files[key]
        fault = _fault_of(file, folder, index, decode=key in sample)
        if fault is None:
            return None
        return BadExample(file.conversation_id, file.source, f"{file.path}: {fault}")

    # Threads, because most of the time goes into waiting for the disk.
    with ThreadPoolExecutor() as pool:
        bar = progress(pool.map(check, files), total=len(files), title="check files", unit="file")
        return [bad for bad in bar if bad is not None]


def _files_of(table: pa.Table) -> dict[tuple[str, str], _MediaFile]:
    """Return the table's images and videos by (kind, path)."""
    files: dict[tuple[str, str], _MediaFile] = {}
    for record in table.select(["id", "source", "images", "videos", "sizes"]).to_pylist():
        # The column has the heights and widths of all images, one after the other.
        sizes = zip(record["sizes"][::2], record["sizes"][1::2], strict=True)
        media = [("image", path, size) for path, size in zip(record["images"], sizes, strict=True)]
        media += [("video", path, None) for path in record["videos"]]

        # A file of several conversations is checked once, and named by the first of them.
        for kind, path, size in media:
            file = _MediaFile(kind, path, size, record["id"], record["source"])
            files.setdefault((kind, path), file)

    return files


def _fault_of(file: _MediaFile, folder: Path, index: MediaIndex, *, decode: bool) -> str | None:
    """Describe the fault of a file. None if it has none."""
    try:
        _read_medium(file, folder / file.path, decode=decode)
        return change_of(file.path, folder, index, hashed=True)
    except UserError:
        # UserError is a ValueError too, but it is about the installation, not about this file.
        raise
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError) as error:
        return str(error)


def _read_medium(file: _MediaFile, path: Path, *, decode: bool) -> None:
    """Raise OSError or ValueError if a file can't be read, or is an image of another size."""
    # A video may be a folder of frames.
    if file.kind == "image":
        check_is_file(path)

    # PIL would only say that it does not know the format of an empty file.
    if not path.stat().st_size:
        raise ValueError("an empty file")

    if file.kind == "video":
        if decode:
            check_video(path)
        return

    # The header is enough for the size and the limits.
    width, height = stored_size(path)

    # Width and height may be swapped: the recorded size is upright, but the header's is not.
    if file.size is not None and sorted((height, width)) != sorted(file.size):
        recorded_height, recorded_width = file.size
        raise ValueError(
            f"{width} x {height} px, but {recorded_width} x {recorded_height} when the subset was made"
        )

    if decode:
        open_picture(path)
