"""Pictures of which patches a reducer keeps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from data.pictures import open_picture
from train.ranks import is_main
from vzip import Handle
from vzip.media import model_inputs, pixels_of

SIDE = 336
DOMINANT, CONTEXTUAL = (230, 159, 0), (0, 114, 178)  # orange and blue of the colour-blind safe Okabe-Ito palette


@torch.no_grad()
def draw_kept(handle: Handle, image_processor: Any, picture: Path, target: Path) -> None:
    """Save the picture with dominant patches framed in orange, merge targets in blue, and the other patches dimmed."""
    image = open_picture(picture).resize((SIDE, SIDE))
    inputs = model_inputs("image", image_processor([open_picture(picture)], return_tensors="pt"))
    tile = pixels_of(inputs).flatten(0, -4)[:1]  # of several tiles the first, which is the whole picture
    parameter = next(handle.family.tower.parameters())
    reduction = handle.reduce(tile.to(parameter.device, parameter.dtype))
    num_prefix = reduction.slots.shape[1] - int(reduction.slots.shape[1] ** 0.5) ** 2
    grid = int((reduction.slots.shape[1] - num_prefix) ** 0.5)
    shown = Image.fromarray((np.asarray(image) * 0.35).astype("uint8"))
    pen = ImageDraw.Draw(shown)
    for tokens, colour in ((reduction.contextual, CONTEXTUAL), (reduction.dominant, DOMINANT)):
        for index in (tokens[0] - num_prefix).tolist():
            if index < 0:
                continue  # CLS has no place
            row, column = divmod(index, grid)
            box = tuple(round(edge * SIDE / grid) for edge in (column, row, column + 1, row + 1))
            shown.paste(image.crop(box), box[:2])
            pen.rectangle(box, outline=colour, width=2)
    if is_main():
        shown.save(target)


def draw_examples(handle: Handle, image_processor: Any, pictures: Sequence[Path], folder: Path) -> list[Path]:
    """kept_tokens_N.png of each picture, on rank 0; under ZeRO 3 the other ranks take part."""
    targets = [folder / f"kept_tokens_{number}.png" for number in range(len(pictures))]
    for picture, target in zip(pictures, targets, strict=True):
        draw_kept(handle, image_processor, picture, target)
    return targets
