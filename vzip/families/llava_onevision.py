"""LLaVA-OneVision: LLaVA-NeXT's tiles with a SigLIP tower (no CLS) and up to 36 of them, several images, and video.

Without a reducer the model pools large images and every frame; a reduced one has few tokens instead, and is not pooled.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import transformers
from packaging import version
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

from vzip.errors import UserError
from vzip.families.anyres import Grid
from vzip.families.base import project
from vzip.families.features import VisualFeatures
from vzip.families.llava_next import LlavaNext
from vzip.media import check_num_frames, load_video_processor, stack_frames
from vzip.reducers.base import Reducer

TAKES_VIDEOS = version.parse(transformers.__version__) >= version.parse("5.18")
"""Before, `image_newline` was put behind a video elsewhere than in the method that is replaced."""


class LlavaOnevision(LlavaNext):
    """Adapter of `LlavaOnevisionForConditionalGeneration`."""

    model_type: ClassVar[str] = "llava_onevision"
    model_class: ClassVar[type] = LlavaOnevisionForConditionalGeneration
    kinds: ClassVar[tuple[str, ...]] = ("image", "video") if TAKES_VIDEOS else ("image",)
    stacked: ClassVar[tuple[str, ...]] = ("video",)
    budget_tiles: ClassVar[int] = 1
    """No budgets are published: a budget here is of one tile, or one frame."""

    @classmethod
    def load_processor(cls, path: str) -> Any:
        return load_video_processor(LlavaOnevisionProcessor, path)

    @classmethod
    def grid_of(cls, config: Any, image_size: tuple[int, int]) -> Grid:
        return replace(
            super().grid_of(config, image_size),
            max_tiles=int(config.vision_aspect_ratio.removeprefix("anyres_max_")),
        )

    @classmethod
    def grids_of(
        cls, config: Any, image_sizes: Any, batch_num_images: Any = None, **inputs: Any
    ) -> list[Grid | None]:
        """The images of a row that holds several are single tiles."""
        grids = super().grids_of(config, image_sizes)
        if batch_num_images is None:
            return grids
        alone = [int(count) == 1 for count in batch_num_images for _ in range(int(count))]
        if len(alone) != len(grids):
            raise UserError(
                f"batch_num_images={list(map(int, batch_num_images))} are {len(alone)} images, image_sizes has {len(grids)}; "
                f"use what the model's processor returns"
            )
        return [grid if single else None for grid, single in zip(grids, alone, strict=True)]

    def num_example_tokens(self, reducer: Reducer, image_sizes: Sequence[tuple[int, int] | None]) -> int:
        if len(image_sizes) > 1:  # not cut into tiles
            return len(image_sizes) * self.num_grid_tokens(reducer, None)
        return super().num_example_tokens(reducer, image_sizes)

    def num_video_tokens(self, reducer: Reducer, num_frames: int) -> int:
        """All frames, and one newline behind them."""
        if not TAKES_VIDEOS:
            raise UserError(
                f"videos of {self.model_type!r} models need transformers 5.18 or newer; this is {transformers.__version__}"
            )
        check_num_frames(num_frames)
        side = math.ceil(self.tile_side // self.model.config.vision_config.patch_size / 2)
        return num_frames * (side * side if reducer.anyres == "model" else self.num_tile_tokens(reducer)) + 1

    @classmethod
    def pack(cls, inner: Any, features: Sequence[Tensor], image_sizes: Any) -> list[Tensor]:
        aspect_ratio = inner.config.vision_aspect_ratio
        images: list[Tensor] = inner.pack_image_features(
            features, image_sizes, inner.image_newline, aspect_ratio
        )[0]
        return images

    @classmethod
    def reduced(cls, kind: str, inner: Any, reducer: Reducer, pixels: Any, **inputs: Any) -> VisualFeatures:
        """As LLaVA-NeXT's; of a video all frames, and one newline behind them."""
        if kind == "image":
            return super().reduced(kind, inner, reducer, pixels, **inputs)
        features = reducer(cls.vision_tokens(inner, reducer, stack_frames(pixels), **inputs)).features
        frames = VisualFeatures.as_it_is(features, num_media=len(pixels))
        order = F.pad(frames.order.view(len(pixels), -1), (0, 1), value=-1)
        return VisualFeatures(features, order.flatten(), frames.counts + 1)

    @classmethod
    def features(cls, kind: str, inner: Any, reducer: Reducer, pixels: Any, **inputs: Any) -> list[Tensor]:
        if kind == "image" or reducer.anyres != "model":
            return super().features(kind, inner, reducer, pixels, **inputs)
        tokens = cls.vision_tokens(inner, reducer, stack_frames(pixels), **inputs)
        frames = inner.apply_pooling(project(inner, reducer(tokens).features)).flatten(0, 1)
        newline = inner.image_newline.to(frames)[None]
        return [torch.cat([video, newline]) for video in frames.chunk(len(pixels))]
