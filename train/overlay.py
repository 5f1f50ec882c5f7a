"""Pictures of the kept tokens of a run's first held-out pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.ranks import is_main
from vzip import Handle
from vzip.overlay import kept_tokens, look
from vzip.pictures import open_picture


def draw_examples(handle: Handle, image_processor: Any, pictures: Sequence[Path], folder: Path) -> list[Path]:
    """kept_tokens_N.png of each picture, on rank 0; under ZeRO 3 the other ranks take part."""
    targets = [folder / f"kept_tokens_{number}.png" for number in range(len(pictures))]
    for picture, target in zip(pictures, targets, strict=True):
        drawn = kept_tokens(look(handle.family, handle.reducer, image_processor, open_picture(picture)))
        if is_main():
            drawn.save(target)
    return targets
