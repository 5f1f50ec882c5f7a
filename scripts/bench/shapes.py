"""The models of the benchmarks: shapes of configs/model, or fractions, with random weights."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from omegaconf import OmegaConf
from torch import nn

from train.config import compose_settings, family_class
from vzip.families import Family
from vzip.reducers.visionzip import VisionZip

# Divisors of the sizes of LLaVA-1.5-7B for the shape "tiny". Heads keep their width.
TINY_DIVISORS = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}

# A head of 32,000 tokens is 1/50 of a 7B model's work for a token. It would be half of the work of
# the tiny model.
TINY_VOCABULARY = 512

# At the tiny width, this spread of the weights makes outputs as large as 0.02 does at 4,096.
TINY_INITIALIZER_RANGE = 0.08


@dataclass(frozen=True)
class Shape:
    """A model to measure, with its budget and its batches."""

    name: str
    family: type[Family]
    architecture: dict[str, Any]
    budget: int
    dtype: torch.dtype = torch.bfloat16
    batch_size: int = 128
    """Examples of a step."""
    micro: int = 16
    """Examples of a micro batch of the reference path."""

    @property
    def reducer(self) -> VisionZip:
        """VisionZip with the budget, which counts the tokens of several tiles together."""
        return VisionZip(budget=self.budget, tiles=self.family.budget_tiles)

    def with_layers(self, num_layers: int) -> Self:
        """Return the same shape with another number of layers in the language model."""
        text = self.architecture["text_config"] | {"num_hidden_layers": num_layers}
        return replace(self, architecture=self.architecture | {"text_config": text})


def shape_of(name: str) -> Shape:
    """Return the shape "tiny", or the shape of configs/model/NAME.yaml."""
    if name == "tiny":
        return tiny_shape()

    cfg = compose_settings(f"model={name}")
    model = cfg.model
    return Shape(
        name,
        family=family_class(cfg),
        architecture=OmegaConf.to_container(model.architecture),
        budget=model.budget,
        dtype=getattr(torch, model.dtype),
    )


def tiny_shape() -> Shape:
    """Make a LLaVA-1.5 for a CPU, in the proportions of the 7B model.

    Steps and micro batches have half as many examples, so that the share of padding stays the same.
    """
    # Dividing all sizes alike keeps the proportions of vision tower and language model.
    large = shape_of("llava-7b")
    architecture = shrink(large.architecture, TINY_DIVISORS)

    # Only the vocabulary and the spread of the weights don't follow the divisors.
    architecture["image_token_index"] = TINY_VOCABULARY - 1
    architecture["text_config"] |= {
        "vocab_size": TINY_VOCABULARY,
        "initializer_range": TINY_INITIALIZER_RANGE,
    }
    return replace(large, name="tiny", architecture=architecture, batch_size=64, micro=8)


def shrink(architecture: Mapping[str, Any], divisors: Mapping[str, int]) -> dict[str, Any]:
    """Divide the sizes in a model's config by the divisors of their names."""
    # The configs of tower and language model lie inside, so go down into them.
    small = {}
    for name, value in architecture.items():
        if isinstance(value, Mapping):
            small[name] = shrink(value, divisors)
        elif name in divisors:
            small[name] = value // divisors[name]
        else:
            small[name] = value
    return small


def random_family(shape: Shape, *, device: torch.device, dtype: torch.dtype) -> Family:
    """Make a shape's model on the device, with frozen random weights."""
    # The weights are made on the device at once: a copy of 7B on the CPU would take minutes.
    torch.manual_seed(0)
    with torch.device(device):
        model = shape.family.from_architecture(shape.architecture, dtype=dtype)
    return shape.family(model.requires_grad_(False))


def tunable_family(shape: Shape, *, device: torch.device, dtype: torch.dtype) -> Family:
    """Make a shape's model for tuning: only the projector learns, in float32."""
    family = random_family(shape, device=device, dtype=dtype)
    sharpen_attention(family.tower)
    family.projector.float().requires_grad_(True)
    return family


@torch.no_grad()
def sharpen_attention(tower: nn.Module) -> None:
    """Draw the weights of queries and keys so that attention is as uneven as in a trained tower.

    With the usual random weights attention is almost uniform, and rounding would choose the most
    salient patches.
    """
    # A query or key of a normalized token gets the variance 2.5. Then the 54 most salient of
    # ViT-L's 576 patches have 59 % of the attention that CLS gives to patches.
    config: Any = tower.config
    for name, parameter in tower.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.normal_(std=(2.5 / config.hidden_size) ** 0.5)
