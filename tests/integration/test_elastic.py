"""One projector for several budgets, from command line to `vzip.load`, on two ranks."""

import json

import pytest
import torch
from safetensors.torch import load_file

import vzip
from tests.helpers import tiny
from tests.helpers.commands import tune

pytestmark = pytest.mark.integration


def test_one_projector_has_results_for_each_budget_and_loads_with_each(overrides, tmp_path):
    hidden = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}  # no key of wandb
    elastic = ["reducer.budget=[4,7]", "batch.tokens=300", "track=wandb", "evaluate.questions=2"]
    tune([*overrides, *elastic, f"runs={tmp_path}", "name=elastic"], ranks=2, **hidden)

    run = tmp_path / "elastic"
    rows = json.loads((run / "result.json").read_text())["rows"]
    counts = {row["name"]: row["num_visual_tokens"] for row in rows}
    assert counts == {"full": 16, "free-4": 4, "free-7": 7, "tuned-4": 4, "tuned-7": 7}
    answers = {path.name for path in run.glob("answers_*.json")}
    assert answers == {f"answers_{name}.json" for name in counts}
    (tracked,) = run.glob("wandb/offline-run-*/*.wandb")
    assert all(f"eval/{name}_all".encode() in tracked.read_bytes() for name in counts)

    tuned = load_file(run / "projector.safetensors")
    for budget in (None, 4, 7):
        model, processor = vzip.load(run, budget=budget)
        text = "USER: <image>\nwhat is it? ASSISTANT:"
        inputs = processor(images=[tiny.picture()], text=text, return_tensors="pt")
        num_visual = (inputs["input_ids"] == model.config.image_token_id).sum()
        assert num_visual == (budget or 4)
        assert all(torch.equal(model.get_parameter(name), value) for name, value in tuned.items())
    with pytest.raises(vzip.UserError, match="not tuned for budget=6, but for 4, 7"):
        vzip.load(run, budget=6)
