"""LLaVA-1.5 and every other `LlavaForConditionalGeneration`: one square picture, one tower, a two-layer projector.

Folders in the layout of LLaVA's own code load into the same class, see `vzip.checkpoints.llava`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vzip.checkpoints import llava as original
from vzip.checkpoints.renaming import is_original
from vzip.families.base import Family, encode, num_dropped, project
from vzip.reducers.base import Reducer


class Llava(Family):
    """Adapter of `LlavaForConditionalGeneration`, with any vision tower in `vzip.tap.TOWER_LAYOUTS`."""

    model_type: ClassVar[str] = "llava"
    model_class: ClassVar[type] = LlavaForConditionalGeneration

    @classmethod
    def load_model(cls, path: str, *, dtype: torch.dtype) -> Any:
        if is_original(PreTrainedConfig.get_config_dict(path)[0]):
            return original.load_model(path, dtype=dtype)
        return super().load_model(path, dtype=dtype)

    @classmethod
    def load_processor(cls, path: str) -> Any:
        if is_original(PreTrainedConfig.get_config_dict(path)[0]):
            return original.load_processor(path)
        return super().load_processor(path)

    def num_processed_tokens(self, reducer: Reducer, kind: str, inputs: Mapping[str, Any], index: int) -> int:
        """By the picture's own size, which some towers take as it is."""
        patch = self.model.config.vision_config.patch_size
        height, width = inputs["pixel_values"][index].shape[-2:]
        has_cls, dropped = self.has_cls, num_dropped(self.model.config)
        return reducer.num_tokens((height // patch) * (width // patch), has_cls=has_cls, num_dropped=dropped)

    @classmethod
    def get_image_features(cls, inner: Any, reducer: Reducer, pixel_values: Tensor, **kwargs: Any) -> Any:
        kwargs.pop("image_sizes", None)
        features = reducer(encode(inner.vision_tower, inner.config, reducer, pixel_values, **kwargs)).features
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=list(project(inner, features)))
