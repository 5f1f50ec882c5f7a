"""A projector that was tuned for several budgets: what its meta.json says, and which models take it."""

import pytest
import torch

import vzip
from tests.helpers import tiny
from tests.helpers.errors import refused
from tests.helpers.runs import attached, projector_of, save_run, tune
from vzip.reducers.visionzip import VisionZip
from vzip.runs.meta import read_meta, reducers_of
from vzip.runs.projector import load_projector

BUDGETS = (6, 4, 12)


@pytest.fixture(scope="module")
def handle(tiny_folder):
    """The attached model that wrote the run."""
    return tune(attached(tiny_folder, budget=BUDGETS[0]))


@pytest.fixture(scope="module")
def run(tmp_path_factory, handle, tiny_folder):
    others = [VisionZip(budget=budget) for budget in BUDGETS[1:]]
    return save_run(tmp_path_factory.mktemp("run"), handle, tiny_folder, *others)


def num_placeholders(model, processor):
    ids = processor(images=tiny.picture(), text="<image>", return_tensors="pt")["input_ids"]
    return int((ids == model.config.image_token_id).sum())


def assert_tuned(model, handle):
    for name, value in projector_of(handle).items():
        assert torch.equal(model.get_parameter(name), value)


@pytest.mark.parametrize("budget", [None, *BUDGETS])
def test_load_attaches_the_chosen_budget(run, handle, budget):
    model, processor = vzip.load(run, budget=budget, device="cpu")
    assert num_placeholders(model, processor) == (budget or BUDGETS[0])
    assert_tuned(model, handle)
    inputs = processor(images=tiny.picture(), text="<image>what?", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 2


def test_load_refuses_a_budget_before_it_loads_anything(run):
    words = ["not tuned for budget=5, but for 6, 4, 12; give one"]
    refused(vzip.load, run, budget=5, base="/nowhere", device="cpu", words=words)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_model_with_any_of_the_budgets_takes_the_projector(run, handle, tiny_folder, budget):
    fresh = attached(tiny_folder, budget=budget)
    load_projector(fresh, run)
    assert_tuned(fresh.family.model, handle)


@pytest.mark.parametrize("reducer", [VisionZip(budget=5), VisionZip(budget=4, merge="average")], ids=repr)
def test_a_model_with_another_reducer_does_not_take_it(run, tiny_folder, reducer):
    fresh = attached(tiny_folder, reducer=reducer)
    before = fresh.family.projector.linear_1.weight.clone()
    known = " or ".join(repr(VisionZip(budget=budget)) for budget in BUDGETS)
    words = [f"trained with the reducer {known}, not with {reducer}"]
    refused(load_projector, fresh, run, words=words)
    assert torch.equal(fresh.family.projector.linear_1.weight, before)


def test_a_budget_of_tiles_counts_the_tokens_of_all_of_them(tmp_path):
    base = tiny.save_llava(tmp_path / "next", "next")
    first, second = (VisionZip(budget=budget, tiles=5) for budget in (30, 20))
    handle = attached(base, "next", reducer=first, anyres="spatial")
    run = save_run(tmp_path / "run", handle, base, second)
    assert reducers_of(read_meta(run)) == {30: VisionZip(budget=6), 20: VisionZip(budget=4)}
    refused(vzip.load, run, budget=4, device="cpu", words=["budget=4, but for 30, 20;"])
