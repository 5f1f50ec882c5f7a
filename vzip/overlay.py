"""Draw what a reducer does to a picture: kept tokens, merged tokens, and attention.

`look` runs the tower on one tile, and the other functions draw what it returns. Each drawing is a
square of `side` pixels, or a little less, so that patches are whole pixels:

    tile = vzip.overlay.look(family, reducer, processor.image_processor, picture)
    kept_tokens(tile).save("kept.png")          # dominant patches orange, merge targets blue
    merged_tokens(tile).save("merged.png")      # one colour and number for each contextual token
    attention_map(tile).save("attention.png")   # attention that each patch receives

The colours are those of Okabe and Ito, and of viridis, which colour-blind readers tell apart.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vzip.errors import UserError
from vzip.families import Family
from vzip.media import MediaInputs
from vzip.reducers.base import Reducer
from vzip.reducers.visionzip import VisionZip

SIDE = 336

DOMINANT = (230, 159, 0)
CONTEXTUAL = (0, 114, 178)
"""Orange and blue of Okabe and Ito's palette."""

GROUPS = (
    CONTEXTUAL,
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (86, 180, 233),
    (213, 94, 0),
)
"""Colours of contextual tokens, used in turn: the rest of the palette."""

RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Colours of attention, from none to most: viridis at even steps."""

WHITE = (255, 255, 255)


@dataclass(frozen=True)
class TileTokens:
    """Where the tokens of one tile went.

    P is the number of patches, in raster order; D and C are as in `vzip.reducers.base`.
    """

    picture: Image.Image
    """The tile as the tower sees it, cut and resized."""
    saliency: Tensor
    """float32[rows, columns]: attention that each patch receives in the hooked layer.

    All patches and CLS together receive 1.
    """
    dominant: Tensor
    """int64[D or D - 1]: the dominant patches, without CLS, which has no place in the picture."""
    has_cls: bool
    """Whether CLS is among the dominant tokens."""
    contextual: Tensor
    """int64[C]: the patches that others are merged into."""
    members: Tensor
    """int64[P]: the contextual token that holds a patch, 0 to C - 1, or -1 if none does."""

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        rows, columns = self.saliency.shape
        return rows, columns


def first_tile(family: Family, image_processor: Any, picture: Image.Image) -> Tensor:
    """Prepare a picture for the tower: float[1, 3, height, width].

    If the model cuts pictures into tiles, this is the one that shows the whole picture.

    Raises:
        UserError: the model takes pictures of any size, cut into patches.
    """
    if family.has_grids:
        raise UserError(
            f"the tower of a {family.model_type!r} model takes pictures of any size, whose layers can't be "
            f"compared; `vzip.overlay.look` shows which tokens are kept"
        )
    weight = next(family.tower.parameters())
    processed = image_processor([[picture]], return_tensors="pt")
    seen = family.seen_picture(MediaInputs.from_processed("image", processed))
    return seen[None].to(weight.device, weight.dtype)


@torch.no_grad()
def look(family: Family, reducer: Reducer, image_processor: Any, picture: Image.Image) -> TileTokens:
    """Show a picture to the tower and reduce it.

    If the model cuts pictures into tiles, this looks at the first one, which shows the whole
    picture. The model may have any reducer attached, or none. A random reducer draws anew.

    Args:
        family: the model.
        reducer: the reducer to look at.
        image_processor: the image processor of the model's processor.
        picture: any picture.

    Raises:
        UserError: the budget does not fit.
    """
    # The drawings show attention, so it is computed also for a reducer that does not need it.
    attentive = reducer if reducer.uses_attention else VisionZip(dominant=1, contextual=0)
    weight = next(family.tower.parameters())
    inputs = MediaInputs.from_processed("image", image_processor([[picture]], return_tensors="pt"))
    inputs = inputs.map(lambda values: values.to(weight.device))
    tokens, grid = family.look(attentive, inputs.normalized(weight.dtype))
    assert tokens.saliency is not None
    output = family.fitting(reducer, tokens)(tokens)

    # Token numbers become patch numbers: CLS, if there is one, is token 0, and gets the number -1.
    num_cls = int(tokens.has_cls)
    dominant = output.dominant[0].cpu() - num_cls
    contextual = output.contextual[0].cpu() - num_cls

    # The slots count the dominant tokens before the contextual ones.
    num_dominant = output.dominant.shape[1]
    members = output.slots[0, num_cls:].cpu() - num_dominant

    # The picture is shown as the tower sees it, but with its own colours.
    processed = image_processor([[picture]], return_tensors="pt", do_rescale=False, do_normalize=False)
    seen = family.seen_picture(MediaInputs.from_processed("image", processed))
    shown = seen.to(torch.uint8).permute(1, 2, 0).contiguous()
    return TileTokens(
        picture=Image.fromarray(shown.cpu().numpy()),
        saliency=tokens.saliency[0].float().cpu().view(grid),
        dominant=dominant[dominant >= 0],
        has_cls=bool((dominant < 0).any()),
        contextual=contextual,
        members=members.clamp(min=-1),
    )


class _Canvas:
    """A square picture of a tile, on whose patches one can draw."""

    def __init__(self, tile: TileTokens, side: int) -> None:
        rows, self.columns = tile.grid
        # Whole pixels for each patch, so that frames are sharp.
        self.cell = max(1, side // self.columns)
        self.bright = tile.picture.resize((self.cell * self.columns, self.cell * rows))
        self.image = self.bright.copy()

    def dim(self, share: float) -> None:
        """Darken the whole picture to a share of its brightness."""
        # The bright picture stays: `light` and `tint` take their patches from it.
        self.image = Image.fromarray((np.asarray(self.bright) * share).astype("uint8"))

    def box(self, patch: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of a patch; right and bottom belong to the next patches."""
        row, column = divmod(patch, self.columns)
        left = column * self.cell
        top = row * self.cell
        return left, top, left + self.cell, top + self.cell

    def light(self, patch: int) -> None:
        """Show a patch at its full brightness."""
        box = self.box(patch)
        self.image.paste(self.bright.crop(box), box[:2])

    def tint(self, patch: int, colour: tuple[int, int, int], share: float) -> None:
        """Blend a patch with a share of a colour."""
        box = self.box(patch)
        own = self.bright.crop(box)
        tinted = Image.blend(own, Image.new("RGB", own.size, colour), share)
        self.image.paste(tinted, box[:2])

    def frame(self, patch: int, colour: tuple[int, int, int]) -> None:
        """Draw a frame on the border of a patch."""
        left, top, right, bottom = self.box(patch)
        ImageDraw.Draw(self.image).rectangle(
            (left, top, right - 1, bottom - 1),
            outline=colour,
            width=max(1, self.cell // 10),
        )

    def write(self, patch: int, text: str, *, large: bool) -> None:
        """Write text in the middle of a patch, unless it would be too small to read."""
        size = self.cell * (0.62 if large else 0.42)
        if size < 7:
            return

        left, top, *_ = self.box(patch)
        ImageDraw.Draw(self.image).text(
            (left + self.cell / 2, top + self.cell / 2),
            text,
            font_size=size,
            anchor="mm",
            fill="white",
            stroke_width=max(1, int(size / 9)),
            stroke_fill="black",
        )


def kept_tokens(tile: TileTokens, *, side: int = SIDE) -> Image.Image:
    """Frame dominant patches in orange and merge targets in blue, and dim the other patches."""
    # Dim everything first, so that the patches that stay stand out.
    canvas = _Canvas(tile, side)
    canvas.dim(0.35)
    for patches, colour in ((tile.contextual, CONTEXTUAL), (tile.dominant, DOMINANT)):
        for patch in patches.tolist():
            canvas.light(patch)
            canvas.frame(patch, colour)
    return canvas.image


def merged_tokens(tile: TileTokens, *, side: int = SIDE) -> Image.Image:
    """Give the patches of each contextual token one colour and one number.

    The target of a merge is framed in white, with a larger number. Dominant patches are framed in
    orange, without a colour. A patch that is in no token is dark.
    """
    canvas = _Canvas(tile, side)
    canvas.dim(0.35)
    targets = set(tile.contextual.tolist())
    for patch, group in enumerate(tile.members.tolist()):
        if group >= 0:
            is_target = patch in targets
            canvas.tint(patch, GROUPS[group % len(GROUPS)], 0.65 if is_target else 0.5)
            canvas.write(patch, str(group + 1), large=is_target)

    # Frames come after all colours, which would cover them.
    for patch in targets:
        canvas.frame(patch, WHITE)
    for patch in tile.dominant.tolist():
        canvas.light(patch)
        canvas.frame(patch, DOMINANT)
    return canvas.image


def attention_map(tile: TileTokens, *, side: int = SIDE) -> Image.Image:
    """Colour each patch by its attention, from dark violet for none to yellow for the most.

    The scale is of square roots. A few patches hold so much attention that one would see nothing of
    the others on an even scale.
    """
    # Use a grey picture, so that all colour is attention.
    grey = tile.picture.convert("L").convert("RGB")
    canvas = _Canvas(replace(tile, picture=grey), side)

    # Scale to the most attended patch of this picture. The clamp avoids 0 / 0.
    shares = tile.saliency / tile.saliency.max().clamp(min=1e-12)
    heights = shares.sqrt().flatten().numpy()
    steps = np.linspace(0, 1, len(RAMP))

    # Interpolate each colour channel between the steps of the ramp.
    channels = [np.interp(heights, steps, values) for values in zip(*RAMP, strict=True)]
    colours = np.stack(channels, axis=1).round().astype(int)
    for patch, colour in enumerate(colours.tolist()):
        canvas.tint(patch, tuple(colour), 0.75)
    return canvas.image
