"""What is tuned: everything is frozen first, then an allow-list of names is opened, logged and checked."""

import re
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn

from vzip.families import Family


@dataclass(frozen=True)
class Trainable:
    """What is tuned.

    Attributes:
        parameters: the tuned ones, by name.
        in_language: whether some of them are in the language model, so that text without a picture teaches them too.
        peft_model: peft's wrapper where there is LoRA.
    """

    parameters: dict[str, nn.Parameter]
    in_language: bool = False
    peft_model: Any = None

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())


def _add_lora(family: Family, lora: DictConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    target = family.projector if lora.target == "projector" else family.language_model
    linears = {id(module) for module in target.modules() if isinstance(module, nn.Linear)}
    names = [name for name, module in family.model.named_modules() if id(module) in linears]
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules="|".join(re.escape(name) for name in names),  # full names: no other module can match
    )
    return get_peft_model(family.model, config)


def make_trainable(family: Family, tune: DictConfig) -> Trainable:
    """Freeze the model, then open the projector, LoRA weights, or both, as `tune` says."""
    peft_model = _add_lora(family, tune.lora) if tune.lora else None
    family.model.requires_grad_(False)
    opened = {}
    for name, parameter in family.model.named_parameters():
        if "lora_" in name or (tune.projector and name.startswith(family.projector_name)):
            parameter.requires_grad_(True)
            parameter.data = (
                parameter.data.float()
            )  # whatever the model's precision: DeepSpeed takes nothing higher
            opened[name] = parameter
    assert opened and all(p.requires_grad == (name in opened) for name, p in family.model.named_parameters())
    in_language = any(parameter.requires_grad for parameter in family.language_model.parameters())
    return Trainable(opened, in_language, peft_model)


def print_trainable(family: Family, trainable: Trainable) -> None:
    """One line a part of the model, frozen or trainable, with counts, and the trainable tensors."""
    table = Table("part", "state", "parameters", "trainable", title="what is tuned", title_justify="left")
    parts = family.frozen_parts | {"projector": family.projector, "language model": family.language_model}
    tied = family.lm_head.weight is family.model.get_input_embeddings().weight
    parts["head (tied)" if tied else "head"] = family.lm_head
    for title, module in parts.items():
        opened = [p for p in module.parameters() if p.requires_grad]
        total, tuned = sum(p.numel() for p in module.parameters()), sum(p.numel() for p in opened)
        table.add_row(title, "[TRAINABLE]" if tuned else "[Frozen]", f"{total:,}", f"{tuned:,}")
    table.columns[2].justify = table.columns[3].justify = "right"
    console = Console(markup=False)
    console.print(table)
    console.print(f"{trainable.num_parameters:,} trainable parameters in {len(trainable.parameters)} tensors")
