"""InternVL3 and InternVL3.5: tiles of 448 pixels, and groups of 2 x 2 patches that become one token.

An image is cut into up to 12 tiles, and a thumbnail of the whole image follows them. The model puts
the patches of a group side by side (pixel shuffle) and projects them. The reducer comes between the
two, so it selects and merges groups. A group's score is the mean of the attention that CLS pays to
its patches, and its key is the mean of their keys.

Legend of shapes: B tiles, P patches, G groups, k patches of a group, d width of the tower.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import InternVLForConditionalGeneration, InternVLProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from vzip.checkpoints import hf
from vzip.errors import UserError
from vzip.families.base import Family, num_dropped_tokens
from vzip.families.features import VisualFeatures
from vzip.media import NUM_TILES, MediaInputs
from vzip.reducers.base import Reducer, VisionTokens


@dataclass(frozen=True)
class TileLimits:
    """Into how many tiles a processor cuts an image, its thumbnail not counted."""

    least: int
    most: int

    def grid(self, image_size: tuple[int, int], *, side: int) -> tuple[int, int]:
        """Count the rows and columns of tiles of an image of (height, width) pixels."""
        columns, rows = get_optimal_tiled_canvas(image_size, (side, side), self.least, self.most)
        return rows, columns


class InternVL(Family):
    """Adapter of `InternVLForConditionalGeneration`. A budget counts the tokens of a tile."""

    model_type: ClassVar[str] = "internvl"
    model_class: ClassVar[type] = InternVLForConditionalGeneration
    stacked: ClassVar[tuple[str, ...]] = ("image",)
    config_of_features: ClassVar[tuple[str, ...]] = (*Family.config_of_features, "downsample_ratio")
    num_around_image: ClassVar[int] = 2
    whole_tile: ClassVar[int] = -1

    def __init__(self, model: Any, *, anyres: str = "released") -> None:
        super().__init__(model, anyres=anyres)
        # The limits of the released processors, until `read_processor` is called.
        self.limits = TileLimits(least=1, most=12)

    # ---- Loading ----

    @classmethod
    def load_processor(cls, path: str) -> Any:
        processor = hf.load_video_processor(InternVLProcessor, path)
        # The processor always asks its image processor for tiles. Training calls that one itself.
        processor.image_processor.crop_to_patches = True
        return processor

    def read_processor(self, processor: Any) -> None:
        """Take over the limits of tiles. Raises UserError if the tiles have another size."""
        images = processor.image_processor
        self.limits = TileLimits(least=images.min_patches, most=images.max_patches)

        side = self.tile_side
        if (images.size["height"], images.size["width"]) != (side, side):
            raise UserError(
                f"this processor makes tiles of {images.size['height']} x {images.size['width']} pixels, "
                f"and the model takes {side} x {side}; use the model's own processor"
            )

    # ---- Sizes and counts ----

    @property
    def merge(self) -> int:
        """Patches a side of a group."""
        side: int = round(1 / self.model.config.downsample_ratio)
        return side

    @property
    def feature_width(self) -> int:
        return super().feature_width * self.merge**2

    @property
    def tile_side(self) -> int:
        return int(self.model.config.vision_config.image_size[0])

    @property
    def num_patches(self) -> int:
        return int((self.tile_side // self.model.config.vision_config.patch_size[0]) ** 2)

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        sizes = []
        for rows in range(1, self.limits.most + 1):
            for columns in range(1, self.limits.most // rows + 1):
                if rows * columns >= self.limits.least:
                    sizes.append((rows * self.tile_side, columns * self.tile_side))
        return sizes

    def num_tile_tokens(self, reducer: Reducer) -> int:
        return reducer.num_tokens(self.num_groups, has_cls=False, num_dropped=0)

    def num_tiles(self, image_size: tuple[int, int]) -> int:
        """Count the tiles of an image, with the thumbnail if there are several."""
        self.check_image_size(image_size)
        height, width = image_size
        rows, columns = self.limits.grid((height, width), side=self.tile_side)
        return rows * columns + 1 if rows * columns > 1 else 1

    def num_image_tokens(self, reducer: Reducer, image_size: tuple[int, int] | None = None) -> int:
        """Count the placeholders of an image; by default of a square one of 2 x 2 tiles."""
        size = image_size or (2 * self.tile_side, 2 * self.tile_side)
        return self.num_tiles(size) * self.num_tile_tokens(reducer)

    def num_processed_tokens(self, reducer: Reducer, kind: str, inputs: MediaInputs, index: int) -> int:
        if kind == "video":
            return self.num_video_tokens(reducer, len(inputs.pixels[index]))
        return int(inputs.extra[NUM_TILES][index]) * self.num_tile_tokens(reducer)

    def written(self, processor: Any, reducer: Reducer, kind: str, inputs: MediaInputs, index: int) -> str:
        placeholders = super().written(processor, reducer, kind, inputs, index)
        return f"{processor.start_image_token}{placeholders}{processor.end_image_token}"

    # ---- Checks before any work ----

    def check_reducer(self, reducer: Reducer) -> None:
        """Raise UserError if a tile has too few tokens, or the model no square groups of patches."""
        config = self.model.config
        if config.vision_feature_select_strategy != "default":
            raise UserError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} keeps CLS among "
                "the patches, which then are no square; set it to 'default' in the model's config"
            )

        # Patches are put together in squares, on both sides of a square tile.
        vision = config.vision_config
        num_patches = self.tile_side // vision.patch_size[0]
        is_square = len({*vision.image_size}) == len({*vision.patch_size}) == 1
        if not is_square or num_patches % self.merge:
            raise UserError(
                f"tiles of {list(vision.image_size)} pixels with patches of {list(vision.patch_size)} "
                f"can't be divided into groups of {self.merge} x {self.merge} patches; "
                "use a model with square tiles"
            )
        super().check_reducer(reducer)

    # ---- The two computations ----

    def vision_tokens(self, reducer: Reducer, pixel_values: Tensor, **options: Any) -> VisionTokens:
        """Run the tower on float[B, 3, side, side], and return its groups: features [B, G, k * d]."""
        dropped = num_dropped_tokens(self.model.config)
        patches = self._run_tower(self.tower, reducer, pixel_values, num_dropped=dropped, **options)
        return self._grouped(patches.without_cls())

    def _grouped(self, patches: VisionTokens) -> VisionTokens:
        """Put the patches of each group side by side, as the model does; average scores and keys."""
        # The model's own shuffle of the patches' numbers says which patches are together.
        num_patches = patches.features.shape[1]
        side = round(num_patches**0.5)
        numbers = torch.arange(num_patches, device=patches.features.device).view(1, side, side, 1)
        shuffled = self.model.model.pixel_shuffle(numbers, scale_factor=self.model.config.downsample_ratio)
        groups = shuffled.flatten(0, 2)

        def mean(values: Tensor) -> Tensor:
            return values[:, groups].mean(dim=2)

        return replace(
            patches,
            features=patches.features[:, groups].flatten(2),
            saliency=None if patches.saliency is None else mean(patches.saliency),
            keys=None if patches.keys is None else mean(patches.keys),
            received=tuple(mean(values) for values in patches.received),
        )

    def visual_features(
        self, kind: str, inputs: MediaInputs, reducer: Reducer, **options: Any
    ) -> VisualFeatures:
        """Run the tower on all tiles, and reduce each of them by itself."""
        features = reducer(self.vision_tokens(reducer, inputs.pixels, **options)).features
        tiles = VisualFeatures.in_order(features, num_media=len(features))

        # The model's own method does not know which tiles belong together, and need not.
        if NUM_TILES not in inputs.extra:
            return tiles
        return replace(tiles, counts=inputs.extra[NUM_TILES].cpu() * features.shape[1])
