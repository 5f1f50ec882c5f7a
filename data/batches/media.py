"""What becomes of the rows' images and videos on their way to the model."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from data.examples.tokens import Example
from vzip import UserError
from vzip.families import Family
from vzip.media import LOOKUP, lookup_table, model_inputs, pixels_of
from vzip.pictures import open_picture
from vzip.reducers import Reducer
from vzip.videos import read_frames


class Media(Protocol):
    """What becomes of the rows' images and videos. A collator has one; data workers get copies."""

    def load(self, kind: str, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Of all images, or videos, of the rows, one after the other; at least one row has some.

        Raises UserError, which names it, for one that can't be read any more.
        """
        ...

    def blank(self, kind: str) -> dict[str, Tensor]:
        """Of one image or video that shows nothing."""
        ...

    def counts(self, kind: str, inputs: dict[str, Tensor]) -> list[int]:
        """Placeholders of each image or video of what `load` or `blank` returned, in order."""
        ...


class Processed:
    """Media from files, through the model's processor but for rescaling and normalising, which are left to the device.

    Args:
        processor: of the model, unreduced.
        family: around the model.
        reducer: by which placeholders are counted.
        num_frames: of a video.
    """

    def __init__(self, processor: Any, family: Family, reducer: Reducer, *, num_frames: int) -> None:
        self.processors = {
            "image": processor.image_processor,
            "video": getattr(processor, "video_processor", None),
        }
        self.family, self.reducer, self.num_frames = family, reducer, num_frames
        self.lookup = {kind: lookup_table(kind, self.processors[kind]) for kind in family.kinds}

    def _process(self, kind: str, rows: list[list[Any]]) -> dict[str, Tensor]:
        """Of rows of pictures, or of videos as lists of frames."""
        given = rows if kind == "image" else list(chain(*rows))
        made = self.processors[kind](given, return_tensors="pt", do_rescale=False, do_normalize=False)
        return {**model_inputs(kind, made), LOOKUP: self.lookup[kind]}

    def _open(self, kind: str, path: Path) -> Any:
        try:
            return open_picture(path) if kind == "image" else read_frames(path, self.num_frames)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} was readable before training and is not any more: {error}; put it back and run the same command "
                f"again: it resumes"
            ) from error

    def load(self, kind: str, examples: Sequence[Example]) -> dict[str, Tensor]:
        """As `Media.load`: pixels uint8, beside their levels."""
        rows = [
            [self._open(kind, path) for path in example.media[kind]]
            for example in examples
            if kind in example.media
        ]
        return self._process(kind, rows)

    def blank(self, kind: str) -> dict[str, Tensor]:
        black = Image.new("RGB", (32, 32))
        return self._process(kind, [[black if kind == "image" else [black]]])

    def counts(self, kind: str, inputs: dict[str, Tensor]) -> list[int]:
        return [
            self.family.num_processed_tokens(self.reducer, kind, inputs, index)
            for index in range(len(pixels_of(inputs)))
        ]
