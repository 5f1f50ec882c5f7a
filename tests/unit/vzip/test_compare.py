"""One model in the settings of the results table: each is the model that would be loaded for it alone."""

import pytest
import torch

import vzip
from tests.helpers import tiny
from tests.helpers.errors import refused
from tests.helpers.runs import attached, edit_meta, logits, save_run, tune
from vzip import Comparison
from vzip.reducers.identity import Identity
from vzip.reducers.visionzip import VisionZip
from vzip.runs.meta import WEIGHTS


@pytest.fixture
def run(tmp_path, tiny_folder):
    return save_run(tmp_path / "run", tune(attached(tiny_folder)), tiny_folder)


def base_logits(folder, **reducer):
    """float[1, T, V]: what the base model says behind a reducer."""
    handle = attached(folder, **reducer)
    return logits(handle.family.model, handle.processor(tiny.processor()))


def logits_in(comparison, row, **settings):
    with comparison.row(row, **settings) as (model, processor):
        return logits(model, processor)


def test_each_setting_is_the_model_that_is_loaded_for_it_alone(run, tiny_folder):
    comparison = Comparison.open(run, device="cpu")
    assert comparison.rows == ("full", "free", "tuned")
    expected = {
        "full": base_logits(tiny_folder, reducer=Identity()),
        "free": base_logits(tiny_folder, dominant=4, contextual=2),
        "tuned": logits(*vzip.load(run, device="cpu")),
    }
    for row in ("tuned", "full", "free", "tuned", "free"):
        assert torch.equal(logits_in(comparison, row), expected[row])
    assert not torch.equal(expected["free"], expected["tuned"])

    # Outside the block the model has no reducer.
    with comparison.row("tuned") as (model, _):
        assert "get_image_features" in vars(model.model)
    assert "get_image_features" not in vars(comparison.family.model.model)


def test_training_free_takes_any_budget_and_tuned_its_own(run, tiny_folder):
    comparison = Comparison.open(run, device="cpu")
    expected = base_logits(tiny_folder, budget=9)
    assert torch.equal(logits_in(comparison, "free", budget=9), expected)
    refused(comparison.reducer, "tuned", budget=9, words=["not tuned for budget=9, but for 6"])


def test_a_base_model_can_not_be_tuned(tiny_folder):
    comparison = Comparison.open(tiny_folder, dtype=torch.float32, device="cpu")
    assert comparison.rows == ("full", "free")
    assert comparison.reducer("free", budget=6) == VisionZip(budget=6)
    assert torch.equal(logits_in(comparison, "free", budget=6), base_logits(tiny_folder, budget=6))
    refused(comparison.reducer, "free", words=["needs a budget"])
    words = ["row='tuned' does not exist here; choose one of: full, free"]
    refused(comparison.reducer, "tuned", words=words)


def test_a_run_that_started_from_another_projector_is_compared_with_that_one(tmp_path, tiny_folder):
    first = save_run(tmp_path / "first", tune(attached(tiny_folder), seed=5), tiny_folder)
    second = save_run(tmp_path / "second", tune(attached(tiny_folder)), tiny_folder)
    edit_meta(second, lambda meta: meta["base"].update(projector=str(first / WEIGHTS)))
    expected = logits(*vzip.load(first, device="cpu"))
    assert torch.equal(logits_in(Comparison.open(second, device="cpu"), "free"), expected)

    (first / WEIGHTS).unlink()
    comparison = Comparison.open(second, device="cpu")
    assert comparison.rows == ("tuned",)
    refused(comparison.reducer, "full", words=["no longer where it was"])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere/at-all", "is neither a run folder nor a model"),
        ("folder", "is not a run folder"),
        ("./folder/mistyped", "does not exist"),
    ],
)
def test_what_is_neither_a_run_nor_a_model_is_refused(source, words, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    refused(Comparison.open, source, words=[words])


@pytest.mark.parametrize("kind", ["clip", "next", "mini-gemini"])
def test_outside_of_a_setting_a_half_precision_model_keeps_all_tokens(kind, tmp_path):
    """The projector is in float32 beside a bf16 model, whose own method casts nothing."""
    folder = tiny.save_llava(tmp_path / "base", kind)
    run = save_run(tmp_path / "run", tune(attached(folder, kind)), folder, dtype="bfloat16")
    for source in (run, folder):
        comparison = Comparison.open(source, dtype=torch.bfloat16, device="cpu")
        last = comparison.rows[-1]
        with comparison.row(last, budget=6 * comparison.family.budget_tiles) as (model, processor):
            assert logits(model, processor).dtype == torch.bfloat16

        # The projector is that of the last setting.
        outside = logits(comparison.family.model, comparison.processor)
        assert outside.dtype == torch.bfloat16
        if last == "free":
            assert torch.equal(outside, logits_in(comparison, "full"))
        else:
            assert not torch.equal(outside, logits_in(comparison, "full"))
