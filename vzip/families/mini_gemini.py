"""Mini-Gemini: the reducer gets CLIP's patches after they are enriched from a larger picture.

That enrichment is called *mining* in the released code. The attention that a reducer reads is
CLIP's own. CLS has no region of the picture, so it is neither mined nor kept: D counts patches
alone.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vzip.checkpoints.original import mini_gemini as original
from vzip.families.base import Family
from vzip.models.mini_gemini import MiniGeminiForConditionalGeneration
from vzip.reducers.base import Reducer, VisionTokens


class MiniGemini(Family):
    """Adapter of `MiniGeminiForConditionalGeneration`. It loads the public checkpoints directly."""

    model_type: ClassVar[str] = "mini_gemini"
    model_class: ClassVar[type] = MiniGeminiForConditionalGeneration
    original: ClassVar[Any] = original
    frozen_names = {  # noqa: RUF012
        "vision tower": "model.vision_tower",
        "high-resolution tower": "model.high_resolution_tower",
        "mining": "model.mining",
    }
    export_note: ClassVar[str | None] = (
        "`transformers` has no class for Mini-Gemini: it is loaded with `vzip` alone."
    )

    @property
    def other_flops(self) -> int:
        config = self.model.config
        settings = {"dtype": self.model.dtype, "device": self.model.device}

        # Inputs of the right shapes: CLIP's patches, and one picture in high resolution.
        num_patches = config.grid**2
        width = config.vision_config.hidden_size
        side = config.high_resolution_config.image_size
        patches = torch.empty(1, num_patches, width, **settings)
        picture = torch.empty(1, 3, side, side, **settings)

        # On the meta device nothing is computed, only counted.
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.model.model.mine(patches, picture)
        return int(counter.get_total_flops())

    def num_tile_tokens(self, reducer: Reducer) -> int:
        return reducer.num_tokens(self.num_patches, has_cls=False, num_dropped=0)

    def vision_tokens(self, reducer: Reducer, pixel_values: Tensor, **options: Any) -> VisionTokens:
        """Run CLIP on small pictures, and mine its patches in the large ones float[B, 3, s, s]."""
        # The reducer reads CLIP's attention, and gets the mined patches as features.
        inner: Any = self.model.model
        small_pictures = inner.low_resolution(pixel_values)
        patches = super().vision_tokens(reducer, small_pictures, **options).without_cls()
        return replace(patches, features=inner.mine(patches.features, pixel_values))
