"""From the model's settings to a model with its starting projector in float32, and its processor."""

from typing import Any

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from vzip import UserError
from vzip.families import Family
from vzip.io import load_weights


def _from_pretrained(cls: type[Family], cfg: DictConfig, dtype: torch.dtype) -> tuple[Any, Any]:
    try:
        return cls.from_pretrained(cfg.model.id, dtype=dtype)
    except OSError as error:
        hint = (
            "run `make data` to prepare the embedded default"
            if cfg.model.name == "smol"
            else (
                "connect to the hub once, or set model.id to a folder that holds the model; weights=random builds it untrained"
            )
        )
        raise UserError(f"no weights for model.id={cfg.model.id}: {hint}\n({str(error).splitlines()[0]})") from error


def load_model(cfg: DictConfig) -> tuple[Family, Any]:
    """(family around the model, processor), on the CPU, in `model.dtype`, with the starting projector.

    Raises:
        UserError: no weights at `model.id`, or a `model.projector` that does not fit.
    """
    cls, dtype = get_class(cfg.model["_target_"]), getattr(torch, cfg.model.dtype)
    if cfg.weights == "random":
        torch.manual_seed(cfg.seed)
        model = cls.from_architecture(OmegaConf.to_container(cfg.model.architecture, resolve=True), dtype=dtype)
        processor = None
    else:
        model, processor = _from_pretrained(cls, cfg, dtype)
    family = cls(model)
    family.projector.float()
    if cfg.model.projector and cfg.weights == "pretrained":
        load_weights(family, cfg.model.projector)
    return family, processor


def count_model(cfg: DictConfig) -> Family:
    """The model without memory, on the meta device: for counting."""
    with torch.device("meta"):
        cls = get_class(cfg.model["_target_"])
        architecture = OmegaConf.to_container(cfg.model.architecture, resolve=True)
        return cls(cls.from_architecture(architecture, dtype=getattr(torch, cfg.model.dtype)))
