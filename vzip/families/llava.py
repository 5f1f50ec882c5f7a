"""LLaVA-1.5 and every other `LlavaForConditionalGeneration`: one picture, one vision tower.

Folders of LLaVA's own code load into the same class, see `vzip.checkpoints.original.llava`.
"""

from typing import Any, ClassVar

from transformers import LlavaForConditionalGeneration

from vzip.checkpoints.original import llava as original
from vzip.checkpoints.original.llava_config import export_config
from vzip.families.base import Family, num_dropped_tokens
from vzip.media import MediaInputs
from vzip.reducers.base import Reducer


class Llava(Family):
    """Adapter of `LlavaForConditionalGeneration`, with any tower in `vzip.tap.TOWER_LAYOUTS`."""

    model_type: ClassVar[str] = "llava"
    model_class: ClassVar[type] = LlavaForConditionalGeneration
    original: ClassVar[Any] = original

    def original_config(self, processor: Any) -> dict[str, Any] | None:
        return export_config(self.model.config, processor)

    def num_processed_tokens(self, reducer: Reducer, kind: str, inputs: MediaInputs, index: int) -> int:
        """Count by the picture's own size: some towers take other sizes than their usual one."""
        # The processor's pixels decide, because the tower cuts whatever size it gets into patches.
        config = self.model.config
        patch_size = config.vision_config.patch_size
        height, width = inputs.pixels[index].shape[-2:]
        num_rows = height // patch_size
        num_columns = width // patch_size
        return reducer.num_tokens(
            num_rows * num_columns,
            has_cls=self.has_cls,
            num_dropped=num_dropped_tokens(config),
        )
