"""From the model's settings to a model with its starting projector in float32, and its processor."""

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from data.paths import data_dir
from train.ranks import print_rank0
from vzip import UserError
from vzip.cost import frozen_linears
from vzip.families import Family
from vzip.runs.projector import load_weights

PREPARE = "run `make data` to prepare the embedded default and the tiny models"
OUTLIERS = 6.0
"""Inputs at least as large stay in float16 in int8 products (arXiv 2208.07339)."""
CONNECT = "connect to the hub once, or set model.id to a folder that holds the model"


def _found(load: Callable[..., Any], cfg: DictConfig, **settings: Any) -> Any:
    """What `load` finds at `model.id`. Raises UserError if that is nowhere."""
    try:
        return load(cfg.model.id, **settings)
    except OSError as error:
        hint = PREPARE if str(cfg.model.id).startswith(str(data_dir())) else CONNECT
        raise UserError(
            f"nothing to load at model.id={cfg.model.id}: {hint}\n({str(error).splitlines()[0]})"
        ) from error


def load_unreduced_processor(cfg: DictConfig) -> Any:
    """The processor of the model at `model.id`, unreduced. Raises UserError if there is none."""
    return _found(get_class(cfg.model["_target_"]).load_processor, cfg)


def load_family(cfg: DictConfig) -> tuple[Family, Any]:
    """(family around the model, processor), on the CPU, in `model.dtype`, with the starting projector.

    Raises:
        UserError: no weights at `model.id`, a `model.projector` that does not fit, or no package for `quantize`.
    """
    if cfg.quantize and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"quantize={cfg.quantize} needs a package that is not there; `pip install bitsandbytes`, or quantize=null"
        )
    cls, dtype = get_class(cfg.model["_target_"]), getattr(torch, cfg.model.dtype)
    processor = load_unreduced_processor(cfg)
    if cfg.weights == "random":
        torch.manual_seed(cfg.seed)
        model = cls.from_architecture(
            OmegaConf.to_container(cfg.model.architecture, resolve=True), dtype=dtype
        )
    else:
        model = _found(cls.load_model, cfg, dtype=dtype)
    family = cls(model)
    family.projector.float()
    if cfg.model.projector and cfg.weights == "pretrained":
        load_weights(family, cfg.model.projector)
    return family, processor


def quantize_language_model(family: Family, quantize: str | None) -> None:
    """Hold the language model's frozen linear layers in 4 bits ("nf4") or 8 ("int8"), where they will run; None does nothing.

    Take the model's fingerprint, and open what is tuned, before: a projector tuned this way belongs to the model as it was.
    """
    if quantize is None:
        return
    import bitsandbytes

    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # it warns at each product that int8 goes through float16
    for name, layer in list(frozen_linears(family)):
        shape, settings = (
            (layer.in_features, layer.out_features),
            {"bias": layer.bias is not None, "device": "meta"},
        )
        if quantize == "nf4":
            held = bitsandbytes.nn.Linear4bit(
                *shape, compute_dtype=layer.weight.dtype, quant_type="nf4", **settings
            )
            held.weight = bitsandbytes.nn.Params4bit(
                layer.weight.data, requires_grad=False, quant_type="nf4", module=held
            )
        else:
            held = bitsandbytes.nn.Linear8bitLt(
                *shape, has_fp16_weights=False, threshold=OUTLIERS, **settings
            )
            held.weight = bitsandbytes.nn.Int8Params(
                layer.weight.data, requires_grad=False, has_fp16_weights=False
            )
        held.bias = layer.bias
        family.language_model.set_submodule(name, held.to("cuda" if torch.cuda.is_available() else "cpu"))
    print_rank0(
        f"quantize={quantize}: the language model is quantised, and gradients are no longer those of the exact model"
    )


def count_model(cfg: DictConfig) -> Family:
    """The model without memory, on the meta device: for counting."""
    with torch.device("meta"):
        cls = get_class(cfg.model["_target_"])
        architecture = OmegaConf.to_container(cfg.model.architecture, resolve=True)
        dtype = getattr(torch, cfg.model.dtype)
        family: Family = cls(cls.from_architecture(architecture, dtype=dtype))
        family.projector.float()
    return family
