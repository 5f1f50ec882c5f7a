"""Read a few frames of a video, spread evenly over it: a video file, or a folder of pictures.

Training and evaluation both read videos here, so that they see the same frames. Files are decoded
with PyAV (package `av`), which is imported only when a file is read.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from vzip.errors import check_package
from vzip.files import check_is_file
from vzip.pictures import check_size, open_picture

FRAME_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Endings of the names of frames. Other files in a folder of frames, such as lists, are ignored."""


def sample(num_total: int, num_frames: int) -> list[int]:
    """Choose the numbers of `num_frames` frames, spread from the first to the last of `num_total`.

    If the video has fewer frames, some numbers occur more than once.

    Source: repository PKU-YuanGroup/Video-LLaVA,
    `videollava/model/multimodal_encoder/languagebind/video/processing_video.py` (backend decord),
    and repository LLaVA-VL/LLaVA-NeXT: numpy's linspace, cut down to whole numbers.

    Raises:
        ValueError: one of the numbers is below 1.
    """
    if num_total < 1:
        raise ValueError("no frames")
    if num_frames < 1:
        raise ValueError(f"{num_frames} frames asked for; at least 1")

    numbers: list[int] = np.linspace(0, num_total - 1, num_frames, dtype=int).tolist()
    return numbers


def read_frames(path: Path, num_frames: int) -> list[Image.Image]:
    """Read `num_frames` upright RGB pictures, in order, spread over the video as `sample` does.

    If a file is damaged in the middle, the frames before the damage are used, with a warning. A
    file is decoded once from start to end, and a second time only if it holds another number of
    frames than it says. At most `num_frames` pictures are in memory. Frames that `sample` repeats
    are the same object.

    Args:
        path: a video file, or a folder of pictures, which are taken in the natural order of their
            names.
        num_frames: at least 1.

    Raises:
        OSError, ValueError: the file is missing, truncated or not a video, or has no frames.
        UserError: PyAV is not installed.
    """
    if path.is_dir():
        return _read_frame_files(_frame_paths(path), num_frames)

    # Only decoding tells how many frames there are. Trust the file's own number at first, because
    # decoding takes long, and all pictures would not fit into memory.
    claimed = _claimed_frames(path)
    pictures, count = _decode(path, set(sample(max(claimed, 1), num_frames)))
    numbers = sample(count, num_frames)

    # The claim was wrong, so other frames are needed than those that were kept.
    if count != claimed:
        pictures, _ = _decode(path, set(numbers))

    return [pictures[number] for number in numbers]


def check_video(path: Path) -> None:
    """Raise what `read_frames` would, as far as the first frame and the file's index tell."""
    if path.is_dir():
        open_picture(_frame_paths(path)[0])
        return

    # One frame shows whether there is a decoder that works, and takes little time.
    with _open_container(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise ValueError("no frames")
        _frame_picture(frame)


def _natural(path: Path) -> tuple[list[str | int], str]:
    """Sort key that puts frame_2 before frame_10."""
    # Text and numbers take turns, so no text is ever compared with a number.
    parts: list[str | int] = list(re.split(r"(\d+)", path.name))
    parts[1::2] = map(int, parts[1::2])
    return parts, path.name


def _frame_paths(folder: Path) -> list[Path]:
    """List the pictures in a folder of frames, in order."""
    paths = []
    for path in folder.iterdir():
        # macOS puts a hidden file beside each picture, with the same ending.
        if path.suffix.lower() in FRAME_SUFFIXES and not path.name.startswith("."):
            paths.append(path)

    if not paths:
        raise ValueError("no frames: the folder holds no pictures")
    return sorted(paths, key=_natural)


def _read_frame_files(paths: list[Path], num_frames: int) -> list[Image.Image]:
    # A short video repeats frames; open each file once.
    numbers = sample(len(paths), num_frames)
    pictures = {number: open_picture(paths[number]) for number in set(numbers)}
    return [pictures[number] for number in numbers]


def _pyav() -> ModuleType:
    check_package("av", extra="video", purpose="reading video files")
    import av

    return av


def _check_truncated(container: Any, stream: Any) -> None:
    """Raise ValueError if the index lists frames behind the end of the file.

    MP4 and MOV files have such an index before the data. A truncated file of another container
    can't be told from a shorter video.
    """
    if "mov" not in container.format.name.split(","):
        return

    end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    if end > container.size:
        raise ValueError(f"truncated: {container.size} of at least {end} bytes")


def _video_stream(av: ModuleType, container: Any) -> Any:
    """Return the first stream of a file that is a video.

    Raises ValueError if there is no such stream, or no decoder for it.
    """
    for stream in container.streams.video:
        # The cover of a song is a picture that calls itself a video.
        if stream.disposition & av.stream.Disposition.attached_pic:
            continue
        if stream.codec_context is None:
            raise ValueError("no decoder for its format")
        return stream

    raise ValueError("no video stream")


@contextmanager
def _open_container(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a file, and yield (container, video stream).

    FFmpeg's errors are raised as ValueError, also those of the `with` body.
    """
    # FFmpeg would wait for a pipe without end. And Python's own errors tell a missing file from a
    # forbidden one, while FFmpeg uses these names for other faults too.
    check_is_file(path)
    with path.open("rb"):
        pass

    av = _pyav()
    fault = "not a video, or its end is missing"
    try:
        with av.open(str(path), metadata_errors="ignore") as container:  # titles need not be UTF-8
            stream = _video_stream(av, container)
            _check_truncated(container, stream)
            # Some containers do not say the size. Each frame is checked too.
            if stream.codec_context.width:
                check_size(stream.codec_context.width, stream.codec_context.height)
            fault = "damaged"
            yield container, stream
    except (av.FFmpegError, IndexError) as error:
        # PyAV raises IndexError for a packet of a stream that the start of the file does not
        # announce.
        raise ValueError(f"{fault}: {getattr(error, 'strerror', error)}") from error


def _frame_picture(frame: Any) -> Image.Image:
    """Convert a decoded frame to upright RGB."""
    # The size may change in the middle of a file.
    check_size(frame.width, frame.height)

    # A phone that is held sideways saves the frames sideways, and notes that beside them.
    picture: Image.Image = frame.to_image()
    if not frame.rotation:
        return picture
    return picture.rotate(frame.rotation, expand=True)


def _claimed_frames(path: Path) -> int:
    """Return how many frames a file says it has.

    This is cheap and mostly right, but the true number may differ.
    """
    # Some containers do not say it. Then count the packets, which hold one frame each as a rule.
    with _open_container(path) as (container, stream):
        return stream.frames or sum(1 for packet in container.demux(stream) if packet.size)


def _decode(path: Path, wanted: set[int]) -> tuple[dict[int, Image.Image], int]:
    """Decode a file from start to end, or to its first damage.

    Returns:
        The `wanted` frames by their number, and how many frames were decoded.
    """
    pictures = {}
    count = 0
    try:
        with _open_container(path) as (container, stream):
            for frame in container.decode(stream):
                if count in wanted:
                    pictures[count] = _frame_picture(frame)
                count += 1
    except ValueError as error:
        if not count:
            raise

        # Finding the damage before training would mean to decode every video, so the run goes on
        # with the frames before it.
        warnings.warn(f"{path}: {error} after {count} frames, which are used", stacklevel=2)

    return pictures, count
