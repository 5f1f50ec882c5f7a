"""Put a reducer into a model instance, and take it out again."""

import copy
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from vzip.errors import UserError
from vzip.families import family_of
from vzip.reducers.base import Reducer, ReducerOutput
from vzip.reducers.visionzip import VisionZip


class Handle:
    """A model with a reducer attached. `detach()`, or leaving the `with` block, makes it exactly what it was.

    Attributes:
        family: the adapter that knows the model's parts.
        reducer: the reducer.
        attached: whether it is in place.
    """

    def __init__(self, model: Any, reducer: Reducer) -> None:
        self.family = family_of(model)
        self.reducer = reducer
        self.family.refuse_unfit(reducer)
        self.family.install(reducer)
        self.attached = True

    def num_image_tokens(self, image_size: tuple[int, int] | None = None) -> int:
        """Placeholders that an image of `image_size` = (height, width) pixels takes.

        Without a size: of the tower's own, or, where images are cut into tiles, of a square of 5 tiles. LLaVA-OneVision does
        not cut an image that shares its row with others: its processor knows.
        """
        return self.family.num_image_tokens(self.reducer, image_size)

    def num_video_tokens(self, num_frames: int) -> int:
        """Placeholders that one video of `num_frames` frames takes. Raises UserError where the model takes no videos."""
        return self.family.num_video_tokens(self.reducer, num_frames)

    def reduce(self, pixel_values: Tensor, **kwargs: Any) -> ReducerOutput:
        """What the reducer makes of float[B, 3, height, width]: features before the projector, and which tokens they are."""
        return self.family.reduce(self.reducer, pixel_values, **kwargs)

    def processor(self, processor: Any) -> Any:
        """A copy of the model's processor that expands each image and video to the reduced number of placeholders."""
        reduced = copy.copy(processor)

        def replace_image_token(image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
            token: str = reduced.image_token
            return token * self.family.num_processed_tokens(self.reducer, "image", image_inputs, image_idx)

        def replace_video_token(video_inputs: dict[str, Any], video_idx: int, **kwargs: Any) -> str:
            token: str = reduced.video_token
            return token * self.family.num_processed_tokens(self.reducer, "video", video_inputs, video_idx)

        def get_num_multimodal_tokens(image_sizes: Any = None, video_sizes: Any = None, **kwargs: Any) -> Any:
            sizes = {"image_sizes": image_sizes} | (
                {} if video_sizes is None else {"video_sizes": video_sizes}
            )
            counts = processor._get_num_multimodal_tokens(**sizes, **kwargs)
            if image_sizes is not None:
                counts.num_image_tokens = [self.num_image_tokens(tuple(size)) for size in image_sizes]
            if video_sizes is not None:
                counts.num_video_tokens = [
                    self.num_video_tokens(num_frames) for num_frames, *_ in video_sizes
                ]
            return counts

        reduced.replace_image_token = replace_image_token
        reduced.replace_video_token = replace_video_token
        reduced._get_num_multimodal_tokens = get_num_multimodal_tokens
        return reduced

    def detach(self) -> None:
        """Take the reducer out, once. Processors made by `processor` stay reduced; use the original one again."""
        if self.attached:
            self.family.uninstall()
            self.attached = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def attach(
    model: Any,
    *,
    budget: int | None = None,
    dominant: int | None = None,
    contextual: int | None = None,
    anyres: str = "released",
    reducer: Reducer | None = None,
) -> Handle:
    """Attach a reducer to a LLaVA-type model: give `budget`, or `dominant` and `contextual`, or `reducer`.

    Afterwards `model(...)` and `model.generate(...)` take rows with `handle.num_image_tokens()` placeholders an image.
    Only this instance changes.

    Args:
        model: e.g. a `LlavaForConditionalGeneration`.
        budget: tokens an image, split 5.4 : 1 (the paper's ratio); for LLaVA-NeXT the total of 5 tiles, as in the paper; for
            models of other tiles, or of videos, tokens of one tile or frame.
        dominant: dominant tokens of a tile, CLS counted.
        contextual: merged tokens of a tile.
        anyres: order of the tokens of several tiles, "released" or "spatial", see `vzip.families.anyres`.
        reducer: any other reducer, e.g. `vzip.reducers.identity.Identity()`.

    Raises:
        UserError: an unsupported model, settings that contradict each other, a budget larger than an image.
    """
    if reducer is None:
        given = {"dominant": dominant, "contextual": contextual}
        counts: dict[str, Any] = {name: count for name, count in given.items() if count is not None}
        reducer = VisionZip(budget=budget, tiles=family_of(model).budget_tiles, anyres=anyres, **counts)
    elif (budget, dominant, contextual, anyres) != (None, None, None, "released"):
        raise UserError("give either reducer=..., or budget / dominant / contextual / anyres, not both")
    return Handle(model, reducer)
