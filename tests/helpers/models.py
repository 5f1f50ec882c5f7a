"""What tests of models share: logits, hashes of weights, and traces that an attached reducer leaves."""

import hashlib

import torch

from vzip.families import family_of

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def with_labels(inputs):
    """Add labels: every token except padding."""
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def projector_gradients(model, inputs):
    """Gradients of the loss with respect to the projector's parameters."""
    model.zero_grad()
    model(**inputs).loss.backward()
    return [parameter.grad.clone() for parameter in family_of(model).projector.parameters()]


def train_projector(model, inputs, *, num_steps=5):
    """Train the projector on one batch: the losses of the steps. Everything else is frozen."""
    projector = family_of(model).projector
    model.requires_grad_(False)
    projector.requires_grad_(True)
    model.train()
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-2)
    losses = []
    for _ in range(num_steps):
        loss = model(**with_labels(inputs)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def digests(model):
    """sha256 of every parameter and buffer, by name."""
    by_name = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        values = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        by_name[name] = hashlib.sha256(values).hexdigest()
    return by_name


def marks(module):
    """List every hook in a module, and every attribute of an instance that hides a method of its class."""
    marks = []
    for name, part in module.named_modules():
        for key in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            marks += [(name, key)] * len(vars(part)[key])
        for key, value in vars(part).items():
            if callable(value) and hasattr(type(part), key):
                marks.append((name, key))
    return marks


def count_calls(module):
    """Return a list that grows by one entry with every forward of the module."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls
