"""What figures are drawn of: a model, the pictures that it is shown, and the run that it is of."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from scripts.common.held_out import held_out_with_pictures
from scripts.figures.attention import LayerAttention, attention_of_layers
from vzip import Comparison, UserError
from vzip.overlay import first_tile
from vzip.pictures import open_picture
from vzip.reducers import with_budget
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip
from vzip.runs.projector import read_meta
from vzip.tap import layer_index

NUM_PICTURES = 16
"""Held-out pictures that attention is averaged over."""


@dataclass(frozen=True)
class FigureInputs:
    """What is drawn: a model, the pictures it is shown, and, of a finished run, where it is."""

    comparison: Comparison
    pictures: list[Image.Image]
    folder: Path
    """That the figures are written to."""
    run: Path | None
    others: tuple[Path, ...]
    """Runs to compare with, beside those that stand beside the run."""
    budgets: tuple[int, ...]
    """Those asked for; by default such as are near the run's."""

    @cached_property
    def reducer(self) -> VisionZip:
        """The run's; where it has another one, or there is no run, VisionZip with as many tokens, or a ninth of them."""
        family, (own, *_) = self.comparison.family, (*self.comparison.reducers.values(), None)
        if isinstance(own, VisionZip):
            return own
        return VisionZip(budget=own.budget if isinstance(own, Random) else max(2, family.num_patches // 9))

    @cached_property
    def attention(self) -> list[tuple[Tensor, LayerAttention]]:
        """Of each picture: each patch's share of the attention in each layer, float32[L, P], and the tapped layer."""
        family, made = self.comparison.family, []
        for picture in self.pictures:
            layers = attention_of_layers(
                family, first_tile(family, self.comparison.processor.image_processor, picture)
            )
            made.append(
                (torch.cat([layer.shares() for layer in layers]).cpu(), layers[self.tapped(len(layers))])
            )
        return made

    def tapped(self, num_layers: int) -> int:
        """Index of the layer whose attention the reducer reads."""
        layer = (
            self.comparison.family.model.config.vision_feature_layer
            if self.reducer.layer is None
            else self.reducer.layer
        )
        return layer_index(layer, num_layers)

    @property
    def about(self) -> dict[str, Any]:
        """What all numbers of a tower hold for."""
        family, shares = self.comparison.family, self.attention[0][0]
        num_layers, num_patches = shares.shape
        return {
            "num_pictures": len(self.pictures),
            "num_patches": num_patches,
            "num_layers": num_layers,
            "layer": self.tapped(num_layers) + 1,
            "has_cls": family.has_cls,
        }

    def with_budget(self, budget: int) -> VisionZip:
        """The reducer at a budget: at its own with the split that it has, at others with the paper's."""
        tiles = self.comparison.family.budget_tiles
        if budget == tiles * (self.reducer.dominant + self.reducer.contextual):
            return self.reducer
        reducer = with_budget(self.reducer, budget, tiles=tiles)
        assert isinstance(reducer, VisionZip)
        return reducer

    @property
    def shown_budgets(self) -> list[int]:
        """Those asked for, or half, once, twice and four times the run's; as far as a picture has as many tokens."""
        if self.budgets:
            return sorted(self.budgets)
        tile = self.reducer.dominant + self.reducer.contextual
        family = self.comparison.family
        shares = (
            share for share in (tile // 2, tile, 2 * tile, 4 * tile) if 1 <= share <= family.num_patches
        )
        return [share * family.budget_tiles for share in shares]


def _open_pictures(paths: Iterable[Path]) -> list[Image.Image]:
    pictures = []
    for path in paths:
        try:
            pictures.append(open_picture(path))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} can't be opened: {error}; give others as --pictures") from error
    return pictures


def make_subject(arguments: argparse.Namespace) -> FigureInputs:
    """Raises UserError for what is neither a finished run nor a model, or has nothing to look at."""
    source = Path(arguments.source)
    run = source if (source / "config.yaml").is_file() else None
    if run is not None:
        read_meta(run)
    elif not arguments.pictures or arguments.out is None:
        raise UserError(
            f"{source} is not a run folder; of a model give --pictures to look at, and --out for the figures"
        )
    paths = (
        arguments.pictures
        or list(dict.fromkeys(path for _, path in held_out_with_pictures(source)))[:NUM_PICTURES]
    )
    return FigureInputs(
        pictures=_open_pictures(paths),
        comparison=Comparison.open(arguments.source),
        folder=arguments.out or source / "figures",
        run=run,
        others=tuple(arguments.runs),
        budgets=tuple(dict.fromkeys(arguments.budgets)),
    )
