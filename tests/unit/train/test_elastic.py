"""One projector for several budgets: settings, and the gradient of a step whose micro batches have
different budgets.
"""

import pytest
import torch

from data.batches.collate import Collator, Packer
from data.batches.dataset import BatchPlan, MicroBatches, PackedBatcher, has_media
from data.batches.packing import shared_prefix
from tests.helpers import tiny
from tests.helpers.configs import composed
from tests.helpers.examples import IMAGE_TEXTS, examples_of, micro_batches_of
from train.checks import check
from train.config import build_reducer, build_reducers, run_name
from train.losses import FastLoss, ReferenceLoss
from vzip import UserError
from vzip.families import family_of
from vzip.reducers.visionzip import VisionZip

pytestmark = pytest.mark.slow

# Settings


@pytest.mark.parametrize("setting", ["reducer.budget", "model.budget"])
def test_a_list_makes_one_reducer_per_budget_in_its_order(setting):
    cfg = composed("model=llava-7b", f"{setting}=[128,64,192]")
    check(cfg)
    assert build_reducers(cfg) == [VisionZip(budget=budget) for budget in (128, 64, 192)]
    assert build_reducer(cfg) == VisionZip(budget=192)  # the largest
    assert "-visionzip-128-64-192-projector-" in run_name(cfg)


def test_each_budget_counts_all_tiles_of_the_family():
    cfg = composed("model=next-7b", "reducer=random", "reducer.budget=[160,320]")
    assert [reducer.settings()["budget"] for reducer in build_reducers(cfg)] == [32, 64]
    with pytest.raises(UserError, match=r"reducer\.budget=161 is the total of an image of 5 tiles"):
        build_reducers(composed("model=next-7b", "reducer.budget=[160,161]"))


@pytest.mark.parametrize(
    "budgets", ["[]", "[64,64]", "[64,12.5]", "[0,64]", "[true,64]", "[64,null]", "[many]"]
)
def test_a_list_of_anything_else_is_refused(budgets):
    message = r"^reducer\.budget=\[.*\] must be .* list of different ones, .* \[64, 128, 192\]"
    for call in (check, build_reducers):
        with pytest.raises(UserError, match=message):
            call(composed("model=llava-7b", f"reducer.budget={budgets}"))


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
def test_settings_for_a_single_budget_are_refused_with_a_way_out(override, advice):
    with pytest.raises(UserError) as error:
        check(composed("reducer.budget=[4,8]", override))
    for word in ("reducer.budget=[4, 8]", override, advice, "single budget"):
        assert word in str(error.value)
    if "reducer" not in override:
        check(composed(override))


# Draws and gradients

REDUCERS = [VisionZip(dominant=3, contextual=1), VisionZip(dominant=5, contextual=2)]
PLAN = BatchPlan(size=8, world_size=2, num_steps=6, seed=3)


@pytest.fixture(scope="module")
def family():
    family = family_of(tiny.exact(tiny.llava(dtype=torch.float64)))
    family.model.requires_grad_(False)
    family.projector.requires_grad_(True)
    return family


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    texts = [f"so {text} {number}" for number in range(4) for text in IMAGE_TEXTS]
    return examples_of(texts, tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def prefix(family, examples):
    return shared_prefix(examples, [family.placeholder_id("image")])


def cut(family, examples, prefix):
    """The micro batches of 2 ranks, several of them in a step."""
    packers = []
    for number, reducer in enumerate(REDUCERS):
        collator = Collator(tiny.processor(), family, reducer)
        packers.append(Packer(collator, num_prefix=len(prefix), reducer=number))
    num_run = torch.stack([packer.lengths(examples) for packer in packers])
    has_gradient = has_media(examples)
    sizes = {"tokens": int(num_run.max()) * 2, "num_run": num_run, "has_gradient": has_gradient}
    batcher = PackedBatcher(packers, examples, PLAN, **sizes)
    return [MicroBatches(batcher, PLAN, rank=rank, has_gradient=has_gradient) for rank in range(2)]


def projector_gradient(family, losses):
    family.projector.zero_grad()
    for loss in losses:
        loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in family.projector.parameters()])


@pytest.mark.parametrize("step", range(3))
def test_a_steps_gradient_is_the_sum_of_what_each_budgets_examples_give_alone(family, examples, prefix, step):
    ranks = cut(family, examples, prefix)
    assert len(prefix) > 0
    fast = FastLoss(family, REDUCERS, prefix=prefix, recompute=False)
    fast.run_prefix(torch.device("cpu"))
    losses = []
    for batches in ranks:
        losses += [fast(micro_batch)[0] for micro_batch in micro_batches_of(batches, step)]
    gradient = projector_gradient(family, losses)

    numbers = ranks[0].examples_by_step[step].tolist()
    by_reducer = {0: [], 1: []}
    for spec in ranks[0].batcher.cut(step, numbers):
        by_reducer[spec.reducer] += spec.examples
    assert all(by_reducer.values()), "both budgets are drawn"
    with_picture = [number for number in numbers if examples[number].media]
    assert sorted(by_reducer[0] + by_reducer[1]) == sorted(with_picture)

    alone = []
    for number, of_reducer in by_reducer.items():
        collator = Collator(tiny.processor(), family, REDUCERS[number])
        plain = ReferenceLoss(family, REDUCERS[number], text_has_gradient=False)
        batch = collator([examples[example] for example in of_reducer])
        alone.append(projector_gradient(family, [plain(batch)[0]]))
    assert torch.linalg.vector_norm(gradient - sum(alone)) <= 1e-10 * torch.linalg.vector_norm(gradient)
    assert all(each.any() for each in alone)
