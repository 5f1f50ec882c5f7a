"""Models that are quantized: counted, close to the exact model, and still of the same base."""

import importlib.util
import sys

import pytest
import torch
from omegaconf import OmegaConf

from tests.helpers import tiny
from tests.helpers.configs import composed, counted
from train.models import load_family, quantize_language_model
from train.trainable import make_trainable
from vzip import UserError
from vzip.cost import example_cost, weight_memory
from vzip.families import families
from vzip.reducers.visionzip import VisionZip
from vzip.runs.projector import fingerprint


def test_quantized_weights_are_counted_without_the_package():
    family = counted("llava-13b")
    num_linear = 40 * (4 * 5120**2 + 3 * 5120 * 13824)
    exact = weight_memory(family)
    assert exact - weight_memory(family, quantize="int8") == num_linear
    assert exact - weight_memory(family, quantize="nf4") == pytest.approx((2 - 0.516) * num_linear, rel=1e-3)


def test_a_missing_package_is_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"quantize=nf4 needs .*pip install 'vzip\[quantized\]'"):
        load_family(composed("quantize=nf4", "model.id=/nowhere"))


NEAR = {"nf4": 0.5, "int8": 0.05}
"""Relative errors in a model of random weights, which 4 bits suit less than trained ones."""


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("quantize", NEAR)
@pytest.mark.parametrize(
    "lora", [None, {"target": "language_model", "r": 2, "alpha": 4}], ids=["projector", "lora"]
)
@pytest.mark.parametrize("kind", ["clip", "onevision"])
def test_a_quantized_model_is_close_to_the_exact_one(capsys, kind, lora, quantize):
    model = tiny.llava(kind)
    family = families()[tiny.KINDS[kind][0]](model)
    before = fingerprint(family)
    trainable = make_trainable(family, OmegaConf.create({"projector": True, "lora": lora}))
    features = torch.randn(1, 7, model.config.vision_config.hidden_size)
    direction = torch.randn(1, 7, 48)

    def counts():
        cost = example_cost(family, VisionZip(budget=6), num_tiles=1, num_visual_tokens=6, num_text_tokens=9)
        return cost, weight_memory(family, quantize=quantize)

    def outcome():
        """The output, and the gradients of the projector."""
        model.zero_grad()
        embeddings = family.projector(features)
        output = family.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        (output * direction).sum().backward()
        for parameter in trainable.parameters.values():
            assert parameter.grad is None or parameter.grad.isfinite().all()
        return [output.detach(), *(p.grad.clone() for p in family.projector.parameters())]

    exact = outcome()
    exact_counts = counts()
    quantize_language_model(family, quantize)
    assert f"quantize={quantize}: the language model is quantized" in capsys.readouterr().out

    quantized = outcome()
    assert not torch.equal(quantized[0], exact[0])
    for one, other in zip(quantized, exact, strict=True):
        assert torch.linalg.vector_norm(one - other) <= NEAR[quantize] * torch.linalg.vector_norm(other)

    # Only the trainable parameters move.
    frozen = {name: p.clone() for name, p in family.model.named_parameters() if not p.requires_grad}
    assert frozen.keys() == dict(family.model.named_parameters()).keys() - trainable.parameters.keys()
    torch.optim.AdamW(trainable.parameters.values(), lr=1.0).step()
    assert all(torch.equal(family.model.get_parameter(name), value) for name, value in frozen.items())

    # Counting does not change. The fingerprint does, which is why a run keeps the one from before.
    assert counts() == exact_counts
    assert fingerprint(family) != before
