"""How the models and processors of a family are loaded, or built without weights."""

import copy
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import torch

from vzip.checkpoints import hf
from vzip.checkpoints.shards import read_config
from vzip.errors import UserError


class Loading:
    """The part of a family that makes its models. `vzip.families.base.Family` is built on it."""

    model_type: ClassVar[str]
    """`config.model_type` of the models that the family takes."""
    model_class: ClassVar[type]
    """The class of these models."""
    original: ClassVar[Any] = None
    """Module of `vzip.checkpoints.original` for folders of the model's own code; None without."""

    model: Any
    """The conditional-generation model."""

    @classmethod
    def load_model(cls, path: str, *, dtype: torch.dtype) -> Any:
        """Load the model of a folder or hub id, on the CPU.

        Raises:
            OSError: no such folder or hub id, or no config.json in it.
            UserError: a broken file, a model of another family, or missing weights, of which
                `transformers` only warns.
        """
        config = read_config(path)
        if cls.original is not None and cls.original.is_original(config):
            return cls.original.load_model(path, dtype=dtype)

        # transformers would load another family's weights and only warn that none of them fit.
        model_type = config.get("model_type")
        if model_type != cls.model_type:
            raise UserError(
                f"{path} holds a model of type {model_type!r}, not {cls.model_type!r}; "
                f"give one of that family"
            )
        return hf.load_hf_model(cls.model_class, path, dtype=dtype)

    @classmethod
    def load_processor(cls, path: str) -> Any:
        """Load the processor, which counts all tokens. Raises the same errors as `load_model`."""
        if cls.original is not None and cls.original.is_original(read_config(path)):
            return cls.original.load_processor(path)
        return hf.load_hf_processor(path)

    @classmethod
    def from_architecture(cls, architecture: dict[str, Any], *, dtype: torch.dtype) -> Any:
        """Build the model with random weights, on torch's default device ("meta" for counting)."""
        model_class: Any = cls.model_class
        return model_class._from_config(model_class.config_class(**architecture), dtype=dtype).eval()

    def read_processor(self, processor: Any) -> None:
        """Take over the settings of a processor that decide how many tokens a picture has."""

    def without_weights(self) -> Self:
        """Return an adapter around the config alone, which counts tokens in a data worker."""
        bare = copy.copy(self)
        bare.model = SimpleNamespace(config=self.model.config)
        return bare

    def original_config(self, processor: Any) -> dict[str, Any] | None:
        """Return `config.json` for the model's own code; None if that can't load the model."""
        return None
