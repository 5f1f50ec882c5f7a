"""Finished runs with LoRA, which need the recipe's own packages."""

import torch
from omegaconf import OmegaConf

from tests.helpers.runs import attached, edit_meta, projector_of, save_run
from train.trainable import make_trainable
from vzip.runs.meta import ADAPTER, read_meta
from vzip.runs.projector import fingerprint, save_checkpoint


def save_lora_run(folder, base, target):
    """Write a run with LoRA that is not zero, as training does; returns the folder."""
    handle = attached(base)
    family = handle.family
    base_fingerprint = fingerprint(family)
    lora = {"target": target, "r": 4, "alpha": 8}
    tuned = make_trainable(family, OmegaConf.create({"projector": target == "language_model", "lora": lora}))
    with torch.no_grad():
        for parameter in tuned.parameters.values():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    tuned.peft_model.save_pretrained(folder / ADAPTER)

    # LoRA is not part of the projector's file.
    projector = {}
    for name, value in projector_of(handle).items():
        if "lora_" not in name:
            projector[name.replace(".base_layer", "")] = value
    save_run(folder, handle, base, adapter=True, trained=list(tuned.parameters))
    save_checkpoint(folder, projector, read_meta(folder))
    edit_meta(folder, lambda meta: meta["base"].update(fingerprint=base_fingerprint))
    return folder
