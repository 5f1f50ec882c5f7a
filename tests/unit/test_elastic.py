"""One projector for several budgets: settings, draws, gradients, the file that says what it was tuned for, results."""

import json
from functools import cache

import pytest
import torch
from hydra import compose, initialize_config_dir

import vzip
from data.batches.collate import Collator, Packer
from data.batches.dataset import BatchPlan, MicroBatches, PackedBatcher, has_media, loader
from data.batches.packing import shared_prefix
from tests.conftest import ROOT
from tests.helpers import tiny
from tests.helpers.examples import IMAGE_TEXTS, examples_of
from train import config
from train.checks import check
from train.evaluate import gap_closed, print_results
from train.losses import FastLoss, ReferenceLoss
from train.plan import print_plan
from vzip import UserError
from vzip.families import families, family_of
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip
from vzip.runs.projector import (
    META,
    fingerprint,
    load_projector,
    projector_meta,
    reducers_of,
    save_checkpoint,
)


@cache
def settings_of(*overrides):
    """The run's settings, as the command line composes them."""
    config.register()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("tune", overrides=list(overrides))


# Settings


@pytest.mark.parametrize("setting", ["reducer.budget", "model.budget"])
def test_a_list_makes_one_reducer_a_budget_in_its_order(setting):
    cfg = settings_of("model=llava-7b", f"{setting}=[128,64,192]")
    check(cfg)
    assert config.build_reducers(cfg) == [VisionZip(budget=budget) for budget in (128, 64, 192)]
    assert config.build_reducer(cfg) == VisionZip(budget=192)  # the largest
    assert "-visionzip-128-64-192-projector-" in config.run_name(cfg)


def test_each_budget_is_the_total_of_the_familys_tiles():
    cfg = settings_of("model=next-7b", "reducer=random", "reducer.budget=[160,320]")
    reducers = config.build_reducers(cfg)
    assert all(isinstance(reducer, Random) for reducer in reducers) and [
        reducer.budget for reducer in reducers
    ] == [32, 64]
    with pytest.raises(UserError, match=r"reducer\.budget=161 is the total of an image of 5 tiles"):
        config.build_reducers(settings_of("model=next-7b", "reducer.budget=[160,161]"))


@pytest.mark.parametrize("reducer", ["visionzip", "identity"])
def test_a_single_reducer_is_the_only_one(reducer):
    cfg = settings_of(f"reducer={reducer}")
    assert len(config.build_reducers(cfg)) == 1
    assert repr(config.build_reducer(cfg)) == repr(config.build_reducers(cfg)[0])
    assert config.run_name(cfg).startswith(
        "smol-visionzip-8-projector" if reducer == "visionzip" else "smol-identity-projector"
    )


@pytest.mark.parametrize(
    "given", ["[]", "[64,64]", "[64,12.5]", "[0,64]", "[true,64]", "[64,null]", "[many]"]
)
def test_a_list_that_is_none_of_budgets_is_refused(given):
    for call in (check, config.build_reducers):
        with pytest.raises(
            UserError, match=r"^reducer\.budget=\[.*\] must be .* list of different ones, .* \[64, 128, 192\]"
        ):
            call(settings_of("model=llava-7b", f"reducer.budget={given}"))


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("engine=reference", "engine=fast"),
        ("data.cache=true", "data.cache=false"),
        ("control=true", "leave control out"),
        ("reducer.dominant=3", "leave it out"),
        ("reducer.contextual=3", "leave it out"),
    ],
)
def test_what_only_one_budget_can_have_is_refused_with_the_way_out(override, advice):
    with pytest.raises(UserError) as error:
        check(settings_of("reducer.budget=[4,8]", override))
    assert all(
        word in str(error.value) for word in ("reducer.budget=[4, 8]", override, advice, "single budget")
    )
    if "reducer" not in override:
        check(settings_of(override))


def test_the_plan_names_all_budgets_and_counts_the_largest(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    print_plan(settings_of("model=next-7b", "reducer.budget=[320,640,160]"), world_size=1)
    shown = capsys.readouterr().out
    for words in (repr(VisionZip(budget=budget)) for budget in (32, 64, 128)):
        assert words in shown
    assert "the plan is of the largest" in shown and "640 is the total of 5 tiles: 128 each" in shown


# Draws and gradients

REDUCERS = [VisionZip(dominant=3, contextual=1), VisionZip(dominant=5, contextual=2)]
SIZE = 8


@pytest.fixture(scope="module")
def family():
    family = family_of(tiny.exact(tiny.llava(dtype=torch.float64)))
    family.model.requires_grad_(False)
    family.projector.requires_grad_(True)
    return family


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return examples_of(
        [f"so {text} {number}" for number in range(4) for text in IMAGE_TEXTS], tmp_path_factory.mktemp("rows")
    )


@pytest.fixture(scope="module")
def laid_out(family, examples):
    """(batcher, each rank's micro batches, the shared prefix) of 2 ranks, some micro batches a step."""
    return lay_out(family, examples)


def lay_out(family, examples):
    prefix = shared_prefix(examples, [family.placeholder_id("image")])
    collators = [Collator(tiny.processor(), family, reducer) for reducer in REDUCERS]
    packers = [
        Packer(collate, num_prefix=len(prefix), reducer=number) for number, collate in enumerate(collators)
    ]
    plan, has_gradient = BatchPlan(size=SIZE, world_size=2, num_steps=6, seed=3), has_media(examples)
    num_run = torch.stack([packer.lengths(examples) for packer in packers])
    batcher = PackedBatcher(
        packers, examples, plan, tokens=int(num_run.max()) * 2, num_run=num_run, has_gradient=has_gradient
    )
    return (
        batcher,
        [MicroBatches(batcher, plan, rank=rank, has_gradient=has_gradient) for rank in range(2)],
        prefix,
    )


def projector_gradient(family, losses):
    family.projector.zero_grad()
    for loss in losses:
        loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in family.projector.parameters()])


@pytest.mark.parametrize("step", range(3))
def test_a_steps_gradient_is_the_sum_of_what_each_budgets_rows_give_alone(family, examples, laid_out, step):
    batcher, ranks, prefix = laid_out
    assert len(prefix) > 0
    fast = FastLoss(family, REDUCERS, prefix=prefix, recompute=False)
    starts = [batches.first_index(step) for batches in ranks]
    parts = [
        batches[start + n]
        for batches, start in zip(ranks, starts, strict=True)
        for n in range(batches.num_micro_batches(step))
    ]
    found = projector_gradient(family, [fast(part)[0] for part in parts])

    rows_by_reducer = {0: [], 1: []}
    for part in batcher.cut(step, ranks[0].examples_by_step[step].tolist()):
        rows_by_reducer[part.reducer] += part.examples
    assert all(rows_by_reducer.values()), "both budgets are drawn"
    run = [row for row in ranks[0].examples_by_step[step].tolist() if examples[row].media]
    assert sorted(rows_by_reducer[0] + rows_by_reducer[1]) == sorted(run)
    alone = []
    for number, rows in rows_by_reducer.items():
        padded = Collator(tiny.processor(), family, REDUCERS[number])([examples[row] for row in rows])
        plain = ReferenceLoss(family, REDUCERS[number], text_has_gradient=False)
        alone.append(projector_gradient(family, [plain(padded)[0]]))
    assert torch.linalg.vector_norm(found - sum(alone)) <= 1e-10 * torch.linalg.vector_norm(found)
    assert all(gradient.any() for gradient in alone)


def test_a_resumed_run_draws_the_same_budgets(family, examples, laid_out):
    torch.manual_seed(7)  # another process
    for batches, again in zip(laid_out[1], lay_out(family, examples)[1], strict=True):
        whole = [part.reducer for part in loader(batches, first=0, num_workers=0)]
        resumed = [part.reducer for part in loader(again, first=3, num_workers=0)]
        assert resumed == whole[batches.first_index(3) :] and set(whole) == {0, 1}


# What a projector was tuned for


def save_run(folder, base, *reducers, model_type="llava"):
    """A finished run with these reducers on the model in the folder `base`: its tuned projector."""
    family = family_of(families()[model_type].load_model(str(base), dtype=torch.float32))
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
    return save_run(tmp_path_factory.mktemp("elastic"), tiny_folder, *reducers)


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
    folder, _ = save_run(tmp_path / "run", tiny_folder, VisionZip(dominant=5, contextual=2))
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
    reducers = [VisionZip(budget=budget, tiles=5, anyres="spatial") for budget in (30, 20)]
    folder, _ = save_run(tmp_path / "run", base, *reducers, model_type="llava_next")
    meta = json.loads((folder / META).read_text())
    assert reducers_of(meta) == {
        30: VisionZip(budget=6, anyres="spatial"),
        20: VisionZip(budget=4, anyres="spatial"),
    }
    with pytest.raises(UserError, match="budget=4, but for 30, 20;"):
        vzip.load(folder, budget=4, device="cpu")


# Results


def row(name, value, num_visual_tokens=8):
    return {
        "name": name,
        "num_visual_tokens": num_visual_tokens,
        "num_questions": 9,
        "metrics": {"all": value},
    }


def test_results_say_what_each_budget_closes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    free = [row("free-4", 0.2, 4), row("free-8", 0.4, 8)]
    rows = [row("full", 0.8, 64), *free, row("tuned-4", 0.5, 4), row("tuned-8", 0.7, 8)]
    assert gap_closed(rows, "all", suffix="-4") == pytest.approx(0.5) and gap_closed(rows, "all") is None
    print_results(rows, title="runs/elastic")
    shown = capsys.readouterr().out
    assert all(each["name"] in shown for each in rows)
    assert "all: tuning closes 50% of the gap between free-4 and full" in shown
    assert "all: tuning closes 75% of the gap between free-8 and full" in shown


def test_results_of_one_budget_are_as_ever(capsys):
    print_results([row("full", 0.8, 64), row("free", 0.4), row("tuned", 0.6)], title="runs/one")
    assert "all: tuning closes 50% of the gap between free and full\n" in capsys.readouterr().out
