"""A projector that was tuned for several budgets: what its meta.json says, and which models take it."""

import json

import pytest
import torch

import vzip
from tests.helpers import tiny
from vzip import UserError
from vzip.families import families, family_of
from vzip.reducers.visionzip import VisionZip
from vzip.runs.projector import (
    META,
    fingerprint,
    load_projector,
    projector_meta,
    reducers_of,
    save_checkpoint,
)


def save_budgets(folder, base, *reducers, model_type="llava", anyres="released"):
    """A finished run with these reducers on the model in the folder `base`: its tuned projector."""
    family = family_of(families()[model_type].load_model(str(base), dtype=torch.float32), anyres=anyres)
    with torch.no_grad():
        for parameter in family.projector.parameters():
            parameter.add_(torch.randn(parameter.shape))
    tensors = {
        name: value
        for name, value in family.model.named_parameters()
        if name.startswith(family.projector_name)
    }
    meta = projector_meta(family, *reducers, base=str(base), base_fingerprint=fingerprint(family))
    save_checkpoint(folder, tensors, meta | {"dtype": "float32", "adapter": False})
    return folder, tensors


@pytest.fixture(scope="module")
def elastic(tmp_path_factory, tiny_folder):
    """(folder, tuned tensors) of a run with budgets of 6, 4 and 12."""
    reducers = [VisionZip(budget=budget) for budget in (6, 4, 12)]
    return save_budgets(tmp_path_factory.mktemp("elastic"), tiny_folder, *reducers)


def num_placeholders(model, processor):
    ids = processor(images=tiny.picture(), text="<image>", return_tensors="pt")["input_ids"]
    return int((ids == model.config.image_token_id).sum())


@pytest.mark.parametrize(("budget", "expected"), [(None, 6), (6, 6), (4, 4), (12, 12)])
def test_load_attaches_the_budget_that_is_asked_for(elastic, budget, expected):
    folder, tensors = elastic
    model, processor = vzip.load(folder, budget=budget, device="cpu")
    assert num_placeholders(model, processor) == expected
    assert all(torch.equal(model.get_parameter(name), value) for name, value in tensors.items())
    inputs = processor(images=tiny.picture(), text="<image>what?", return_tensors="pt")
    assert (
        model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1]
        == inputs["input_ids"].shape[1] + 2
    )


def test_load_refuses_a_budget_before_it_loads_anything(elastic):
    with pytest.raises(UserError, match=r"not tuned for budget=5, but for 6, 4, 12; give one"):
        vzip.load(elastic[0], budget=5, base="/nowhere", device="cpu")


@pytest.mark.parametrize("budget", [6, 4, 12])
def test_an_attached_model_of_any_of_its_budgets_takes_the_projector(elastic, tiny_folder, budget):
    folder, tensors = elastic
    handle = vzip.attach(families()["llava"].load_model(str(tiny_folder), dtype=torch.float32), budget=budget)
    load_projector(handle, folder)
    assert all(torch.equal(handle.family.model.get_parameter(name), value) for name, value in tensors.items())


@pytest.mark.parametrize(
    "reducer",
    [VisionZip(budget=5), VisionZip(dominant=4, contextual=2), VisionZip(budget=4, merge="average")],
    ids=repr,
)
def test_an_attached_model_of_another_reducer_does_not(elastic, tiny_folder, reducer):
    handle = vzip.attach(
        families()["llava"].load_model(str(tiny_folder), dtype=torch.float32), reducer=reducer
    )
    before = handle.family.projector.linear_1.weight.clone()
    with pytest.raises(UserError) as error:
        load_projector(handle, elastic[0])
    known = " or ".join(repr(VisionZip(budget=budget)) for budget in (6, 4, 12))
    assert f"trained with the reducer {known}, not with {reducer}" in str(error.value)
    assert torch.equal(handle.family.projector.linear_1.weight, before)


@pytest.mark.parametrize("age", ["new", "old"])
def test_a_run_of_one_budget_takes_its_own_and_no_other(tmp_path, tiny_folder, age):
    folder, _ = save_budgets(tmp_path / "run", tiny_folder, VisionZip(dominant=5, contextual=2))
    if age == "old":
        meta = json.loads((folder / META).read_text())
        del meta["budget"], meta["other_budgets"]
        (folder / META).write_text(json.dumps(meta))
    for budget in (None, 7):
        assert num_placeholders(*vzip.load(folder, budget=budget, device="cpu")) == 7
    with pytest.raises(UserError, match="not tuned for budget=6, but for 7;"):
        vzip.load(folder, budget=6, device="cpu")


def test_a_budget_of_tiles_is_asked_for_as_the_total_that_it_is(tmp_path):
    base = tiny.save_llava(tmp_path / "next", "next")
    reducers = [VisionZip(budget=budget, tiles=5) for budget in (30, 20)]
    folder, _ = save_budgets(tmp_path / "run", base, *reducers, model_type="llava_next", anyres="spatial")
    meta = json.loads((folder / META).read_text())
    assert reducers_of(meta) == {
        30: VisionZip(budget=6),
        20: VisionZip(budget=4),
    }
    with pytest.raises(UserError, match="budget=4, but for 30, 20;"):
        vzip.load(folder, budget=4, device="cpu")
