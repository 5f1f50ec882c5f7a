"""The control has as many tokens, drawn at random, and everything else in common with its run."""

import json

import pytest

from tests.helpers.configs import composed, counted
from train.checkpoint import RunFolder
from train.checks import check
from train.config import build_reducer, run_name
from train.evaluation.control import add_control, control_settings, has_control
from vzip import UserError

pytestmark = pytest.mark.slow


def test_the_control_differs_in_the_reducer_alone():
    cfg = composed("control=true", "name=mine")
    control = control_settings(cfg)
    assert control.reducer == {
        "_target_": "vzip.reducers.random.Random",
        "budget": 8,
        "anyres": "released",
    }
    assert control.name == "mine-random" and not control.control and not control.evaluate.baselines
    assert (control.seed, control.optim, control.batch) == (cfg.seed, cfg.optim, cfg.batch)
    assert control_settings(composed("control=true")).name is None


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
    control_cfg = control_settings(cfg)
    check(control_cfg)
    assert run_name(control_cfg) != run_name(cfg)

    family = counted(model)
    reducer = build_reducer(cfg)
    control = build_reducer(control_cfg)
    assert control.budget == reducer.dominant + reducer.contextual
    for size in family.image_sizes:
        assert family.num_image_tokens(control, size) == family.num_image_tokens(reducer, size)
    if "video" in family.kinds:
        assert family.num_video_tokens(control, 8) == family.num_video_tokens(reducer, 8)


def test_a_control_of_all_tokens_is_refused():
    with pytest.raises(UserError, match="control=true compares with reducer=visionzip"):
        control_settings(composed("control=true", "reducer=identity"))


def row(name, share):
    return {"name": name, "num_visual_tokens": 6, "num_questions": 8, "metrics": {"all": share}}


def test_the_controls_scores_are_added_to_the_runs(tmp_path):
    run = RunFolder(composed(f"runs={tmp_path}", "name=mine"))
    run.path.mkdir()
    run.finish([row("full", 0.9), row("tuned", 0.7)], num_steps=3, manifest={"hash": "a"})
    before = json.loads((run.path / "result.json").read_text())
    assert not has_control(before["rows"])

    rows = add_control(run, before["rows"], [row("tuned", 0.5)])
    assert rows == [*before["rows"], row("random", 0.5)]
    assert has_control(rows)
    assert json.loads((run.path / "result.json").read_text()) == {**before, "rows": rows}
