"""The dry run: what a budget means, which micro batch a card holds, and what no run can have."""

import pytest

from tests.helpers.configs import composed
from train.plan import print_plan
from vzip import UserError
from vzip.reducers.visionzip import VisionZip

pytestmark = pytest.mark.slow


@pytest.fixture
def plan_of(capsys, monkeypatch):
    """A function that returns the lines of the plan of some settings, by name."""
    monkeypatch.setenv("COLUMNS", "400")

    def plan(*overrides):
        print_plan(composed(*overrides), world_size=1)
        lines = {}
        for line in capsys.readouterr().out.splitlines():
            cells = [cell.strip() for cell in line.split("│")]
            if len(cells) == 4:
                lines[cells[1]] = cells[2]
        return lines

    return plan


SIZES = {3: "672 x 336 px", 4: "336 x 1008 px", 5: "672 x 672 px"}
FULL = {3: "1,776", 4: "2,328", 5: "2,928"}
"""Tokens as the model itself packs them: without padding, with row ends."""


@pytest.mark.parametrize("reducer", ["visionzip", "random"])
def test_a_budget_of_five_tiles(plan_of, reducer):
    for budget in (160, 640):
        plan = plan_of("model=next-7b", f"reducer={reducer}", f"reducer.budget={budget}")
        each = budget // 5
        for num_tiles in (3, 4, 5):
            counts = f"{FULL[num_tiles]} before, {num_tiles * each} after ({SIZES[num_tiles]})"
            assert plan[f"image of {num_tiles} tiles"] == counts
        assert plan["budget"].startswith(f"{budget} is the total of 5 tiles: {each} each")

    # In spatial order, row ends count: two tiles of 24 rows of patches lie one below the other.
    plan = plan_of("model=next-7b", f"reducer={reducer}", "reducer.anyres=spatial")
    assert plan["image of 5 tiles"].startswith(f"2,928 before, {160 + 48} after")
    assert plan["image of 3 tiles"].startswith(f"1,776 before, {96 + 48} after")

    all_tokens = plan_of("model=next-7b", "reducer=identity")
    assert all_tokens["image of 5 tiles"] == "2,928 before, 2,928 after (672 x 672 px)"
    assert "budget" not in all_tokens


def test_one_tile_or_frame(plan_of):
    plan = plan_of("model=llava-7b")
    assert plan["tokens an image"] == "576 before, 64 after"
    assert not any("tiles" in name or "video" in name for name in plan)

    plan = plan_of("model=video-llava-7b")
    assert plan["tokens an image"] == "256 before, 17 after"
    assert plan["video of 8 frames"] == "2,056 before, 136 after"
    assert "budget" not in plan
    plan = plan_of("model=video-llava-7b", "model.num_frames=4")
    assert plan["video of 4 frames"] == "1,028 before, 68 after"


def test_a_model_of_many_tiles_shows_some_and_the_video(plan_of):
    plan = plan_of("model=onevision-0.5b")
    tiles = [int(name.split()[2]) for name in plan if name.startswith("image of")]
    assert tiles[0] == 2 and tiles[-1] == 37 and len(tiles) == 5 and tiles == sorted(tiles)

    # 729 tokens and 27 rows of 27 with their ends; 37 tiles are pooled to 81 x 81, with ends.
    assert plan["image of 2 tiles"] == "1,485 before, 162 after (384 x 384 px)"
    assert plan["image of 37 tiles"].startswith("7,371 before, 2,997 after")
    assert plan["video of 32 frames"] == f"{32 * 14 * 14 + 1:,} before, {32 * 81 + 1:,} after"
    assert "budget" not in plan


def test_several_budgets_are_named_and_the_largest_counts(plan_of):
    plan = plan_of("model=next-7b", "reducer.budget=[320,640,160]")
    for budget in (64, 128, 32):
        assert repr(VisionZip(budget=budget)) in plan["reducer"]
    assert "the plan is for the largest" in plan["reducer"]
    assert plan["budget"].startswith("640 is the total of 5 tiles: 128 each")


def test_the_micro_batch_of_a_card(plan_of):
    plan = plan_of("model=llava-7b", "hardware=24gb")
    assert plan["a micro batch"] == "up to 2,048 packed tokens, nothing computed twice"
    assert plan["memory a rank"].endswith("GB, of memory_gb=24; all weights 14.2 GB")

    plan = plan_of("model=llava-7b", "hardware=24gb", "batch.tokens=3000", "quantize=nf4")
    assert plan["a micro batch"].startswith("up to 3,000")
    assert "gradients are not exact" in plan["memory a rank"]

    plan = plan_of("model=llava-7b", "engine=reference", "batch.micro=4")
    assert plan["a micro batch"].startswith("4 examples, padded")

    # A model that does not fit is planned to the end.
    plan = plan_of("model=llava-13b", "memory_gb=8")
    assert plan["a micro batch"].startswith("none: weights") and "memory a rank" not in plan
    assert "time on one H100" in plan


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reducer.budget=1000"], "reducer.budget=1000"),
        (["reducer.layer=25"], "reducer.layer=25 .* has 24"),
        (["data=videochatgpt"], "'llava' models take no videos"),
    ],
)
def test_a_plan_that_no_run_can_have_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        print_plan(composed("model=llava-7b", *overrides), world_size=1)
