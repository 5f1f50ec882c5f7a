"""Freezing: which parameters are tuned, and how LoRA starts."""

import pytest
import torch
from omegaconf import OmegaConf

from tests.helpers import tiny
from train.trainable import make_trainable, print_trainable
from vzip.families import family_of

LORA = {"r": 2, "alpha": 4}
GROUPS = {
    "projector": ({"projector": True, "lora": None}, {"multi_modal_projector"}, False),
    "both": (
        {"projector": True, "lora": {"target": "language_model", **LORA}},
        {"multi_modal_projector", "language_model"},
        True,
    ),
    "lora": ({"projector": False, "lora": {"target": "projector", **LORA}}, {"multi_modal_projector"}, False),
}
"""The group `tune`, where the trainable parameters are, and whether some are in the language model."""


def trainable_of(tune, *, seed=0, dtype=torch.bfloat16):
    family = family_of(tiny.llava(dtype=dtype))
    return family, make_trainable(family, OmegaConf.create(tune), seed=seed)


@pytest.mark.parametrize("name", GROUPS)
def test_the_trainable_parameters_are_in_float32_and_all_others_frozen(name, capsys):
    tune, parts, in_language = GROUPS[name]
    family, trainable = trainable_of(tune)
    assert {name.split(".")[1] for name in trainable.parameters} == parts
    assert trainable.in_language == in_language
    for name, parameter in family.model.named_parameters():
        assert parameter.requires_grad == (name in trainable.parameters)
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)

    print_trainable(family, trainable)
    shown = capsys.readouterr().out
    assert f"{trainable.num_parameters:,} trainable parameters" in shown
    assert ("[TRAINABLE]" in shown) and ("vision tower" in shown)


def test_lora_starts_from_the_seed():
    tune, *_ = GROUPS["both"]
    starts = []
    for seed in (0, 0, 1):
        torch.randn(seed + len(starts))  # whatever was drawn before
        _, trainable = trainable_of(tune, seed=seed)
        starts.append(torch.cat([value.flatten() for value in trainable.parameters.values()]))
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
