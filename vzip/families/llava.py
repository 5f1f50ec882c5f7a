"""LLaVA-1.5 and every other `LlavaForConditionalGeneration`: one square picture, one tower, a two-layer projector.

The seam is `LlavaModel.get_image_features` (transformers 5), which does tower -> layer -> projector: on an attached
model that one method is replaced, on the instance.
"""

import functools
import types
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vzip.errors import UserError
from vzip.families.base import Family
from vzip.reducers.base import Reducer, Reduction
from vzip.tap import layer_index, run_tower, tower_layout


def _num_dropped(config: Any) -> int:
    """LLaVA's "default" selection drops the first token, "full" keeps all."""
    return 1 if config.vision_feature_select_strategy == "default" else 0


def _reduce(inner: Any, reducer: Reducer, pixel_values: Tensor, feature_layer: int | None, **kwargs: Any) -> Reduction:
    tokens = run_tower(
        inner.vision_tower,
        pixel_values,
        feature_layer=inner.config.vision_feature_layer if feature_layer is None else feature_layer,
        num_dropped=_num_dropped(inner.config),
        attention=reducer.uses_attention,
        **kwargs,
    )
    return reducer(tokens)


class Llava(Family):
    """Adapter of `LlavaForConditionalGeneration`, with any vision tower in `vzip.tap.TOWER_LAYOUTS`."""

    model_type: ClassVar[str] = "llava"
    model_class: ClassVar[type] = LlavaForConditionalGeneration
    projector_name: ClassVar[str] = "model.multi_modal_projector"

    @classmethod
    def load_model(cls, path: str, *, dtype: torch.dtype) -> Any:
        cls.refuse_other_kind(path)
        return LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype).eval()

    @classmethod
    def load_processor(cls, path: str) -> Any:
        return AutoProcessor.from_pretrained(path)

    @classmethod
    def from_architecture(cls, architecture: dict[str, Any], *, dtype: torch.dtype) -> Any:
        config = LlavaConfig(**architecture)
        return LlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()

    @property
    def tower(self) -> nn.Module:
        tower: nn.Module = self.model.model.vision_tower
        return tower

    @property
    def language_model(self) -> nn.Module:
        language_model: nn.Module = self.model.model.language_model
        return language_model

    @property
    def lm_head(self) -> nn.Module:
        lm_head: nn.Module = self.model.lm_head
        return lm_head

    @property
    def num_layers_run(self) -> int:
        config = self.model.config
        return layer_index(config.vision_feature_layer, config.vision_config.num_hidden_layers) + 1

    def _num_tokens(self, reducer: Reducer, height: int, width: int) -> int:
        patch = self.model.config.vision_config.patch_size
        has_cls, num_dropped = tower_layout(self.tower).has_cls, _num_dropped(self.model.config)
        return reducer.num_tokens((height // patch) * (width // patch), has_cls=has_cls, num_dropped=num_dropped)

    def num_image_tokens(self, reducer: Reducer, image_size: tuple[int, int] | None = None) -> int:
        side = self.model.config.vision_config.image_size  # every picture is brought to one square
        return self._num_tokens(reducer, side, side)

    def num_processed_tokens(self, reducer: Reducer, image_inputs: dict[str, Any], index: int) -> int:
        height, width = image_inputs["pixel_values"][index].shape[-2:]
        return self._num_tokens(reducer, height, width)

    def reduce(self, reducer: Reducer, pixel_values: Tensor, **kwargs: Any) -> Reduction:
        return _reduce(self.model.model, reducer, pixel_values, feature_layer=None, **kwargs)

    def install(self, reducer: Reducer) -> None:
        inner = self.model.model
        if "get_image_features" in vars(inner):
            raise UserError("a reducer is attached to this model already; call detach() on its handle first")

        # `wraps` the class's function: generate() reads the signature. `self`, not `inner`, so that a deep copy is whole.
        @functools.wraps(type(inner).get_image_features)
        def get_image_features(self: Any, pixel_values: Tensor, vision_feature_layer: int | None = None, **kwargs: Any) -> Any:
            for handled in ("vision_feature_select_strategy", "image_sizes", "return_dict"):
                kwargs.pop(handled, None)
            reduction = _reduce(self, reducer, pixel_values, vision_feature_layer, **kwargs)
            dtype = next(self.multi_modal_projector.parameters()).dtype  # float32 master weights on a bf16 model
            projected = self.multi_modal_projector(reduction.features.to(dtype))
            return BaseModelOutputWithPooling(last_hidden_state=reduction.features, pooler_output=list(projected))

        inner.get_image_features = types.MethodType(get_image_features, inner)

    def uninstall(self) -> None:
        del self.model.model.get_image_features
