"""Read a few frames of a video, spread evenly over it: a video file, or a folder of pictures.

Files are decoded with PyAV (package `av`), which is imported only when a file is read.
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

from data.fetch.pictures import open_picture
from vzip import UserError

FRAME_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""What a frame's name ends with; other files in a folder of frames (lists, thumbnails' databases) are no frames."""


def sample(num_total: int, num_frames: int) -> list[int]:
    """Numbers of `num_frames` frames, from the first to the last of `num_total`; a shorter video repeats some.

    Source: repository PKU-YuanGroup/Video-LLaVA, `videollava/model/multimodal_encoder/languagebind/video/processing_video.py`
    (backend decord), and repository LLaVA-VL/LLaVA-NeXT: numpy's linspace, cut down to whole numbers.
    Raises ValueError where either number is below 1.
    """
    if num_total < 1:
        raise ValueError("no frames")
    if num_frames < 1:
        raise ValueError(f"{num_frames} frames asked for; at least 1")
    numbers: list[int] = np.linspace(0, num_total - 1, num_frames, dtype=int).tolist()
    return numbers


def _pyav() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise UserError("video files are read with PyAV, which is not installed: pip install av") from error
    return av


def _natural(path: Path) -> tuple[list[str | int], str]:
    """Sorts frame_2 before frame_10: text and numbers take turns, so that no text is compared with a number."""
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], path.name


def _frame_paths(folder: Path) -> list[Path]:
    paths = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in FRAME_SUFFIXES and not path.name.startswith(".")
    ]
    if not paths:
        raise ValueError("no frames: the folder holds no pictures")
    return sorted(paths, key=_natural)


def _check_truncated(container: Any, stream: Any) -> None:
    """MP4 and MOV list each frame's place before the data is read. Other containers can't be told from shorter videos."""
    if "mov" not in container.format.name.split(","):
        return
    end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    if end > container.size:
        raise ValueError(f"truncated: {container.size} of at least {end} bytes")


@contextmanager
def _open_container(path: Path) -> Iterator[tuple[Any, Any]]:
    """(container, video stream) of a file; FFmpeg's errors, also those of the `with` body, come out as ValueError."""
    with path.open(
        "rb"
    ):  # Python's errors tell missing from forbidden; FFmpeg's own also use these names for other faults
        pass
    av = _pyav()
    fault = "not a video, or its end is missing"
    try:
        with av.open(str(path), metadata_errors="ignore") as container:  # titles need not be UTF-8
            cover = av.stream.Disposition.attached_pic  # of a song: a picture that calls itself a video
            stream = next(
                (stream for stream in container.streams.video if not stream.disposition & cover), None
            )
            if stream is None:
                raise ValueError("no video stream")
            if stream.codec_context is None:
                raise ValueError("no decoder for its format")
            _check_truncated(container, stream)
            fault = "damaged"
            yield container, stream
    except (
        av.FFmpegError,
        IndexError,
    ) as error:  # PyAV's, of a packet that belongs to none of the streams at the start
        raise ValueError(f"{fault}: {getattr(error, 'strerror', error)}") from error


def _frame_picture(frame: Any) -> Image.Image:
    """A decoded frame as upright RGB: a phone held sideways says so beside the frames."""
    picture: Image.Image = frame.to_image()
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


def _claimed(path: Path) -> int:
    """How many frames a file says it has, or has packets: cheap, mostly right, never to be trusted."""
    with _open_container(path) as (container, stream):
        return stream.frames or sum(1 for packet in container.demux(stream) if packet.size)


def _decode(path: Path, wanted: set[int]) -> tuple[dict[int, Image.Image], int]:
    """The `wanted` ones of a file's frames by their number, and how many frames there really are, up to the first damage."""
    pictures, count = {}, 0
    try:
        with _open_container(path) as (container, stream):
            for frame in container.decode(stream):
                if count in wanted:
                    pictures[count] = _frame_picture(frame)
                count += 1
    except ValueError as error:
        if not count:
            raise
        # Only decoding all of it tells, which is too dear before training: the run goes on with what there is.
        warnings.warn(f"{path}: {error} after {count} frames, of which the frames are taken", stacklevel=2)
    return pictures, count


def read_frames(path: Path, num_frames: int) -> list[Image.Image]:
    """`num_frames` upright RGB pictures, in order, spread over the video as `sample` does.

    Of a file that is damaged in the middle, the frames before are used, with a warning. A file is decoded once from start to
    end, and again only where it holds another number of frames than it says; no more than `num_frames` pictures are in
    memory. Frames that `sample` repeats are the same object.

    Args:
        path: a video file, or a folder of pictures, which are taken in the natural order of their names.
        num_frames: at least 1.

    Raises:
        OSError, ValueError: a video that is missing or truncated, is none, or has no frames.
        UserError: PyAV is not installed.
    """
    if path.is_dir():
        paths = _frame_paths(path)
        pictures = {number: open_picture(paths[number]) for number in set(sample(len(paths), num_frames))}
        return [pictures[number] for number in sample(len(paths), num_frames)]
    claimed = _claimed(path)
    pictures, count = _decode(path, set(sample(max(claimed, 1), num_frames)))
    numbers = sample(count, num_frames)
    if count != claimed:
        pictures, _ = _decode(path, set(numbers))
    return [pictures[number] for number in numbers]


def check_video(path: Path) -> None:
    """Raises what `read_frames` would, as far as the first frame and a file's index tell: nothing else is decoded."""
    if path.is_dir():
        open_picture(_frame_paths(path)[0])
        return
    with _open_container(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise ValueError("no frames")
        _frame_picture(frame)
