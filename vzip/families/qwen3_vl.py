"""Qwen3-VL: like Qwen2.5-VL, with attention over whole pictures, and features of several layers.

The outputs of some layers of the tower go through mergers of their own, and are added to the visual
tokens behind the first layers of the language model (*deepstack*). All mergers learn. A group is
selected or merged once, by the attention of the last layer, and in all of these layers alike.

Videos are not taken: the model writes the time of each step between the steps' tokens.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.models.qwen3_vl import modeling_qwen3_vl

from vzip.errors import UserError
from vzip.families.features import LanguageInputs, VisualFeatures
from vzip.families.patches import FramePatchProcessor
from vzip.families.qwen2_5_vl import Qwen25VL
from vzip.media import MediaInputs
from vzip.reducers.base import Reducer


class Qwen3Frames(FramePatchProcessor):
    """The part of the processor for videos, which is saved with it."""

    saved_type = "Qwen3VLVideoProcessor"


class Qwen3VL(Qwen25VL):
    """Adapter of `Qwen3VLForConditionalGeneration`. A budget counts the tokens of a picture."""

    model_type: ClassVar[str] = "qwen3_vl"
    model_class: ClassVar[type] = Qwen3VLForConditionalGeneration
    processor_class: ClassVar[type] = Qwen3VLProcessor
    frame_processor: ClassVar[type[FramePatchProcessor]] = Qwen3Frames
    frozen_names = {  # noqa: RUF012
        "vision tower": "model.visual.blocks",
        "patch embedding": "model.visual.patch_embed",
        "position embedding": "model.visual.pos_embed",
    }
    kinds: ClassVar[tuple[str, ...]] = ("image",)
    rotate: ClassVar[Any] = staticmethod(modeling_qwen3_vl.apply_rotary_pos_emb_vision)

    # ---- The parts of the model ----

    @property
    def projector_names(self) -> tuple[str, ...]:
        return ("model.visual.merger", "model.visual.deepstack_merger_list")

    @property
    def projector_modules(self) -> tuple[nn.Module, ...]:
        # The list of the other mergers is not run itself.
        merger, deepstack = super().projector_modules
        return (merger, *deepstack.children())

    # ---- Counts ----

    def num_video_tokens(self, reducer: Reducer, num_frames: int) -> int:
        raise UserError(
            f"videos of {self.model_type!r} models are not reduced, because text stands between their steps; "
            f"give images, or choose model=qwen2.5-vl-7b for videos"
        )

    def num_processed_tokens(self, reducer: Reducer, kind: str, inputs: MediaInputs, index: int) -> int:
        if kind == "video":
            return self.num_video_tokens(reducer, 1)
        return super().num_processed_tokens(reducer, kind, inputs, index)

    # ---- Layers of the tower ----

    @property
    def feature_layers(self) -> Sequence[int]:
        return (*super().feature_layers, *self.model.config.vision_config.deepstack_visual_indexes)

    @property
    def full_layers(self) -> Sequence[int]:
        return range(self.model.config.vision_config.depth)

    def group_order(self, grids: Tensor) -> Tensor:
        return torch.arange(int(grids.prod(dim=1).sum()) // self.merge**2)

    # ---- Deepstack ----

    def project_deep(self, features: VisualFeatures) -> tuple[Tensor, ...]:
        return tuple(self.merge_groups(features, number) for number in range(1, len(self.projector_modules)))

    def model_output(self, kind: str, features: VisualFeatures) -> Any:
        # The model wants the tokens of each image apart, also those of the other layers.
        output = super().model_output(kind, features)
        counts = features.counts.tolist()
        deep = [list(torch.split(tokens, counts)) for tokens in self.project_deep(features)]
        return modeling_qwen3_vl.BaseModelOutputWithDeepstackFeatures(
            pooler_output=output.pooler_output, deepstack_features=deep
        )

    def language_arguments(self, inputs: LanguageInputs) -> dict[str, Any]:
        # Text has zeros, so that all tokens can be added at once.
        everywhere = torch.ones(
            inputs.embeddings.shape[:-1], dtype=torch.bool, device=inputs.embeddings.device
        )
        return {
            **super().language_arguments(inputs),
            "visual_pos_masks": everywhere,
            "deepstack_visual_embeds": [values.flatten(0, -2) for values in inputs.added],
        }
