"""What a family adapter tells the rest: where the parts of a VLM are, and how many tokens an image takes."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from vzip.errors import UserError
from vzip.reducers.base import Reducer, Reduction


class Family:
    """Adapter of one VLM family of `transformers`, around one model. A subclass in this folder is found by `model_type`.

    Args:
        model: the conditional-generation model.
    """

    model_type: ClassVar[str]
    """`config.model_type` of the models that the family takes."""
    model_class: ClassVar[type]
    """Their class in `transformers`."""
    projector_name: ClassVar[str]
    """Name of the projector among the model's modules."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @classmethod
    def load_model(cls, path: str, *, dtype: torch.dtype) -> Any:
        """The model of a folder or a hub id, on the CPU. Raises OSError where there is neither."""
        raise NotImplementedError

    @classmethod
    def refuse_other_kind(cls, path: str) -> None:
        """Raises UserError for a folder or hub id of another family, and OSError for one without a config.

        `transformers` only warns, and builds a model of this family's default size.
        """
        config = PreTrainedConfig.get_config_dict(path)[0]
        if not config:
            raise OSError(f"{path} has no config.json")
        kind = config.get("model_type")
        if kind != cls.model_type:
            raise UserError(f"{path} holds a model of type {kind!r}, not {cls.model_type!r}; give one of that family")

    @classmethod
    def load_processor(cls, path: str) -> Any:
        """Its processor, unreduced. Raises OSError as above."""
        raise NotImplementedError

    @classmethod
    def from_architecture(cls, architecture: dict[str, Any], *, dtype: torch.dtype) -> Any:
        """The model with random weights, on torch's default device ("meta" for counting)."""
        raise NotImplementedError

    @property
    def tower(self) -> nn.Module:
        raise NotImplementedError

    @property
    def language_model(self) -> nn.Module:
        raise NotImplementedError

    @property
    def lm_head(self) -> nn.Module:
        raise NotImplementedError

    @property
    def num_layers_run(self) -> int:
        """Layers of the tower up to the tapped one; those after it are not run."""
        raise NotImplementedError

    @property
    def projector(self) -> nn.Module:
        module: nn.Module = self.model.get_submodule(self.projector_name)
        return module

    def num_image_tokens(self, reducer: Reducer, image_size: tuple[int, int] | None = None) -> int:
        """Placeholders that one image of (height, width) pixels takes. Raises UserError if the budget does not fit."""
        raise NotImplementedError

    def num_processed_tokens(self, reducer: Reducer, image_inputs: dict[str, Any], index: int) -> int:
        """The same for image `index` of what the image processor returned."""
        raise NotImplementedError

    def refuse_unfit(self, reducer: Reducer) -> None:
        """Raises UserError, before any work, if the budget does not fit an image or the tower has no such layer."""
        self.num_image_tokens(reducer)
        _ = self.num_layers_run

    def reduce(self, reducer: Reducer, pixel_values: Tensor, **kwargs: Any) -> Reduction:
        """The reducer's output for float[B, 3, height, width], before the projector."""
        raise NotImplementedError

    def install(self, reducer: Reducer) -> None:
        """Make this model instance reduce its images. `uninstall` takes it back."""
        raise NotImplementedError

    def uninstall(self) -> None:
        raise NotImplementedError
