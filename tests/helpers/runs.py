"""Finished runs of tiny models, written without training."""

import json
from dataclasses import asdict

import torch
from omegaconf import OmegaConf

import vzip
from tests.helpers import tiny
from train.trainable import make_trainable
from vzip.families import families
from vzip.runs.meta import ADAPTER, META, read_meta
from vzip.runs.projector import fingerprint, projector_meta, projector_parameters, save_checkpoint
from vzip.templates.encode import vicuna

BUDGET = {"dominant": 4, "contextual": 2}
"""The reducer that `attached` attaches unless a test asks for another one."""


def family_class(kind="clip"):
    """The family of a kind in `tiny.KINDS`."""
    return families()[tiny.KINDS[kind][0]]


def attached(folder, kind="clip", *, dtype=torch.float32, **reducer):
    """The handle of a reducer on the model that is saved in `folder`."""
    model = family_class(kind).load_model(str(folder), dtype=dtype)
    return vzip.attach(model, **(reducer or BUDGET))


def projector_of(handle):
    """Copies of the projector's tensors, by their names in the model."""
    parameters = projector_parameters(handle.family)
    return {name: value.detach().clone() for name, value in parameters.items()}


def tune(handle, seed=1):
    """Change the projector's weights, as training would; returns the handle."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.family.projector.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return handle


def save_run(folder, handle, base, *other_reducers, **changes):
    """Write what a run writes at its end, with `changes` to its meta.json; returns the folder."""
    tensors = projector_of(handle)
    meta = projector_meta(
        handle.family,
        handle.reducer,
        *other_reducers,
        base=str(base),
        base_fingerprint=fingerprint(handle.family),
    )
    meta |= {
        "num_image_tokens": handle.num_image_tokens(),
        "template": asdict(vicuna()),
        "dtype": "float32",
        "adapter": False,
        "trained": list(tensors),
    }
    save_checkpoint(folder, tensors, meta | changes)
    return folder


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


def held_out_answer(image, question):
    """An entry of answers_SETTING.json."""
    rest = {"num_visual_tokens": 6, "expected": "yes", "answer": "no", "kind": "open", "correct": False}
    return {"image": image, "question": question, **rest}


def edit_meta(folder, change):
    """Call `change` with the content of a run's meta.json, and write the result."""
    meta = json.loads((folder / META).read_text())
    change(meta)
    (folder / META).write_text(json.dumps(meta))


@torch.no_grad()
def logits(model, processor):
    """float[1, T, V]: what a model says to a question about a picture that several tiles show."""
    inputs = processor(images=tiny.picture(3, 60, 100), text="<image>what is it?", return_tensors="pt")
    return model(**inputs).logits
