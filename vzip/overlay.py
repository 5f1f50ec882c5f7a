"""Pictures of what a reducer does to a picture: the kept tokens, what merges into which, and the attention.

`look` asks the model once, for one tile; the drawings take what it returns, and give square pictures with a side of `side`
pixels, or a little less, so that patches are whole pixels:

    tile = vzip.overlay.look(family, reducer, processor.image_processor, picture)
    kept_tokens(tile).save("kept.png")          # dominant patches framed in orange, merge targets in blue, the rest dimmed
    merged_tokens(tile).save("merged.png")      # each contextual token and the patches merged into it: one colour, one number
    attention_map(tile).save("attention.png")   # the attention that each patch receives: dark little, yellow much

Colours are those of Okabe and Ito, and of viridis, which colour-blind readers tell apart.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vzip.families import Family
from vzip.media import MediaInputs
from vzip.reducers.base import Reducer
from vzip.reducers.visionzip import VisionZip

SIDE = 336
DOMINANT, CONTEXTUAL = (230, 159, 0), (0, 114, 178)
"""Orange and blue of Okabe and Ito's palette."""
GROUPS = (CONTEXTUAL, (0, 158, 115), (204, 121, 167), (240, 228, 66), (86, 180, 233), (213, 94, 0))
"""Of contextual tokens, in turn: the rest of the palette."""
RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Of attention, from none to most: viridis at even steps."""


@dataclass(frozen=True)
class TileTokens:
    """Where the tokens of one tile went. P patches, in raster order; D and C as in `vzip.reducers.base`."""

    picture: Image.Image
    """The tile as the tower sees it, cut and resized."""
    saliency: Tensor
    """float32[rows, columns]: attention that each patch receives in the tapped layer; all patches, and CLS, share 1."""
    dominant: Tensor
    """int64[D or D - 1]: the dominant patches, without CLS, which has no place."""
    has_cls: bool
    """Whether CLS is among the dominant tokens."""
    contextual: Tensor
    """int64[C]: the patches that others are merged into."""
    members: Tensor
    """int64[P]: which contextual token holds a patch, 0 to C - 1, its own target included; -1 for none."""

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        rows, columns = self.saliency.shape
        return rows, columns


def first_tile(family: Family, image_processor: Any, picture: Image.Image) -> Tensor:
    """float[1, 3, height, width]: a picture as the tower gets it; where it is cut into tiles, the first, which is all of it."""
    processed = image_processor([[picture]], return_tensors="pt")
    pixels = MediaInputs.from_processed("image", processed).pixels.flatten(0, -4)[:1]
    weight = next(family.tower.parameters())
    return pixels.to(weight.device, weight.dtype)


@torch.no_grad()
def look(family: Family, reducer: Reducer, image_processor: Any, picture: Image.Image) -> TileTokens:
    """What a reducer makes of a picture; where it is cut into tiles, of the first one, which is the whole picture made small.

    The model may have any reducer attached, or none. A reducer that draws at random draws anew.

    Raises:
        UserError: a budget that does not fit.
    """
    seen = image_processor([[picture]], return_tensors="pt", do_rescale=False, do_normalize=False)
    shown = MediaInputs.from_processed("image", seen).pixels.flatten(0, -4)[0].to(torch.uint8)
    asking = reducer if reducer.uses_attention else VisionZip(dominant=1, contextual=0)
    tokens = family.vision_tokens(asking, first_tile(family, image_processor, picture))
    assert tokens.saliency is not None
    reduction = reducer(tokens)
    first, num_dominant = int(tokens.has_cls), reduction.dominant.shape[1]
    dominant = reduction.dominant[0].cpu() - first
    slots = reduction.slots[0, first:].cpu() - num_dominant
    side = int(tokens.saliency.shape[1] ** 0.5)
    return TileTokens(
        picture=Image.fromarray(shown.permute(1, 2, 0).contiguous().cpu().numpy()),
        saliency=tokens.saliency[0].float().cpu().view(side, side),
        dominant=dominant[dominant >= 0],
        has_cls=bool((dominant < 0).any()),
        contextual=reduction.contextual[0].cpu() - first,
        members=slots.clamp(min=-1),
    )


class _Canvas:
    """A square picture of a tile in which patches are drawn."""

    def __init__(self, tile: TileTokens, side: int) -> None:
        self.columns = tile.grid[1]
        self.cell = max(1, side // self.columns)
        self.bright = tile.picture.resize((self.cell * self.columns, self.cell * tile.grid[0]))
        self.image = self.bright.copy()

    def dim(self, share: float) -> None:
        self.image = Image.fromarray((np.asarray(self.bright) * share).astype("uint8"))

    def box(self, patch: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of a patch; the last two are the next patches'."""
        row, column = divmod(patch, self.columns)
        return column * self.cell, row * self.cell, (column + 1) * self.cell, (row + 1) * self.cell

    def light(self, patch: int) -> None:
        """Show a patch as it is."""
        box = self.box(patch)
        self.image.paste(self.bright.crop(box), box[:2])

    def tint(self, patch: int, colour: tuple[int, int, int], share: float) -> None:
        box = self.box(patch)
        under = self.bright.crop(box)
        self.image.paste(Image.blend(under, Image.new("RGB", under.size, colour), share), box[:2])

    def frame(self, patch: int, colour: tuple[int, int, int]) -> None:
        left, top, right, bottom = self.box(patch)
        pen = ImageDraw.Draw(self.image)
        pen.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=max(1, self.cell // 10))

    def write(self, patch: int, text: str, *, strong: bool) -> None:
        """Text in the middle of a patch, where there is room for it."""
        left, top, *_ = self.box(patch)
        size = self.cell * (0.62 if strong else 0.42)
        if size < 7:
            return
        middle = left + self.cell / 2, top + self.cell / 2
        pen = ImageDraw.Draw(self.image)
        pen.text(
            middle,
            text,
            font_size=size,
            anchor="mm",
            fill="white",
            stroke_width=max(1, int(size / 9)),
            stroke_fill="black",
        )


def kept_tokens(tile: TileTokens, *, side: int = SIDE) -> Image.Image:
    """The picture with dominant patches framed in orange, merge targets in blue, and the other patches dimmed."""
    canvas = _Canvas(tile, side)
    canvas.dim(0.35)
    for patches, colour in ((tile.contextual, CONTEXTUAL), (tile.dominant, DOMINANT)):
        for patch in patches.tolist():
            canvas.light(patch)
            canvas.frame(patch, colour)
    return canvas.image


def merged_tokens(tile: TileTokens, *, side: int = SIDE) -> Image.Image:
    """The picture with the patches of each contextual token in one colour and with one number, its target's framed and larger.

    Dominant patches are framed in orange, and not tinted; a patch that is in no token is dark.
    """
    canvas = _Canvas(tile, side)
    canvas.dim(0.35)
    targets = set(tile.contextual.tolist())
    for patch, group in enumerate(tile.members.tolist()):
        if group >= 0:
            canvas.tint(patch, GROUPS[group % len(GROUPS)], 0.65 if patch in targets else 0.5)
            canvas.write(patch, str(group + 1), strong=patch in targets)
    for patch in targets:
        canvas.frame(patch, (255, 255, 255))
    for patch in tile.dominant.tolist():
        canvas.light(patch)
        canvas.frame(patch, DOMINANT)
    return canvas.image


def attention_map(tile: TileTokens, *, side: int = SIDE) -> Image.Image:
    """The attention of each patch over the picture in grey: from dark violet, none, to yellow, the most that a patch has here.

    The scale is of square roots: a few patches hold so much that of the others nothing would be seen.
    """
    canvas = _Canvas(replace(tile, picture=tile.picture.convert("L").convert("RGB")), side)
    scaled = (tile.saliency / tile.saliency.max().clamp(min=1e-12)).sqrt().flatten().numpy()
    steps = np.linspace(0, 1, len(RAMP))
    colours = np.stack(
        [np.interp(scaled, steps, [colour[channel] for colour in RAMP]) for channel in range(3)], axis=1
    )
    for patch, colour in enumerate(colours.round().astype(int).tolist()):
        canvas.tint(patch, tuple(colour), 0.75)
    return canvas.image
