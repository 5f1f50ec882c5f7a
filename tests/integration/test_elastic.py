"""One projector for several budgets, from command line to `vzip.load`, on two ranks."""

import json

import pytest
import torch
from safetensors.torch import load_file

import vzip
from tests.helpers import tiny
from tests.helpers.commands import tune

pytestmark = pytest.mark.integration

BUDGETS = (4, 7)


@pytest.fixture(scope="module")
def run(overrides, tmp_path_factory):
    """A run on two ranks, which the tracker follows."""
    runs = tmp_path_factory.mktemp("runs")
    hidden = {"HOME": str(runs), "NETRC": str(runs / "none")}  # no key of wandb
    elastic = ["reducer.budget=[4,7]", "batch.tokens=300", "track=wandb", "evaluate.questions=2"]
    tune([*overrides, *elastic, f"runs={runs}", "name=elastic"], ranks=2, **hidden)
    return runs / "elastic"


def test_results_have_a_setting_for_each_budget(run):
    rows = json.loads((run / "result.json").read_text())["rows"]
    assert [(row["name"], row["num_visual_tokens"]) for row in rows] == [
        ("full", 16),
        ("free-4", 4),
        ("free-7", 7),
        ("tuned-4", 4),
        ("tuned-7", 7),
    ]
    answers = {path.name for path in run.glob("answers_*.json")}
    assert answers == {f"answers_{row['name']}.json" for row in rows}
    (tracked,) = run.glob("wandb/offline-run-*/*.wandb")
    assert all(f"eval/{row['name']}_all".encode() in tracked.read_bytes() for row in rows)


def test_the_run_loads_with_each_budget_and_refuses_others(run):
    tuned = load_file(run / "projector.safetensors")
    for budget in (None, *BUDGETS):
        model, processor = vzip.load(run, budget=budget)
        text = "USER: <image>\nwhat is it? ASSISTANT:"
        inputs = processor(images=[tiny.picture()], text=text, return_tensors="pt")
        num_visual = (inputs["input_ids"] == model.config.image_token_id).sum()
        assert num_visual == (budget or BUDGETS[0])
        assert all(torch.equal(model.get_parameter(name), value) for name, value in tuned.items())
    with pytest.raises(vzip.UserError, match="not tuned for budget=6, but for 4, 7"):
        vzip.load(run, budget=6)
