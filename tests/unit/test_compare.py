"""A model in the rows of a results table: each row is the model that a user would have loaded for it alone."""

import json

import pytest
import torch

import vzip
from tests.helpers import tiny
from tests.helpers.runs import attached, save_run, tune
from vzip import Comparison, UserError
from vzip.reducers.identity import Identity
from vzip.reducers.visionzip import VisionZip
from vzip.runs.projector import META


@pytest.fixture
def run(tmp_path, tiny_folder):
    return save_run(tmp_path / "run", tune(attached(tiny_folder)), tiny_folder)


def logits(model, processor):
    inputs = processor(images=tiny.picture(), text="<image>what?", return_tensors="pt")
    return model(**inputs).logits


def plain(folder, **reducer):
    """What the base model says behind a reducer."""
    handle = attached(folder, **reducer)
    return logits(
        handle.family.model, handle.processor(vzip.families.families()["llava"].load_processor(str(folder)))
    )


@torch.no_grad()
def test_each_row_is_the_model_that_is_loaded_for_it_alone(run, tiny_folder):
    comparison = Comparison.open(run, device="cpu")
    assert comparison.rows == ("full", "free", "tuned")
    expected = {
        "full": plain(tiny_folder, reducer=Identity()),
        "free": plain(tiny_folder, dominant=4, contextual=2),
        "tuned": logits(*vzip.load(run, device="cpu")),
    }
    for row in ("tuned", "full", "free", "tuned", "free"):
        with comparison.row(row) as (model, processor):
            assert torch.equal(logits(model, processor), expected[row])
    assert not torch.equal(expected["free"], expected["tuned"])


@torch.no_grad()
def test_free_takes_any_budget_and_tuned_its_own(run, tiny_folder):
    comparison = Comparison.open(run, device="cpu")
    with comparison.row("free", budget=9) as (model, processor):
        assert torch.equal(logits(model, processor), plain(tiny_folder, budget=9))
    with pytest.raises(UserError, match="not tuned for budget=9, but for 6"):
        comparison.reducer("tuned", budget=9)


@torch.no_grad()
def test_a_base_model_has_no_tuned_row(tiny_folder):
    comparison = Comparison.open(tiny_folder, dtype=torch.float32, device="cpu")
    assert comparison.rows == ("full", "free")
    assert comparison.reducer("free", budget=6) == VisionZip(budget=6)
    with comparison.row("free", budget=6) as (model, processor):
        assert torch.equal(logits(model, processor), plain(tiny_folder, budget=6))
    with pytest.raises(UserError, match="needs a budget"):
        comparison.reducer("free")
    with pytest.raises(UserError, match="row='tuned' does not exist here; choose one of: full, free"):
        comparison.reducer("tuned")


@torch.no_grad()
def test_a_run_that_started_from_another_projector_compares_with_that_one(tmp_path, tiny_folder):
    start = tune(attached(tiny_folder), seed=5)
    first = save_run(tmp_path / "first", start, tiny_folder)
    started = logits(*vzip.load(first, device="cpu"))
    second = save_run(tmp_path / "second", tune(attached(tiny_folder)), tiny_folder)
    meta = json.loads((second / META).read_text())
    meta["base"]["projector"] = str(first / "projector.safetensors")
    (second / META).write_text(json.dumps(meta))
    with Comparison.open(second, device="cpu").row("free") as (model, processor):
        assert torch.equal(logits(model, processor), started)
    (first / "projector.safetensors").unlink()
    comparison = Comparison.open(second, device="cpu")
    assert comparison.rows == ("tuned",)
    with pytest.raises(UserError, match="no longer where it was"):
        comparison.reducer("full")


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("nowhere/at-all", "is neither a run folder nor a model"),
        ("folder", "is not a run folder"),
        ("./folder/mistyped", "does not exist"),
    ],
)
def test_what_is_neither_a_run_nor_a_model_is_refused(source, fault, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=fault):
        Comparison.open(source)


def test_a_row_leaves_the_model_without_a_reducer(run):
    comparison = Comparison.open(run, device="cpu")
    with comparison.row("tuned") as (model, _):
        assert "get_image_features" in vars(model.model)
    assert "get_image_features" not in vars(comparison.family.model.model)
