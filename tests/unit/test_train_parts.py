"""The parts around the training loop: schedule, settings, names, reducers, the plan, the loss, grades, records."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import vzip
from data.batches.collate import Collator, Packer
from data.batches.dataset import BatchPlan, MicroBatches, PaddedBatcher, has_media
from data.batches.packing import shared_prefix
from data.examples.tokens import Example, Examples
from tests.helpers import tiny
from tests.helpers.configs import composed, counted
from tests.helpers.examples import IMAGE_TEXTS, NUM_FRAMES, NUM_LABELS, VIDEO_TEXTS, examples_of, process, texts_of
from train import config
from train.checkpoint import write_json
from train.checks import check
from train.control import control_row
from train.evaluate import _normal, gap_closed, score
from train.loop import learning_rate
from train.losses import FastLoss, ReferenceLoss, media_inputs
from train.plan import print_plan
from train.track import Tracker, memory_gb
from vzip import UserError
from vzip.cost import example_cost
from vzip.families import family_of
from vzip.reducers.identity import Identity
from vzip.reducers.visionzip import VisionZip

# Learning rate


def rates(num_steps, warmup=0.03, peak=1.0):
    return [learning_rate(step, num_steps=num_steps, peak=peak, warmup=warmup) for step in range(num_steps)]


def test_the_rate_warms_up_peaks_and_decays():
    all_rates = rates(100)
    assert all_rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert all_rates[3] == 1 and max(all_rates) == 1
    assert all(after < before for before, after in pairwise(all_rates[3:]))
    assert 0 < all_rates[-1] < 1e-3
    assert all_rates[3 + 97 // 2] == pytest.approx(0.5, abs=0.02)


def test_the_rate_is_zero_where_the_run_ends():
    assert learning_rate(100, num_steps=100, peak=1.0, warmup=0.03) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.99])
def test_a_run_of_one_step_uses_the_peak(warmup):
    assert rates(1, warmup, peak=2e-5) == [2e-5]


def test_without_warmup_the_first_step_has_the_peak():
    assert rates(10, warmup=0)[0] == 1


@settings(max_examples=60, deadline=None)
@given(num_steps=st.integers(1, 400), warmup=st.floats(0, 1, exclude_max=True))
def test_the_rate_is_never_above_the_peak_nor_zero_nor_nan(num_steps, warmup):
    assert all(math.isfinite(rate) and 0 < rate <= 2e-3 for rate in rates(num_steps, warmup, peak=2e-3))


# Batches


@pytest.mark.parametrize(
    ("size", "micro", "world_size", "accumulation"),
    [(128, 16, 1, 8), (128, 16, 8, 1), (16, 8, 2, 1), (12, 2, 3, 2), (1, 1, 1, 1)],
)
def test_a_global_batch_is_cut_exactly(size, micro, world_size, accumulation):
    cfg = composed("engine=reference", f"batch.size={size}", f"batch.micro={micro}", "seed=5")
    plan = config.batch_plan(cfg, num_examples=1000, world_size=world_size)
    assert plan == BatchPlan(size=size, world_size=world_size, num_steps=max(1, round(1000 / size)), seed=5)

    examples = Examples.of(Example([7] * length, [7] * length, {}) for length in range(1, 151))
    short = replace(plan, num_steps=2)
    collator = Collator(tiny.processor(), family_of(tiny.llava()), Identity())
    batcher = PaddedBatcher(collator, examples, short, micro=micro)
    for rank in range(world_size):
        batches = MicroBatches(batcher, short, rank=rank, has_gradient=has_media(examples))
        assert len(batches) == 2 * accumulation == 2 * batches.num_micro_batches(0)
        assert {len(batches[part].input_ids) for part in range(len(batches))} == {micro}


# The plan


def plan_of(capsys, monkeypatch, *overrides):
    """The rows of the plan, by name."""
    monkeypatch.setenv("COLUMNS", "200")
    print_plan(composed(*overrides), world_size=1)
    cells = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines()]
    return {row[1]: row[2] for row in cells if len(row) == 4}


SIZES = {3: "672 x 336 px", 4: "336 x 1008 px", 5: "672 x 672 px"}
FULL = {3: "1,776", 4: "2,328", 5: "2,928"}  # packed by the model: without padding, with row ends


@pytest.mark.parametrize("budget", [160, 320, 640])
@pytest.mark.parametrize("reducer", ["visionzip", "random"])
def test_the_plan_says_what_a_budget_of_five_tiles_means(capsys, monkeypatch, reducer, budget):
    plan = plan_of(capsys, monkeypatch, "model=next-7b", f"reducer={reducer}", f"reducer.budget={budget}")
    tiles = {name: value for name, value in plan.items() if "tiles" in name}
    each = budget // 5
    assert tiles == {
        f"image of {n} tiles": f"{FULL[n]} before, {n * each} after ({SIZES[n]})" for n in (3, 4, 5)
    }
    assert plan["budget"].startswith(f"{budget} is the total of 5 tiles: {each} each")


def test_the_plan_of_the_model_as_it_is_has_no_budget(capsys, monkeypatch):
    plan = plan_of(capsys, monkeypatch, "model=next-7b", "reducer=identity")
    assert plan["image of 5 tiles"] == "2,928 before, 2,928 after (672 x 672 px)" and "budget" not in plan


def test_the_plan_of_spatial_order_counts_row_ends(capsys, monkeypatch):
    plan = plan_of(capsys, monkeypatch, "model=next-7b", "reducer.anyres=spatial")
    assert plan["image of 5 tiles"].startswith(
        f"2,928 before, {160 + 48} after"
    )  # 2 tiles of 24 rows of patches
    assert plan["image of 3 tiles"].startswith(f"1,776 before, {96 + 48} after")


def test_the_plan_of_one_tile_or_frame(capsys, monkeypatch):
    plan = plan_of(capsys, monkeypatch, "model=llava-7b")
    assert plan["tokens an image"] == "576 before, 64 after" and not any(
        "tiles" in name or "video" in name for name in plan
    )
    plan = plan_of(capsys, monkeypatch, "model=video-llava-7b")
    assert plan["tokens an image"] == "256 before, 17 after"
    assert plan["video of 8 frames"] == "2,056 before, 136 after"
    assert "budget" not in plan
    plan = plan_of(capsys, monkeypatch, "model=video-llava-7b", "model.num_frames=4")
    assert plan["video of 4 frames"] == "1,028 before, 68 after"


def test_the_plan_of_many_tiles_shows_some_and_the_video(capsys, monkeypatch):
    plan = plan_of(capsys, monkeypatch, "model=onevision-0.5b")
    tiles = [int(name.split()[2]) for name in plan if name.startswith("image of")]
    assert tiles[0] == 2 and tiles[-1] == 37 and len(tiles) == 5 and tiles == sorted(tiles)
    assert (
        plan["image of 2 tiles"] == "1,485 before, 162 after (384 x 384 px)"
    )  # 729 + 27 rows of 27 and their ends
    assert plan["image of 37 tiles"].startswith("7,371 before, 2,997 after")  # pooled to 81 x 81, and ends
    assert plan["video of 32 frames"] == f"{32 * 14 * 14 + 1:,} before, {32 * 81 + 1:,} after"
    assert "budget" not in plan


def test_the_plan_of_videos_for_a_model_of_images_is_refused(capsys):
    with pytest.raises(UserError, match="'llava' models take no videos"):
        print_plan(composed("model=llava-7b", "data=videochatgpt"), world_size=1)


@pytest.mark.parametrize(
    ("override", "named"),
    [("reducer.budget=1000", "reducer.budget=1000"), ("reducer.layer=25", "reducer.layer=25 .* has 24")],
)
def test_a_plan_that_no_run_can_have_is_refused(override, named):
    with pytest.raises(UserError, match=named):
        print_plan(composed("model=llava-7b", override), world_size=1)


def test_costs_follow_tiles_tokens_and_layers():
    family = counted("llava-7b")

    def cost(layer=None, *, num_tiles=1, num_visual_tokens=64):
        reducer = VisionZip(budget=64, layer=layer)
        return example_cost(
            family, reducer, num_tiles=num_tiles, num_visual_tokens=num_visual_tokens, num_text_tokens=100
        )

    plain = cost()
    patches, width, inner = 576, 1024, 4096
    layer = patches * 2 * (4 * width**2 + 2 * width * inner) + 4 * patches**2 * width
    assert plain.tower == pytest.approx(23 * layer, rel=1e-6)
    assert plain.projector == 2 * 64 * 2 * (width * 4096 + 4096**2)
    assert cost(num_tiles=5).tower == 5 * plain.tower and cost(num_tiles=5).language == plain.language
    assert (
        cost(num_visual_tokens=320).projector == 5 * plain.projector
        and cost(num_visual_tokens=320).tower == plain.tower
    )
    assert cost(4).tower == cost(-2).tower == plain.tower  # the features' layer is the later one
    assert cost(-1).tower == pytest.approx(24 * layer, rel=1e-6)


# The control


def control_of(*overrides):
    """(the control's row, the settings of its run)."""
    asked = []

    def tune(cfg):
        asked.append(cfg)
        return [{"name": "tuned", "metrics": {"all": 0.5}}]

    rows = control_row(composed("control=true", *overrides), tune)
    (cfg,) = asked
    return rows, cfg


def test_without_control_nothing_else_is_tuned():
    assert control_row(composed(), lambda cfg: pytest.fail("tuned")) == []


def test_the_control_has_as_many_random_tokens_and_its_own_name():
    rows, cfg = control_of("name=mine")
    assert rows == [{"name": "random", "metrics": {"all": 0.5}}]
    assert config.build_reducer(cfg).settings() == {"budget": 8, "anyres": "released"}
    assert cfg.name == "mine-random" and not cfg.control and not cfg.evaluate.baselines
    assert (cfg.seed, cfg.optim, cfg.batch) == (0, composed().optim, composed().batch)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("reducer.budget=320",),
        ("reducer.anyres=spatial",),
        ("reducer.keep_cls=false",),
        ("reducer.budget=null", "reducer.dominant=20", "reducer.contextual=3"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "model", ["next-7b", "onevision-0.5b", "video-llava-7b", "mini-gemini-7b", "llava-7b"]
)
def test_the_control_of_every_family_has_as_many_tokens(model, overrides):
    if "reducer.budget=320" in overrides and model == "video-llava-7b":
        overrides = ("reducer.budget=200",)
    cfg = composed("control=true", f"model={model}", *overrides)
    _, other = control_of(f"model={model}", *overrides)
    check(other)
    family, reducer, control = counted(model), config.build_reducer(cfg), config.build_reducer(other)
    assert control.budget == reducer.dominant + reducer.contextual
    for size in family.image_sizes:
        assert family.num_image_tokens(control, size) == family.num_image_tokens(reducer, size)
    if "video" in family.kinds:
        assert family.num_video_tokens(control, 8) == family.num_video_tokens(reducer, 8)
    assert config.run_name(other) != config.run_name(cfg)


def test_a_control_of_all_tokens_is_a_user_error():
    cfg = composed("control=true", "reducer=identity")
    with pytest.raises(UserError):
        check(cfg)
        control_row(cfg, lambda cfg: [{"name": "tuned"}])


# The loss


def gradients_of(model, loss):
    """The projector's gradients."""
    model.zero_grad()
    loss.backward()
    return [parameter.grad for parameter in model.model.multi_modal_projector.parameters()]


def frozen_but_the_projector(kind, dtype=torch.float32):
    model = tiny.llava(kind, dtype=dtype).requires_grad_(False)
    model.model.multi_modal_projector.float().requires_grad_(True)
    return model


ENGINES = pytest.mark.parametrize("engine", ["reference", "fast"])


def our_loss(engine, family, collate, examples):
    """The sum over the label tokens of the rows, packed behind what they all begin with, or padded."""
    reducer = collate.reducer
    if engine == "reference":
        return ReferenceLoss(family, reducer, text_has_gradient=True)(collate(examples))[0]
    prefix = shared_prefix(examples, [family.placeholder_id(kind) for kind in collate.kinds])
    assert bool(prefix) == any(example.media for example in examples)
    batch = Packer(collate, num_prefix=len(prefix))(examples)
    return FastLoss(family, [reducer], prefix=prefix, recompute=False)(batch)[0]


def both_losses(engine, kind, handle, texts, folder, kinds=None):
    """(ours, the stock model's): sums over the label tokens of the texts' rows."""
    texts, model = [f"see: {text}" for text in texts], handle.family.model
    examples = examples_of(texts, folder)
    kinds, processor = kinds or examples.kinds, tiny.processor(kind)
    collate = Collator(processor, handle.family, handle.reducer, kinds=kinds, num_frames=NUM_FRAMES)
    inputs = process(handle.processor(processor), texts, examples)
    inputs = {
        name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()
    }
    lengths = inputs["attention_mask"].sum(dim=1, keepdim=True)
    at = torch.arange(inputs["input_ids"].shape[1])
    labels = torch.where((at < lengths) & (at >= lengths - NUM_LABELS), inputs["input_ids"], -100)
    plain = model(**inputs, labels=labels).loss * NUM_LABELS * len(texts)
    return our_loss(engine, handle.family, collate, examples), plain


LOSS_REDUCERS = [
    Identity(),
    VisionZip(dominant=4, contextual=2),
    VisionZip(dominant=4, contextual=2, anyres="spatial"),
    VisionZip(dominant=3, contextual=4, merge="average", keep_cls=False, layer=1),
]


@ENGINES
@pytest.mark.parametrize("reducer", LOSS_REDUCERS, ids=repr)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_loss_and_gradients_are_the_stock_models(tmp_path, kind, reducer, engine):
    model = frozen_but_the_projector(kind)
    with vzip.attach(model, reducer=reducer) as handle:
        ours, plain = both_losses(engine, kind, handle, texts_of(kind), tmp_path)
        assert ours.item() == pytest.approx(plain.item(), rel=1e-6) and ours > 0
        for one, other in zip(gradients_of(model, ours), gradients_of(model, plain), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))
            assert other.abs().max() > 0


@ENGINES
@pytest.mark.parametrize(
    ("kind", "rows"), [(kind, rows) for kind in tiny.VIDEO for rows in (IMAGE_TEXTS, VIDEO_TEXTS[:1])]
)
def test_a_blank_picture_or_video_changes_no_loss(tmp_path, kind, rows, engine):
    model = frozen_but_the_projector(kind)
    with vzip.attach(model, dominant=4, contextual=2) as handle:
        ours, plain = both_losses(engine, kind, handle, rows, tmp_path, kinds=handle.family.kinds)
        assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
        for one, other in zip(gradients_of(model, ours), gradients_of(model, plain), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))


@ENGINES
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_text_alone_runs_all_modules_and_gives_no_gradient(tmp_path, kind, engine):
    """Under ZeRO 3 the ranks wait for each other in every module."""
    model = frozen_but_the_projector(kind)
    with vzip.attach(model, dominant=4, contextual=2) as handle:
        family, run = handle.family, []
        kinds, towers = (
            family.kinds,
            {part for title, part in family.frozen_parts.items() if "tower" in title},
        )
        for part in (*towers, family.projector):
            part.register_forward_hook(lambda module, *_: run.append(module))
        examples = examples_of(["no picture", "nor here"], tmp_path)
        collate = Collator(tiny.processor(kind), family, handle.reducer, kinds=kinds, num_frames=NUM_FRAMES)
        batch, loss = collate(examples), our_loss(engine, family, collate, examples)
        assert batch.num_placeholders == dict.fromkeys(kinds, 0) and set(run) == {*towers, family.projector}
        assert run.count(family.projector) == len(kinds)
        gradients = gradients_of(model, loss)
        assert all(value is not None and not value.any() for value in gradients)
        if engine == "fast":  # it leaves such rows out, and runs this in their place
            run.clear()
            nothing = FastLoss(family, [handle.reducer], prefix=[7, 8], recompute=False)(
                Packer(collate, num_prefix=2)([])
            )[0]
            assert nothing == 0 and set(run) == {*towers, family.projector}
            assert all(value is not None and not value.any() for value in gradients_of(model, nothing))
        plain = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss
        assert loss.item() == pytest.approx(plain.item() * NUM_LABELS * 2, rel=1e-6)


@ENGINES
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_half_precision_model_takes_its_pictures_in_its_own_precision(tmp_path, kind, engine):
    model = frozen_but_the_projector(kind, torch.bfloat16)
    with vzip.attach(model, dominant=4, contextual=2) as handle:
        ours, plain = both_losses(engine, kind, handle, texts_of(kind), tmp_path)
        assert ours.dtype == torch.float32 and ours.item() == pytest.approx(plain.item(), rel=1e-2)
        assert all(
            value.dtype == torch.float32 and value.isfinite().all() for value in gradients_of(model, ours)
        )

        collate = Collator(tiny.processor(kind), handle.family, handle.reducer, kinds=handle.family.kinds)
        batch = collate(examples_of(["no picture"], tmp_path))
        for media, inputs in batch.media.items():
            cast = media_inputs(batch, media, torch.bfloat16)
            assert {cast[name].dtype for name in cast if "pixel" in name} == {torch.bfloat16}
            assert all(
                torch.equal(cast[name], inputs[name]) for name in cast if "pixel" not in name
            )  # sizes and counts


# Grades


@pytest.mark.parametrize("answer", ["yes", "Yes", " yes.", "YES!\n", "'yes'", ". yes ."])
def test_answers_that_mean_the_same_are_equal(answer):
    assert _normal(answer) == "yes"


@pytest.mark.parametrize("answer", ["no", "yes, it is", "y e s", ""])
def test_other_answers_are_not(answer):
    assert _normal(answer) != "yes"


def graded(**kinds):
    return [
        {"kind": kind, "correct": bool(correct), "num_visual_tokens": 64}
        for kind, corrects in kinds.items()
        for correct in corrects
    ]


def test_score_is_the_share_of_correct_answers_by_kind():
    row = score("full", graded(yesno=[1, 0], open=[1, 1, 1, 0]))
    assert row == {
        "name": "full",
        "num_visual_tokens": 64,
        "num_questions": 6,
        "metrics": {"open": 0.75, "yesno": 0.5, "all": pytest.approx(4 / 6)},
    }
    assert list(row["metrics"])[-1] == "all"


def test_score_counts_an_answer_without_a_kind_once():
    assert score("full", graded(all=[1, 0, 0, 0]))["metrics"] == {"all": 0.25}
    assert score("full", graded(all=[1], open=[0, 0, 0]))["metrics"] == {"open": 0, "all": 0.25}


@pytest.mark.parametrize(
    ("counts", "mean", "shown"),
    [([96, 160], 128, "128"), ([96, 96, 160], 117.3, "117.3"), ([0, 17], 8.5, "8.5"), ([0], 0, "0")],
)
def test_score_has_the_mean_of_the_visual_tokens(counts, mean, shown):
    row = score("free", [{"kind": "all", "correct": True, "num_visual_tokens": count} for count in counts])
    assert row["num_visual_tokens"] == mean and str(row["num_visual_tokens"]) == shown


def results(**values):
    return [{"name": name, "metrics": {"all": value}} for name, value in values.items()]


@pytest.mark.parametrize(
    ("rows", "share"),
    [
        (results(full=0.8, free=0.4, tuned=0.6), 0.5),
        (results(full=0.8, free=0.4, tuned=0.9), 1.25),
        (results(full=0.8, free=0.4, tuned=0.3), -0.25),
        (results(full=0.4, free=0.4, tuned=0.6), None),
        (results(full=0.3, free=0.4, tuned=0.6), None),
        (results(full=0.8, tuned=0.6), None),
        ([], None),
    ],
)
def test_gap_closed(rows, share):
    assert gap_closed(rows, "all") == (None if share is None else pytest.approx(share))
    assert gap_closed(rows, "open") is None


# Records

UNTRACKED = OmegaConf.create({"track": {"wandb": False, "project": None}})


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_one_line_a_step(tmp_path):
    tracker = Tracker(tmp_path, UNTRACKED, rank=0)
    for step in range(3):
        tracker.log(step, {"train/loss": 1.5 - step})
    tracker.finish()
    assert lines(tmp_path) == [{"step": step, "train/loss": 1.5 - step} for step in range(3)]


def test_a_resumed_run_forgets_the_steps_it_runs_again(tmp_path):
    tracker = Tracker(tmp_path, UNTRACKED, rank=0)
    tracker.forget_from(2)
    for step in range(5):
        tracker.log(step, {"train/loss": float(step)})
    Tracker(tmp_path, UNTRACKED, rank=1).forget_from(0)
    assert len(lines(tmp_path)) == 5
    tracker.forget_from(3)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]
    tracker.log(3, {"train/loss": 9.0})
    assert lines(tmp_path)[-1] == {"step": 3, "train/loss": 9.0}


def test_a_line_that_a_kill_cut_short_does_not_stop_the_resumed_run(tmp_path):
    tracker = Tracker(tmp_path, UNTRACKED, rank=0)
    tracker.log(0, {"train/loss": 1.0})
    with tracker.path.open("a") as file:
        file.write('{"step": 1, "train/lo')
    tracker.forget_from(1)
    tracker.log(1, {"train/loss": 2.0})
    assert [line["step"] for line in lines(tmp_path)] == [0, 1]


def test_other_ranks_write_nothing(tmp_path):
    tracker = Tracker(tmp_path, OmegaConf.create({"track": {"wandb": True, "project": "vzip"}}), rank=1)
    tracker.log(0, {"train/loss": 1.0})
    tracker.forget_from(0)
    tracker.log_results([], [], [])
    tracker.finish()
    assert list(tmp_path.iterdir()) == []


def test_memory_is_in_gigabytes():
    assert 0.05 < memory_gb(torch.device("cpu")) < 1000


@pytest.mark.parametrize("broken", [object(), float], ids=["object", "class"])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, broken):
    path = tmp_path / "result.json"
    write_json(path, {"rows": [1, "é"]})
    with pytest.raises(TypeError):
        write_json(path, {"rows": [2, broken]})
    assert json.loads(path.read_text()) == {"rows": [1, "é"]}


def test_a_written_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, [1])
    write_json(path, [2])
    assert json.loads(path.read_text()) == [2] and [file.name for file in tmp_path.iterdir()] == [
        "result.json"
    ]
