"""LLaVA-1.5 and every other `LlavaForConditionalGeneration`: one square picture, one tower, a two-layer projector.

Folders in the layout of LLaVA's own code load into the same class, see `vzip.checkpoints.original.llava`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import LlavaForConditionalGeneration

from vzip.checkpoints.original import llava as original
from vzip.families.base import Family, num_dropped
from vzip.reducers.base import Reducer


class Llava(Family):
    """Adapter of `LlavaForConditionalGeneration`, with any vision tower in `vzip.tap.TOWER_LAYOUTS`."""

    model_type: ClassVar[str] = "llava"
    model_class: ClassVar[type] = LlavaForConditionalGeneration
    original: ClassVar[Any] = original

    def num_processed_tokens(self, reducer: Reducer, kind: str, inputs: Mapping[str, Any], index: int) -> int:
        """By the picture's own size, which some towers take as it is."""
        patch = self.model.config.vision_config.patch_size
        height, width = inputs["pixel_values"][index].shape[-2:]
        has_cls, dropped = self.has_cls, num_dropped(self.model.config)
        return reducer.num_tokens((height // patch) * (width // patch), has_cls=has_cls, num_dropped=dropped)
