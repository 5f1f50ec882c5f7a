"""What figures are drawn from: a model, the pictures that it looks at, and the run that it belongs to."""

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
from train.runs import FinishedRun
from vzip import Comparison, UserError
from vzip.families import Family
from vzip.overlay import first_tile
from vzip.pictures import open_picture
from vzip.reducers import with_budget
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip
from vzip.tap import layer_index

NUM_PICTURES = 16
"""Held-out pictures that attention is averaged over."""


@dataclass(frozen=True)
class FigureInputs:
    """A model, the pictures it looks at, and the folder of the run, if there is one."""

    comparison: Comparison
    pictures: list[Image.Image]
    folder: Path
    """Where the figures are written."""
    run: Path | None
    others: tuple[Path, ...]
    """Runs to compare with. Those in the same folder as the run are compared anyway."""
    budgets: tuple[int, ...]
    """Budgets that the user asked for."""

    @property
    def family(self) -> Family:
        return self.comparison.family

    @property
    def image_processor(self) -> Any:
        return self.comparison.processor.image_processor

    @cached_property
    def reducer(self) -> VisionZip:
        """The run's reducer.

        Without one, VisionZip with as many tokens as a random reducer, or a ninth of the patches.
        """
        reducers = list(self.comparison.reducers.values())
        if not reducers:
            return VisionZip(budget=max(2, self.family.num_patches // 9))
        if isinstance(reducers[0], VisionZip):
            return reducers[0]
        if isinstance(reducers[0], Random):
            return VisionZip(budget=reducers[0].budget)
        return VisionZip(budget=max(2, self.family.num_patches // 9))

    @cached_property
    def attention(self) -> list[tuple[Tensor, LayerAttention]]:
        """For each picture, the shares of the patches in each layer, float32[L, P], and VisionZip's layer."""
        attention = []
        for picture in self.pictures:
            tile = first_tile(self.family, self.image_processor, picture)
            layers = attention_of_layers(self.family, tile)
            shares = torch.cat([layer.shares() for layer in layers]).cpu()
            attention.append((shares, layers[self.hooked_layer(len(layers))]))
        return attention

    def hooked_layer(self, num_layers: int) -> int:
        """Return the index of the layer whose attention the reducer reads."""
        layer = self.reducer.layer
        if layer is None:
            layer = self.family.model.config.vision_feature_layer
        return layer_index(layer, num_layers)

    @property
    def about(self) -> dict[str, Any]:
        """The numbers that all figures of a tower begin with."""
        shares, _ = self.attention[0]
        num_layers, num_patches = shares.shape
        return {
            "num_pictures": len(self.pictures),
            "num_patches": num_patches,
            "num_layers": num_layers,
            "layer": self.hooked_layer(num_layers) + 1,
            "has_cls": self.family.has_cls,
        }

    def with_budget(self, budget: int) -> VisionZip:
        """Return the reducer at a budget: with its own split at its own budget, else with the paper's."""
        tiles = self.family.budget_tiles
        if budget == tiles * (self.reducer.dominant + self.reducer.contextual):
            return self.reducer
        reducer = with_budget(self.reducer, budget, tiles=tiles)
        assert isinstance(reducer, VisionZip)
        return reducer

    @property
    def shown_budgets(self) -> list[int]:
        """The budgets that the user asked for, or half, once, twice and four times the run's budget."""
        if self.budgets:
            return sorted(self.budgets)
        per_tile = self.reducer.dominant + self.reducer.contextual
        candidates = (per_tile // 2, per_tile, 2 * per_tile, 4 * per_tile)
        fitting = [budget for budget in candidates if 1 <= budget <= self.family.num_patches]
        return [budget * self.family.budget_tiles for budget in fitting]


def _open_pictures(paths: Iterable[Path]) -> list[Image.Image]:
    pictures = []
    for path in paths:
        try:
            pictures.append(open_picture(path))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} can't be opened: {error}; give others as --pictures") from error
    return pictures


def _held_out_pictures(run: Path) -> list[Path]:
    """List the first pictures of a run's held-out questions, each once."""
    paths = [path for _, path in held_out_with_pictures(run)]
    return list(dict.fromkeys(paths))[:NUM_PICTURES]


def figure_inputs(arguments: argparse.Namespace) -> FigureInputs:
    """Open the source and the pictures that a command names.

    Raises:
        UserError: the source is neither a finished run nor a model, or there is no picture.
    """
    source = Path(arguments.source)
    run = FinishedRun(source)
    if run.has_settings:
        _ = run.meta  # raises if the run has not finished
    elif not arguments.pictures or arguments.out is None:
        raise UserError(
            f"{source} is not a run folder; for a model, give --pictures to look at, and --out for the "
            f"figures"
        )
    return FigureInputs(
        pictures=_open_pictures(arguments.pictures or _held_out_pictures(source)),
        comparison=Comparison.open(arguments.source),
        folder=arguments.out or source / "figures",
        run=source if run.has_settings else None,
        others=tuple(arguments.runs),
        budgets=tuple(dict.fromkeys(arguments.budgets)),
    )
