"""Open what figures are drawn from: a model, pictures for it to look at, and the model's run."""

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
        """The VisionZip that figures show: the run's own, if it has one.

        A run with random tokens gets a VisionZip with as many tokens. Otherwise it has a ninth of
        all tokens.
        """
        reducer = next(iter(self.comparison.reducers.values()), None)
        if isinstance(reducer, VisionZip):
            return reducer
        if isinstance(reducer, Random):
            return VisionZip(budget=reducer.budget)

        # A ninth is the paper's 64 of LLaVA-1.5's 576 patches.
        return VisionZip(budget=max(2, self.family.num_groups // 9))

    @cached_property
    def attention(self) -> list[tuple[Tensor, LayerAttention]]:
        """For each picture: the patches' shares float32[L, P] by layer, and VisionZip's layer."""
        attention = []
        for picture in self.pictures:
            # One run of the tower gives all layers. Keep the queries and keys of VisionZip's layer
            # alone, because those of all layers and pictures would fill the memory.
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
        """Return the reducer at a budget. Another budget than its own gets the paper's split."""
        tiles = self.family.budget_tiles
        if budget == tiles * (self.reducer.dominant + self.reducer.contextual):
            return self.reducer

        # The split into dominant and contextual tokens belongs to one budget, so it is made anew.
        reducer = with_budget(self.reducer, budget, tiles=tiles)
        assert isinstance(reducer, VisionZip)
        return reducer

    @property
    def shown_budgets(self) -> list[int]:
        """The budgets that the user asked for, or 1/2, 1, 2 and 4 times the run's budget."""
        if self.budgets:
            return sorted(self.budgets)

        # A tile can't keep more tokens than it has.
        per_tile = self.reducer.dominant + self.reducer.contextual
        candidates = (per_tile // 2, per_tile, 2 * per_tile, 4 * per_tile)
        fitting = [budget for budget in candidates if 1 <= budget <= self.family.num_groups]
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
    # Several questions may be about one picture, and a dict keeps the order.
    paths = [path for _, path in held_out_with_pictures(run)]
    return list(dict.fromkeys(paths))[:NUM_PICTURES]


def figure_inputs(arguments: argparse.Namespace) -> FigureInputs:
    """Open the source and the pictures that a command names.

    Raises:
        UserError: the source is neither a finished run nor a model, or there is no picture.
    """
    # A run has pictures of its own, and a folder for the figures. A model needs both named.
    source = Path(arguments.source)
    run = FinishedRun(source)
    if run.has_settings:
        # Reading meta.json raises for a run that has not finished.
        _ = run.meta
    elif not arguments.pictures or arguments.out is None:
        raise UserError(
            f"{source} is not a run folder; for a model, give --pictures to look at, and --out for the "
            f"figures"
        )

    # Pictures come before the model: a broken one is reported before the long wait.
    return FigureInputs(
        pictures=_open_pictures(arguments.pictures or _held_out_pictures(source)),
        comparison=Comparison.open(arguments.source),
        folder=arguments.out or run.own_folder("figures"),
        run=source if run.has_settings else None,
        others=tuple(arguments.runs),
        budgets=tuple(dict.fromkeys(arguments.budgets)),
    )
