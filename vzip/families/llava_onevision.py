"""LLaVA-OneVision: up to 36 tiles, several images, and video, with a SigLIP tower (no CLS).

Without a reducer the model pools large images and every frame. A reduced model has few tokens
instead, and does not pool.
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

from vzip.checkpoints import hf
from vzip.errors import UserError
from vzip.families.anyres import Grid
from vzip.families.features import UnpackedFeatures, VisualFeatures
from vzip.families.llava_next import LlavaNext
from vzip.media import MediaInputs, check_num_frames, stack_frames
from vzip.reducers.base import Reducer

TAKES_VIDEOS = version.parse(transformers.__version__) >= version.parse("5.18")
"""Older versions add `image_newline` to a video outside of the method that is patched."""


class LlavaOnevision(LlavaNext):
    """Adapter of `LlavaOnevisionForConditionalGeneration`."""

    model_type: ClassVar[str] = "llava_onevision"
    model_class: ClassVar[type] = LlavaOnevisionForConditionalGeneration
    kinds: ClassVar[tuple[str, ...]] = ("image", "video") if TAKES_VIDEOS else ("image",)
    stacked: ClassVar[tuple[str, ...]] = ("video",)
    budget_tiles: ClassVar[int] = 1
    """No budgets are published. A budget here counts the tokens of one tile, or one frame."""
    config_of_features: ClassVar[tuple[str, ...]] = (*LlavaNext.config_of_features, "vision_aspect_ratio")

    @classmethod
    def load_processor(cls, path: str) -> Any:
        return hf.load_video_processor(LlavaOnevisionProcessor, path)

    # ---- Tiles ----

    def grid_of(self, image_size: tuple[int, int]) -> Grid:
        # "anyres_max_9" pools images of more than 9 tiles.
        max_tiles = int(self.model.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        return replace(super().grid_of(image_size), max_tiles=max_tiles)

    def grids(self, inputs: MediaInputs) -> list[Grid | None]:
        """Return the grid of each image; None for images that share their example with others."""
        grids = super().grids(inputs)
        if "batch_num_images" not in inputs.extra:
            return grids

        # One count for each example, one grid for each image.
        counts = [int(count) for count in inputs.extra["batch_num_images"]]
        is_alone = []
        for count in counts:
            is_alone += [count == 1] * count
        if len(is_alone) != len(grids):
            raise UserError(
                f"batch_num_images={counts} are {len(is_alone)} images, image_sizes has {len(grids)}; "
                f"use what the model's processor returns"
            )
        return [grid if alone else None for grid, alone in zip(grids, is_alone, strict=True)]

    # ---- Sizes and counts ----

    def num_example_tokens(self, reducer: Reducer, image_sizes: Sequence[tuple[int, int] | None]) -> int:
        if len(image_sizes) > 1:
            # Several images are not cut into tiles.
            return len(image_sizes) * self.num_grid_tokens(reducer, None)
        return super().num_example_tokens(reducer, image_sizes)

    def num_video_tokens(self, reducer: Reducer, num_frames: int) -> int:
        """Count the tokens of all frames, and one newline after them."""
        if not TAKES_VIDEOS:
            raise UserError(
                f"videos of {self.model_type!r} models need transformers 5.18 or newer; "
                f"this is {transformers.__version__}"
            )
        check_num_frames(num_frames)

        num_frame_tokens = self.num_tile_tokens(reducer)
        if self.tile_order(reducer) == "model":
            # The model halves the side of each frame.
            side = math.ceil(self.tile_side // self.model.config.vision_config.patch_size / 2)
            num_frame_tokens = side * side
        return num_frames * num_frame_tokens + 1

    # ---- The two computations ----

    def visual_features(
        self, kind: str, inputs: MediaInputs, reducer: Reducer, **options: Any
    ) -> VisualFeatures:
        """Treat images as LLaVA-NeXT does. A video is its frames, and one newline after them."""
        if kind == "image":
            return super().visual_features(kind, inputs, reducer, **options)

        tokens = self.vision_tokens(reducer, stack_frames(inputs.pixels), **options)
        features = reducer(tokens).features
        num_videos, num_frames = inputs.pixels.shape[:2]

        if self.tile_order(reducer) == "model":
            return UnpackedFeatures(
                features=features,
                order=torch.empty(0, dtype=torch.int64),
                counts=torch.full((num_videos,), self.num_video_tokens(reducer, num_frames)),
                kind=kind,
                num_tiles=(num_frames,) * num_videos,
                image_sizes=None,
            )

        # A row of indices for each video, with -1 (the newline) at its end.
        frames = VisualFeatures.in_order(features, num_media=num_videos)
        order = F.pad(frames.order.view(num_videos, -1), (0, 1), value=-1)
        return VisualFeatures(features, order.flatten(), frames.counts + 1)

    def pack(self, tokens: Tensor, features: UnpackedFeatures) -> list[Tensor]:
        inner = self.model.model
        if features.kind == "video":
            # The model pools each frame, and ends each video with a newline.
            frames = inner.apply_pooling(tokens).flatten(0, 1)
            newline = inner.image_newline.to(frames)[None]
            return [torch.cat([video, newline]) for video in frames.chunk(len(features.num_tiles))]

        images: list[Tensor] = inner.pack_image_features(
            torch.split(tokens, list(features.num_tiles)),
            features.image_sizes,
            inner.image_newline,
            self.model.config.vision_aspect_ratio,
        )[0]
        return images
