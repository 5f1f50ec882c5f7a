"""Put a reducer into a model instance, and take it out again."""

from types import TracebackType
from typing import Any, Self

from vzip.errors import UserError
from vzip.families import family_of
from vzip.media import image_aspect_ratio
from vzip.processor import reduced_processor
from vzip.reducers.base import Reducer
from vzip.reducers.visionzip import VisionZip


class Handle:
    """A model with a reducer attached.

    `detach()`, or leaving the `with` block, makes the model exactly what it was.

    Attributes:
        family: the adapter that knows the model's parts.
        reducer: the reducer.
        attached: whether the reducer is in place.
        aspect_ratio: what `load_projector` has found in a run: how the processor must treat pictures
            that are not square (`vzip.media.ASPECT_RATIOS`). None if any processor will do.
    """

    def __init__(self, model: Any, reducer: Reducer, *, anyres: str = "released") -> None:
        # Check first: a reducer that does not fit must leave the model unchanged.
        self.family = family_of(model, anyres=anyres)
        self.reducer = reducer
        self.family.check_reducer(reducer)
        self.family.install(reducer)
        self.attached = True
        self.aspect_ratio: str | None = None

    def num_image_tokens(self, image_size: tuple[int, int] | None = None) -> int:
        """Count the placeholders that an image of `image_size` = (height, width) pixels takes.

        Without a size, this counts an image of the tower's own size, or, if images are cut into
        tiles, a square of 5 tiles. For a model that takes pictures of any size, it counts a square of
        24 x 24 tokens. LLaVA-OneVision does not cut an image that shares its example
        with others; use `processor` to count those.
        """
        return self.family.num_image_tokens(self.reducer, image_size)

    def num_video_tokens(self, num_frames: int) -> int:
        """Count the placeholders of one video. Raises UserError if the model takes no videos."""
        return self.family.num_video_tokens(self.reducer, num_frames)

    def processor(self, processor: Any) -> Any:
        """Copy the model's processor; the copy writes a placeholder for each token that remains.

        Raises:
            UserError: a tuned projector was loaded, and the processor pads pictures where its run did
                not, or the other way round.
        """
        if self.aspect_ratio is not None and image_aspect_ratio(processor) != self.aspect_ratio:
            raise UserError(
                f"the loaded projector was tuned with image_aspect_ratio={self.aspect_ratio}, and this "
                f"processor has {image_aspect_ratio(processor)}; call "
                f"vzip.media.set_aspect_ratio(processor, {self.aspect_ratio!r}) first"
            )
        return reduced_processor(processor, self.family, self.reducer)

    def detach(self) -> None:
        """Take the reducer out. Reduced processors stay reduced, so use the original one again."""
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
    """Attach a reducer to a LLaVA-type model.

    Give `budget`, or `dominant` and `contextual`, or `reducer`. Afterwards `model(...)` and
    `model.generate(...)` take inputs with `handle.num_image_tokens()` placeholders for an image.
    Only this instance changes.

    Args:
        model: e.g. a `LlavaForConditionalGeneration`.
        budget: tokens of an image, split 5.4 : 1 (the paper's ratio). For LLaVA-NeXT the total of 5
            tiles, as in the paper; for other models with tiles or videos, the tokens of one tile or
            frame.
        dominant: dominant tokens of a tile, CLS included.
        contextual: merged tokens of a tile.
        anyres: order of the tokens of several tiles, "released" or "spatial".
        reducer: any other reducer, e.g. `vzip.reducers.identity.Identity()`.

    Raises:
        UserError: an unsupported model, contradicting settings, a budget larger than an image.
    """
    # Budgets and counts are settings of VisionZip. The model's family says how many tiles a budget
    # counts together.
    if reducer is None:
        tiles = family_of(model).budget_tiles
        reducer = VisionZip(budget=budget, tiles=tiles, dominant=dominant, contextual=contextual)
    elif (budget, dominant, contextual) != (None, None, None):
        raise UserError("give either reducer=..., or budget / dominant / contextual, not both")
    return Handle(model, reducer, anyres=anyres)
