"""The LoRA of a run: read, checked and put into its model.

peft takes the layers that LoRA adapts from a regular expression in `adapter_config.json`. One that
a stranger wrote may take for ever, and other settings in the file name other files. So only the few
settings that a run writes are taken, and the layers have to be those of the weights.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vzip.checkpoints.shards import check_all_finite, read_tensors
from vzip.errors import UserError, check_package
from vzip.families import Family
from vzip.files import read_json_object
from vzip.runs.meta import ADAPTER, ADAPTER_WEIGHTS, check_sum
from vzip.runs.schema import COUNT, NUMBER, TEXT, check_entries

CONFIG_FILE = "adapter_config.json"

_REQUIRED = {"peft_type": TEXT, "target_modules": TEXT, "r": COUNT, "lora_alpha": NUMBER}
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "task_type",
}
"""Entries that say where the adapter comes from, and change nothing when it is loaded."""

_ADVICE = "copy the whole run again, or tune again"
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
"""Name of a tensor of LoRA, as peft writes it."""


def load_adapter(family: Family, folder: Path, meta: Mapping[str, Any]) -> Any:
    """Put the LoRA of a run into its model, in place, and return peft's model around it.

    Args:
        family: the run's model, without LoRA.
        folder: the run's folder.
        meta: its meta.json.

    Raises:
        UserError: peft is not installed, or the adapter is damaged, or is not what a run writes.
    """
    check_package("peft", extra="train", purpose=f"loading the LoRA weights in {folder / ADAPTER}")
    from peft import PeftModel

    weights = folder / ADAPTER / ADAPTER_WEIGHTS
    tensors = read_tensors(weights)
    config = _config(family, folder, tensors)
    check_all_finite(tensors, source=str(weights), advice=_ADVICE)
    check_sum(folder, meta, f"{ADAPTER}/{ADAPTER_WEIGHTS}")

    # With a configuration, peft does not read the file.
    return PeftModel.from_pretrained(family.model, str(folder / ADAPTER), config=config)


def _config(family: Family, folder: Path, tensors: Mapping[str, Tensor]) -> Any:
    """Make peft's configuration from the file and the names of the weights."""
    from peft import LoraConfig

    path = folder / ADAPTER / CONFIG_FILE
    entries = read_json_object(path, advice=_ADVICE)
    check_entries(entries, _REQUIRED, source=path, advice=_ADVICE)

    # Runs name the layers in full. The names are compared as texts, and never matched.
    names = _adapted_layers(family, tensors, path, rank=entries["r"])
    pattern = "|".join(re.escape(name) for name in names)
    config = LoraConfig(r=entries["r"], lora_alpha=entries["lora_alpha"], target_modules=pattern)

    # Another version of transformers may list the layers in another order.
    if set(entries["target_modules"].split("|")) != set(pattern.split("|")):
        raise UserError(f"{path}: target_modules are not the layers of the weights; {_ADVICE}")

    # JSON has no sets and no enums, so both sides are compared in JSON.
    expected = json.loads(json.dumps(config.to_dict(), default=list))
    expected["target_modules"] = entries["target_modules"]
    for key, value in entries.items():
        # An entry of another version of peft is accepted if it says nothing.
        is_default = value == expected[key] if key in expected else not value
        if key not in _WITHOUT_EFFECT and not is_default:
            raise UserError(f"{path}: {key} is not what a run writes; {_ADVICE}")
    return config


def _adapted_layers(family: Family, tensors: Mapping[str, Tensor], path: Path, *, rank: int) -> list[str]:
    """List the layers that the weights belong to, in the order of the model.

    Raises:
        UserError: the weights are not LoRA of this model with this rank.
    """
    parts: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or tensor.dim() != 2:
            raise UserError(f"{path.parent}: {name} is no part of LoRA; {_ADVICE}")

        # A is [r, inputs] and B is [outputs, r]. peft makes layers of the rank in its file.
        own_rank = tensor.shape[0] if match["part"] == "A" else tensor.shape[1]
        if own_rank != rank:
            raise UserError(f"{path}: r is {rank}, but {name} has the rank {own_rank}; {_ADVICE}")
        parts.setdefault(match["module"], set()).add(match["part"])

    linear = [name for name, module in family.model.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name in linear if parts.get(name) == {"A", "B"}]
    if len(names) < len(parts) or not names:
        raise UserError(f"{path.parent}: the weights are not those of LoRA in this model; {_ADVICE}")
    return names
