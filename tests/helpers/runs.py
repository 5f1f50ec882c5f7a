"""Finished runs of tiny models, written without training."""

import json
from dataclasses import asdict

import torch

import vzip
from tests.helpers import tiny
from vzip.families import families
from vzip.runs.meta import META
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
