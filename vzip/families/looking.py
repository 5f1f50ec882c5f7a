"""How a family shows one image to its tower, for drawings of the tokens that stay."""

from typing import Any, ClassVar

from torch import Tensor

from vzip.media import MediaInputs
from vzip.reducers.base import Reducer, VisionTokens


class Looking:
    """The part of a family that looks at one image. `vzip.families.base.Family` is built on it."""

    whole_tile: ClassVar[int] = 0
    """Which of the tiles of an image shows the whole of it: the first (0), or the last (-1)."""

    vision_tokens: Any
    """See `vzip.families.base.Family.vision_tokens`."""

    def look(self, reducer: Reducer, inputs: MediaInputs) -> tuple[VisionTokens, tuple[int, int]]:
        """Show one image to the tower, or its tile that shows the whole image.

        Returns:
            The picture's tokens, and their rows and columns.
        """
        tokens = self.vision_tokens(reducer, self.seen_picture(inputs)[None])
        return tokens, tokens.rows_and_columns

    def fitting(self, reducer: Reducer, tokens: VisionTokens) -> Reducer:
        """Return the reducer for a picture of these tokens, which is another one if they are too few."""
        return reducer

    def seen_picture(self, inputs: MediaInputs) -> Tensor:
        """Return the pixels [3, height, width] of one image, or of its tile that shows it all."""
        return inputs.pixels.flatten(0, -4)[self.whole_tile]
