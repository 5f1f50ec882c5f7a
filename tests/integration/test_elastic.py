"""One projector for several budgets, from command line to `vzip.load`, and stopped and resumed."""

import json
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

import vzip
from tests.conftest import ROOT
from tests.helpers import tiny
from tests.helpers.commands import metrics, tune
from train import config
from train.checkpoint import RunFolder
from train.ranks import init_distributed

pytestmark = pytest.mark.integration

BUDGETS = (4, 7)
ELASTIC = ["reducer.budget=[4,7]", "batch.tokens=300"]


@pytest.fixture(scope="module")
def run(overrides, tmp_path_factory):
    """A run on two ranks, which the tracker follows."""
    runs = tmp_path_factory.mktemp("runs")
    hidden = {"HOME": str(runs), "NETRC": str(runs / "none")}  # no key of wandb
    tune(
        [*overrides, *ELASTIC, "track=wandb", "evaluate.questions=2", f"runs={runs}", "name=elastic"],
        ranks=2,
        **hidden,
    )
    return runs / "elastic"


def test_results_have_rows_of_each_budget(run):
    rows = json.loads((run / "result.json").read_text())["rows"]
    free, tuned = ([(f"{name}-{budget}", budget) for budget in BUDGETS] for name in ("free", "tuned"))
    assert [(row["name"], row["num_visual_tokens"]) for row in rows] == [("full", 16), *free, *tuned]
    assert {path.name for path in run.glob("answers_*.json")} == {
        f"answers_{row['name']}.json" for row in rows
    }
    (tracked,) = run.glob("wandb/offline-run-*/*.wandb")
    assert all(f"eval/{row['name']}_all".encode() in tracked.read_bytes() for row in rows)


@pytest.mark.parametrize("budget", [None, *BUDGETS])
def test_the_run_loads_with_each_budget_and_refuses_others(run, budget):
    model, processor = vzip.load(run, budget=budget)
    inputs = processor(
        images=[tiny.picture()], text="USER: <image>\nwhat is it? ASSISTANT:", return_tensors="pt"
    )
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == (budget or BUDGETS[0])
    tuned = load_file(run / "projector.safetensors")
    assert all(torch.equal(model.get_parameter(name), value) for name, value in tuned.items())
    with pytest.raises(vzip.UserError, match="not tuned for budget=6, but for 4, 7"):
        vzip.load(run, budget=6)


def test_a_stopped_run_resumes_to_the_same_bits(overrides, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command puts the repository there
    from train.tune import tune as tune_here

    config.register()
    init_distributed()
    steps = ["optim.max_steps=6", "optim.epochs=2", "save_every=2", "evaluate.questions=0"]

    def tuned(name):
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            tune_here(compose("tune", [*overrides, *ELASTIC, *steps, f"runs={tmp_path}", f"name={name}"]))

    def save_and_stop(run, engine, step):
        save(run, engine, step)
        if step == 4:
            raise KeyboardInterrupt

    tuned("whole")
    save = RunFolder.save_state
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "save_state", save_and_stop)
        tuned("stopped")
    assert len(metrics(tmp_path / "stopped")) == 4
    tuned("stopped")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    files = [tmp_path / name / "projector.safetensors" for name in ("stopped", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
