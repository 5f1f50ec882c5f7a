"""From the model's settings to a model with its starting projector in float32, and its processor."""

from collections.abc import Callable
from typing import Any

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from data.paths import data_dir
from vzip import UserError
from vzip.families import Family
from vzip.io import load_weights

PREPARE = "run `make data` to prepare the embedded default and the tiny models"
CONNECT = "connect to the hub once, or set model.id to a folder that holds the model"


def _found(load: Callable[..., Any], cfg: DictConfig, **settings: Any) -> Any:
    """What `load` finds at `model.id`. Raises UserError if that is nowhere."""
    try:
        return load(cfg.model.id, **settings)
    except OSError as error:
        hint = PREPARE if str(cfg.model.id).startswith(str(data_dir())) else CONNECT
        raise UserError(f"nothing to load at model.id={cfg.model.id}: {hint}\n({str(error).splitlines()[0]})") from error


def load_processor(cfg: DictConfig) -> Any:
    """The processor of the model at `model.id`, unreduced. Raises UserError if there is none."""
    return _found(get_class(cfg.model["_target_"]).load_processor, cfg)


def load_model(cfg: DictConfig) -> tuple[Family, Any]:
    """(family around the model, processor), on the CPU, in `model.dtype`, with the starting projector.

    Raises:
        UserError: no weights at `model.id`, or a `model.projector` that does not fit.
    """
    cls, dtype = get_class(cfg.model["_target_"]), getattr(torch, cfg.model.dtype)
    processor = load_processor(cfg)
    if cfg.weights == "random":
        torch.manual_seed(cfg.seed)
        model = cls.from_architecture(OmegaConf.to_container(cfg.model.architecture, resolve=True), dtype=dtype)
    else:
        model = _found(cls.load_model, cfg, dtype=dtype)
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
