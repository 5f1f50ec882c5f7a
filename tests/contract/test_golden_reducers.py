"""Selections of the authors' released code, for small random inputs with structure.

tests/golden/reducers/NAME holds `cases.json` and `cases.safetensors`, and `inputs/` what the cases
share. Each case says how it is compared: "exact"; "either", where the first pick is a true tie;
"overlap", where rounding decides; "never", where the released code misbehaves.
"""

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import GOLDEN
from vzip.reducers import VisionTokens, create

FOLDER = GOLDEN / "reducers"
METHODS = ("divprune", "fastervlm", "hiprune", "mmtok", "scope")


@dataclass
class Case:
    """One selection of the authors' code."""

    method: str
    settings: dict[str, Any]
    precision: str

    @property
    def compare(self):
        return self.settings["compare"][self.precision]

    def __str__(self):
        return f"{self.method}-{self.settings['name']}-{self.precision}"


@cache
def tensors(path):
    return load_file(FOLDER / f"{path}.safetensors")


def cases():
    for method in METHODS:
        for settings in json.loads((FOLDER / method / "cases.json").read_text())["cases"]:
            # Padding is no different from other patches here.
            if "exclude" in settings["parameters"]:
                continue
            for precision in settings["dtypes"]:
                yield Case(method, settings, precision)


def selected(case):
    """Return the kept tokens of both pictures, by the reducer's own call."""
    dtype = getattr(torch, case.precision)
    values = tensors(f"inputs/{case.settings['inputs']}")
    parameters = dict(case.settings["parameters"])

    # A tower gives these; the width of the grid follows from the number of patches.
    parameters.pop("width", None)
    saliency = values["saliency"].to(dtype) if parameters.pop("saliency", True) else None
    received = [values[name].to(dtype) for name in ("received_middle", "received_deep") if name in values]
    has_cls = case.settings["has_cls"]
    tokens = VisionTokens(
        features=values["features"].to(dtype),
        has_cls=has_cls,
        num_dropped=int(has_cls),
        saliency=saliency,
        received=tuple(received),
    )
    return create(case.method, {"budget": case.settings["budget"], **parameters})(tokens)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_the_authors_code_keeps_the_same_tokens(case):
    output = selected(case)
    name = f"{case.settings['name']}/kept_indices"
    listed = tensors(f"{case.method}/cases")
    want = listed.get(f"{name}.{case.precision}", listed.get(name))
    assert output.dominant.shape == want.shape and output.contextual.shape[1] == 0

    if case.compare == "exact":
        assert torch.equal(output.dominant, want)
    elif case.compare == "either":
        for kept, one, other in zip(output.dominant, want, listed[f"{name}.other_first"], strict=True):
            assert torch.equal(kept, one) or torch.equal(kept, other)
    elif case.compare == "overlap":
        for kept, one in zip(output.dominant.tolist(), want.tolist(), strict=True):
            share = len(set(kept) & set(one)) / len(one)
            assert share >= case.settings["overlap_under_noise"]

    # Whatever the authors' code does, no token is kept twice.
    assert all(len(set(kept)) == len(kept) for kept in output.dominant.tolist())


def test_every_method_has_its_cases():
    counts = {method: sum(case.method == method for case in cases()) for method in METHODS}
    assert counts == {"divprune": 28, "fastervlm": 14, "hiprune": 18, "mmtok": 9, "scope": 28}
