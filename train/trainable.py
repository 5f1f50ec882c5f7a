"""Freezing: everything is frozen first, then an allow-list of parameters is opened and checked."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn

from vzip.families import Family


@dataclass(frozen=True)
class Trainable:
    """The parameters that are tuned.

    Attributes:
        parameters: by name, in float32.
        in_language: whether some of them are in the language model, which also learns from examples
            without a picture.
        peft_model: the model as peft wraps it, if there is LoRA.
    """

    parameters: dict[str, nn.Parameter]
    in_language: bool = False
    peft_model: Any = None

    @property
    def num_parameters(self) -> int:
        """How many numbers are tuned."""
        return sum(parameter.numel() for parameter in self.parameters.values())


def make_trainable(family: Family, tune: DictConfig, *, seed: int = 0) -> Trainable:
    """Freeze the model, then open the projector, LoRA weights, or both.

    Args:
        family: the adapter around the model.
        tune: the config group `tune`.
        seed: seed of LoRA's first weights.
    """
    # LoRA comes first, because it adds parameters that are opened below.
    peft_model = _add_lora(family, tune.lora, seed=seed) if tune.lora else None

    # Freeze everything, then open what is on the list.
    family.model.requires_grad_(False)
    opened = {}
    for name, parameter in family.model.named_parameters():
        is_lora = "lora_" in name
        is_tuned_projector = tune.projector and name.startswith(family.projector_names)
        if is_lora or is_tuned_projector:
            parameter.requires_grad_(True)

            # In float32 even in a float64 model: DeepSpeed supports no higher precision.
            parameter.data = parameter.data.float()
            opened[name] = parameter

    # Check that nothing else is trainable, whatever peft did.
    assert opened
    for name, parameter in family.model.named_parameters():
        assert parameter.requires_grad == (name in opened), name

    # LoRA in the language model also learns from examples without a picture.
    in_language = any(parameter.requires_grad for parameter in family.language_model.parameters())
    return Trainable(opened, in_language, peft_model)


def _add_lora(family: Family, lora: DictConfig, *, seed: int) -> Any:
    """Add LoRA to the linear layers of the projector or of the language model.

    Returns:
        the model as peft wraps it
    """
    from peft import LoraConfig, get_peft_model

    # Find the linear layers of the part that LoRA adapts.
    target = family.projector if lora.target == "projector" else family.language_model
    targets = {id(module) for module in target.modules() if isinstance(module, nn.Linear)}

    # Full names, so that no other module can match.
    names = [name for name, module in family.model.named_modules() if id(module) in targets]
    pattern = "|".join(re.escape(name) for name in names)

    # peft draws the first matrix of each layer at random, so the seed makes runs repeatable.
    torch.manual_seed(seed)
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=pattern)
    return get_peft_model(family.model, config)


def print_trainable(family: Family, trainable: Trainable) -> None:
    """Print one line for each part of the model: frozen or trainable, with parameter counts."""
    parts = {
        **family.frozen_parts,
        "projector": family.projector,
        "language model": family.language_model,
    }

    # A tied head shares the weights of the embeddings, which count in the language model too.
    is_tied = family.lm_head.weight is family.model.get_input_embeddings().weight
    parts["head (tied)" if is_tied else "head"] = family.lm_head

    table = Table("part", "state", title="trainable parts", title_justify="left")
    table.add_column("parameters", justify="right")
    table.add_column("trainable", justify="right")
    # A part is trainable if any of its parameters is: with LoRA, most of them are frozen.
    for title, module in parts.items():
        num_total = 0
        num_trainable = 0
        for parameter in module.parameters():
            num_total += parameter.numel()
            if parameter.requires_grad:
                num_trainable += parameter.numel()
        state = "[TRAINABLE]" if num_trainable else "[Frozen]"
        table.add_row(title, state, f"{num_total:,}", f"{num_trainable:,}")

    # Without markup, because rich would read "[Frozen]" as the name of a style.
    console = Console(markup=False)
    console.print(table)
    num_tensors = len(trainable.parameters)
    console.print(f"{trainable.num_parameters:,} trainable parameters in {num_tensors} tensors")
