"""Mini-Gemini: CLIP finds what to keep, and the reducer gets CLIP's patches after mining of the high-resolution picture.

CLS is not mined, having no region of the picture, and so is not kept: D counts patches alone.
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
    """Adapter of `vzip.models.mini_gemini.MiniGeminiForConditionalGeneration`; loads the public checkpoints as they are."""

    model_type: ClassVar[str] = "mini_gemini"
    model_class: ClassVar[type] = MiniGeminiForConditionalGeneration
    original: ClassVar[Any] = original
    frozen_names = {  # noqa: RUF012
        "vision tower": "model.vision_tower",
        "high-resolution tower": "model.high_resolution_tower",
        "mining": "model.mining",
    }

    @property
    def other_flops(self) -> int:
        config, inner = self.model.config, self.model.model
        side, width = config.high_resolution_config.image_size, config.vision_config.hidden_size
        settings = {"dtype": self.model.dtype, "device": self.model.device}
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            inner.mine(
                torch.empty(1, config.grid**2, width, **settings), torch.empty(1, 3, side, side, **settings)
            )
        return int(counter.get_total_flops())

    def num_tile_tokens(self, reducer: Reducer) -> int:
        return reducer.num_tokens(self.num_patches, has_cls=False, num_dropped=0)

    @classmethod
    def vision_tokens(cls, inner: Any, reducer: Reducer, pixel_values: Tensor, **kwargs: Any) -> VisionTokens:
        """CLIP's patches, mined: of high-resolution pictures float[B, 3, side, side]."""
        tokens = super().vision_tokens(inner, reducer, inner.low_resolution(pixel_values), **kwargs)
        return replace(
            tokens,
            features=inner.mine(tokens.features[:, 1:], pixel_values),
            has_cls=False,
            num_dropped=0,
            keys=None if tokens.keys is None else tokens.keys[:, 1:],
        )
