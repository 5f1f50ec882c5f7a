"""Where the images and videos of a micro batch come from."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from data.examples.tokens import Example
from vzip import UserError
from vzip.families import Family
from vzip.families.features import VisualFeatures
from vzip.media import MediaInputs, lookup_table
from vzip.pictures import open_picture
from vzip.reducers import Reducer
from vzip.videos import read_frames

ModelMedia = MediaInputs | VisualFeatures
"""All images, or all videos, of a micro batch: the tower's pixels, or the projector's features."""

BLANK_SIDE = 32
"""Side in pixels of a blank image. The processor resizes it like any other."""


class Media(Protocol):
    """A source of images and videos. A collator has one, and each data worker gets a copy of it."""

    def load(self, kind: str, examples: Sequence[Example]) -> ModelMedia:
        """Load all images, or all videos, of the examples, at least one of which has some.

        Raises:
            UserError: a file, which the message names, can't be read any more.
        """
        ...

    def blank(self, kind: str) -> ModelMedia:
        """Make one image or video that shows nothing."""
        ...

    def counts(self, kind: str, inputs: Any) -> list[int]:
        """Count the placeholders of each image or video in what `load` or `blank` returned."""
        ...


class ProcessedMedia:
    """Images and videos from files, run through the model's processor. A `Media`.

    Pixels stay uint8, a quarter of float32: rescaling and normalizing are left to the device.

    Args:
        processor: the model's processor, unreduced.
        family: the model's family, which may be without weights.
        reducer: the reducer that placeholders are counted for.
        num_frames: frames taken of a video.
    """

    def __init__(self, processor: Any, family: Family, reducer: Reducer, *, num_frames: int) -> None:
        self.processors = {
            "image": processor.image_processor,
            "video": getattr(processor, "video_processor", None),
        }
        self.family = family
        self.reducer = reducer
        self.num_frames = num_frames
        self.lookup = {kind: lookup_table(kind, self.processors[kind]) for kind in family.kinds}

    def load(self, kind: str, examples: Sequence[Example]) -> MediaInputs:
        """Open and process the files of the examples that have some."""
        # One list for each example: `_process` needs to know which images belong together.
        opened = []
        for example in examples:
            if kind in example.media:
                opened.append([self._open(kind, path) for path in example.media[kind]])
        return self._process(kind, opened)

    def blank(self, kind: str) -> MediaInputs:
        """Process a black image, or a video of one black frame."""
        black = Image.new("RGB", (BLANK_SIDE, BLANK_SIDE))
        return self._process(kind, [[black]] if kind == "image" else [[[black]]])

    def counts(self, kind: str, inputs: MediaInputs) -> list[int]:
        """Count the placeholders from the processed pixels, as the model does."""
        return [
            self.family.num_processed_tokens(self.reducer, kind, inputs, index)
            for index in range(inputs.num_media)
        ]

    def _open(self, kind: str, path: Path) -> Any:
        """Open a picture, or the frames of a video. Raises UserError if it can't be read."""
        try:
            return open_picture(path) if kind == "image" else read_frames(path, self.num_frames)
        except UserError:
            # The message names the file already, or says that PyAV is missing.
            raise
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} was readable before training and is not any more: {error}; "
                f"put it back and run the same command again: it resumes"
            ) from error

    def _process(self, kind: str, opened: list[list[Any]]) -> MediaInputs:
        """Process the opened images, or videos, of each example that has some."""
        # Images stay grouped by example, because LLaVA-OneVision cuts an image into tiles only if
        # it is its example's only one. Video processors take one list of all videos.
        media = opened
        if kind == "video":
            media = [video for videos in opened for video in videos]

        # Without rescaling and normalizing, the pixels stay uint8.
        process = self.processors[kind]
        processed = process(media, return_tensors="pt", do_rescale=False, do_normalize=False)
        inputs = MediaInputs.from_processed(kind, processed, lookup=self.lookup[kind])

        # Processors that cut pictures into patches return whole numbers as float32.
        return replace(inputs, pixels=inputs.pixels.to(torch.uint8))
