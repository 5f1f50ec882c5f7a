"""Mini-Gemini: CLIP finds what to keep, and the reducer gets CLIP's patches after mining of the high-resolution picture.

CLS is not mined, having no region of the picture, and so is not kept: D counts patches alone.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vzip.checkpoints import mini_gemini as checkpoint
from vzip.families.base import Family, encode, project
from vzip.mini_gemini import MiniGeminiForConditionalGeneration
from vzip.reducers.base import Reducer, Reduction, VisionTokens


def _mined(inner: Any, reducer: Reducer, pixel_values: Tensor, **kwargs: Any) -> VisionTokens:
    tokens = encode(inner.vision_tower, inner.config, reducer, inner.low_resolution(pixel_values), **kwargs)
    return replace(
        tokens,
        features=inner.mine(tokens.features[:, 1:], pixel_values),
        has_cls=False,
        num_dropped=0,
        keys=None if tokens.keys is None else tokens.keys[:, 1:],
    )


class MiniGemini(Family):
    """Adapter of `vzip.mini_gemini.MiniGeminiForConditionalGeneration`; loads the public checkpoints as they are."""

    model_type: ClassVar[str] = "mini_gemini"
    model_class: ClassVar[type] = MiniGeminiForConditionalGeneration
    frozen_names = {  # noqa: RUF012
        "vision tower": "model.vision_tower",
        "high-resolution tower": "model.high_resolution_tower",
        "mining": "model.mining",
    }

    @classmethod
    def load_model(cls, path: str, *, dtype: torch.dtype) -> Any:
        if checkpoint.is_public(PreTrainedConfig.get_config_dict(path)[0]):
            return checkpoint.load_model(path, dtype=dtype)
        return super().load_model(path, dtype=dtype)

    @classmethod
    def load_processor(cls, path: str) -> Any:
        if checkpoint.is_public(PreTrainedConfig.get_config_dict(path)[0]):
            return checkpoint.load_processor(path)
        return super().load_processor(path)

    @property
    def other_flops(self) -> int:
        config, inner = self.model.config, self.model.model
        side, width = config.high_resolution_config.image_size, config.vision_config.hidden_size
        settings = {"dtype": self.model.dtype, "device": self.model.device}
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            inner.mine(torch.empty(1, config.grid**2, width, **settings), torch.empty(1, 3, side, side, **settings))
        return int(counter.get_total_flops())

    def num_tile_tokens(self, reducer: Reducer) -> int:
        return reducer.num_tokens(self.model.config.grid**2, has_cls=False, num_dropped=0)

    def reduce(self, reducer: Reducer, pixel_values: Tensor, **kwargs: Any) -> Reduction:
        """The reducer's output for high-resolution pictures float[B, 3, side, side], before the projector."""
        return reducer(_mined(self.model.model, reducer, pixel_values, **kwargs))

    @classmethod
    def get_image_features(cls, inner: Any, reducer: Reducer, pixel_values: Tensor, **kwargs: Any) -> Any:
        kwargs.pop("image_sizes", None)
        features = reducer(_mined(inner, reducer, pixel_values, **kwargs)).features
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=list(project(inner, features)))
