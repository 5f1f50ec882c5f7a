"""Load the model of a run, with its starting projector in float32, and its processor."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from data.paths import data_dir
from train.config import build_reducers, family_class, tile_order
from train.hardware import best_device
from train.ranks import print_rank0
from vzip.cost import frozen_linears
from vzip.errors import UserError, check_package
from vzip.families import Family
from vzip.media import image_aspect_ratio, set_aspect_ratio
from vzip.runs.meta import META, read_meta
from vzip.runs.projector import load_weights

# In int8 products, inputs at least this large stay in float16 (arXiv 2208.07339).
OUTLIERS = 6.0


def load_family(cfg: DictConfig) -> tuple[Family, Any]:
    """Load the model on the CPU, in `model.dtype`, with its starting projector in float32.

    Returns:
        (family around the model, its processor)

    Raises:
        UserError: no weights at `model.id`, a `model.projector` or a budget that does not fit, or a
            missing package for `quantize`.
    """
    if cfg.quantize:
        check_package("bitsandbytes", extra="quantized", purpose=f"quantize={cfg.quantize}")

    # The processor comes first: it loads at once, and shows whether the model is there.
    processor = load_unreduced_processor(cfg)

    # Random weights are for benchmarks and dry runs: they need no download.
    cls = family_class(cfg)
    if cfg.weights == "random":
        torch.manual_seed(cfg.seed)
        model = _build_model(cfg)
    else:
        model = _load_from_id(cls.load_model, cfg, dtype=getattr(torch, cfg.model.dtype))

    # The starting projector is the base model's own, or one from a file. It is tuned in float32,
    # because AdamW's small steps would round away in bf16.
    family: Family = cls(model, anyres=tile_order(cfg))
    family.read_processor(processor)
    family.projector.float()
    if cfg.model.projector and cfg.weights == "pretrained":
        load_weights(family, cfg.model.projector)
        _name_other_pictures(cfg, processor)

    # A budget that does not fit this model should show before any other work.
    for reducer in build_reducers(cfg):
        family.check_reducer(reducer)
    return family, processor


def _name_other_pictures(cfg: DictConfig, processor: Any) -> None:
    """Print a line if the starting projector was tuned with another `image_aspect_ratio`."""
    folder = Path(cfg.model.projector).expanduser().parent
    if not (folder / META).is_file():
        return

    tuned_with = read_meta(folder).get("image_aspect_ratio")
    ratio = image_aspect_ratio(processor)
    if tuned_with not in (None, ratio):
        print_rank0(
            f"model.projector={cfg.model.projector} was tuned with image_aspect_ratio={tuned_with}, and this "
            f"run has {ratio}: it has to adapt to other pictures too"
        )


def load_unreduced_processor(cfg: DictConfig) -> Any:
    """Load the processor at `model.id`, which counts all visual tokens.

    It pads pictures if `model.image_aspect_ratio` says so.

    Raises:
        UserError: nothing is there, or the processor can't pad.
    """
    processor = _load_from_id(family_class(cfg).load_processor, cfg)
    own_ratio = image_aspect_ratio(processor)

    # Padding shows the model other pictures than the saved processor does, so say it.
    ratio = cfg.model.get("image_aspect_ratio")
    set_aspect_ratio(processor, ratio)
    if ratio is not None and ratio != own_ratio:
        print_rank0(f"model.image_aspect_ratio={ratio}: the processor at {cfg.model.id} has {own_ratio}")
    return processor


def _load_from_id(load: Callable[..., Any], cfg: DictConfig, **settings: Any) -> Any:
    """Call `load` on `model.id`. Raises UserError, with what to do, if nothing is there."""
    try:
        return load(cfg.model.id, **settings)
    except OSError as error:
        # What helps depends on where the model should have come from: `make data`, or the hub.
        is_prepared_here = str(cfg.model.id).startswith(str(data_dir()))
        if is_prepared_here:
            advice = "run `make data` to prepare the embedded default and the tiny models"
        else:
            advice = "connect to the hub once, or set model.id to a folder that holds the model"
        reason = str(error).splitlines()[0]
        raise UserError(f"nothing to load at model.id={cfg.model.id}: {advice}\n({reason})") from error


def _build_model(cfg: DictConfig) -> Any:
    """Build the model of `model.architecture`, in `model.dtype`, with random weights."""
    architecture = OmegaConf.to_container(cfg.model.architecture, resolve=True)
    cls = family_class(cfg)
    return cls.from_architecture(architecture, dtype=getattr(torch, cfg.model.dtype))


def count_model(cfg: DictConfig) -> Family:
    """Build the model on the meta device, without memory, to count parameters and FLOPs."""
    # The projector is in float32, as in training, so that its bytes are counted right.
    with torch.device("meta"):
        family: Family = family_class(cfg)(_build_model(cfg), anyres=tile_order(cfg))
        family.projector.float()
    return family


def quantize_language_model(family: Family, quantize: str | None) -> None:
    """Quantize the frozen linear layers of the language model, on the device where they will run.

    Call it after the fingerprint was taken, because a tuned projector belongs to the model as it
    was, and after LoRA was added, because LoRA weights stay in float32.

    Args:
        family: the adapter around the model.
        quantize: "nf4" for 4 bits, "int8" for 8 bits; None does nothing.
    """
    if quantize is None:
        return

    # bitsandbytes would warn at each int8 product that the inputs are cast to float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    # The layers are replaced while they are listed, so list them first.
    make_layer = _nf4_layer if quantize == "nf4" else _int8_layer
    device = best_device()
    for name, layer in list(frozen_linears(family)):
        quantized = make_layer(layer)
        quantized.bias = layer.bias
        family.language_model.set_submodule(name, quantized.to(device))

    print_rank0(
        f"quantize={quantize}: the language model is quantized, and gradients are no longer those "
        f"of the exact model"
    )


def _nf4_layer(layer: nn.Linear) -> Any:
    """Make the layer in 4 bits. bitsandbytes quantizes the weight when it moves to a device."""
    import bitsandbytes

    # On the meta device, because the weight is replaced below: this saves a copy.
    quantized = bitsandbytes.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    quantized.weight = bitsandbytes.nn.Params4bit(
        layer.weight.data, requires_grad=False, quant_type="nf4", module=quantized
    )
    return quantized


def _int8_layer(layer: nn.Linear) -> Any:
    """Make the layer in 8 bits. bitsandbytes quantizes the weight when it moves to a device."""
    import bitsandbytes

    # Without float16 weights, because these are frozen. Large inputs skip the quantization.
    quantized = bitsandbytes.nn.Linear8bitLt(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        has_fp16_weights=False,
        threshold=OUTLIERS,
        device="meta",
    )
    quantized.weight = bitsandbytes.nn.Int8Params(
        layer.weight.data, requires_grad=False, has_fp16_weights=False
    )
    return quantized
