"""The parts around the training loop: schedule, settings, names, grades, records."""

import errno
import json
import math
import os
import pty
import subprocess
import sys
from functools import cache
from itertools import pairwise

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from data.dataset import BatchPlan
from tests.conftest import ROOT
from train import config
from train.checkpoint import write_json
from train.control import control_row
from train.evaluate import _normal, gap_closed, score
from train.loop import learning_rate
from train.track import Tracker, _has_key, memory_gb
from vzip import UserError
from vzip.reducers.visionzip import VisionZip


@cache
def settings_of(*overrides):
    """The run's settings, as the command line composes them."""
    config.register()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("tune", overrides=list(overrides))


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


# Settings


def test_the_defaults_pass_the_check():
    config.check(settings_of())


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("batch.size=0", "batch.size=0"),
        ("batch.micro=-1", "batch.micro=-1"),
        ("save_every=0", "save_every=0"),
        ("optim.epochs=0", r"optim.epochs=0"),
        ("optim.lr=-1e-5", r"optim.lr=-1e-05"),
        ("optim.warmup=1", r"optim.warmup=1"),
        ("optim.warmup=-0.1", r"optim.warmup=-0.1"),
        ("weights=none", "weights=none"),
        ("optim.lr=nan", "optim.lr"),
        ("optim.max_steps=0", "optim.max_steps"),
        ("optim.max_steps=-1", "optim.max_steps"),
        ("evaluate.batch=0", "evaluate.batch"),
        ("data.fraction=abc", "data.fraction"),
        ("model.dtype=float99", "model.dtype"),
    ],
)
def test_a_value_that_no_run_can_have_is_refused_by_name(override, named):
    with pytest.raises((UserError, HydraException)) as error:
        config.check(settings_of(override))
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("size", "micro", "world_size", "accumulation"),
    [(128, 16, 1, 8), (128, 16, 8, 1), (16, 8, 2, 1), (12, 2, 3, 2), (1, 1, 1, 1)],
)
def test_a_global_batch_is_cut_exactly(size, micro, world_size, accumulation):
    cfg = settings_of(f"batch.size={size}", f"batch.micro={micro}", "seed=5")
    plan = config.batch_plan(cfg, num_rows=1000, world_size=world_size)
    assert plan == BatchPlan(
        micro=micro, accumulation=accumulation, world_size=world_size, num_steps=max(1, round(1000 / size)), seed=5
    )
    assert plan.size == size


@pytest.mark.parametrize(
    ("overrides", "num_rows", "num_steps"),
    [
        ((), 400, 25),
        ((), 3, 1),
        (("optim.epochs=2.5",), 400, 62),
        (("optim.epochs=0.1",), 400, 2),
        (("optim.max_steps=7",), 400, 7),
        (("optim.max_steps=700",), 400, 25),
    ],
)
def test_steps_follow_from_rows_and_epochs(overrides, num_rows, num_steps):
    cfg = settings_of("batch.size=16", "batch.micro=8", *overrides)
    assert config.batch_plan(cfg, num_rows=num_rows, world_size=1).num_steps == num_steps


def test_a_batch_that_can_not_be_cut_names_what_fits():
    with pytest.raises(UserError, match=r"batch\.size=12 .* batch\.micro=8 x 1 ranks; batch\.micro can be 1, 2, 3, 4, 6, 12$"):
        config.batch_plan(settings_of("batch.size=12", "batch.micro=8"), num_rows=100, world_size=1)
    with pytest.raises(UserError, match=r"x 2 ranks; batch\.micro can be 1, 2, 3, 6$"):
        config.batch_plan(settings_of("batch.size=12", "batch.micro=4"), num_rows=100, world_size=2)
    with pytest.raises(UserError, match="multiple of 5"):
        config.batch_plan(settings_of("batch.size=12", "batch.micro=4"), num_rows=100, world_size=5)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 64), micro=st.integers(1, 64), world_size=st.integers(1, 9))
def test_what_the_plan_advises_works(size, micro, world_size):
    cfg = OmegaConf.merge(settings_of(), {"batch": {"size": size, "micro": micro}})
    try:
        plan = config.batch_plan(cfg, num_rows=100, world_size=world_size)
    except UserError as error:
        advice = str(error).split("; ")[1]
        fits = [int(number) for number in advice.removeprefix("batch.micro can be ").split(", ")] if "micro" in advice else []
        assert bool(fits) == (size % world_size == 0)
        for fitting in fits:
            config.batch_plan(OmegaConf.merge(cfg, {"batch": {"micro": fitting}}), num_rows=100, world_size=world_size)
    else:
        assert plan.size == size and plan.micro == micro


def test_a_data_file_without_rows_is_a_user_error():
    with pytest.raises(UserError, match="holds no rows"):
        config.batch_plan(settings_of(), num_rows=0, world_size=1)


# Names


def test_the_name_is_a_function_of_the_settings():
    name = config.run_name(settings_of("seed=3"))
    assert name == config.run_name(settings_of("seed=3").copy())
    assert name.startswith("smol-visionzip-8-projector-seed3-")
    assert config.run_name(settings_of("reducer=identity")).startswith("smol-identity-projector-seed0-")
    assert config.run_name(settings_of("name=mine", "seed=3")) == "mine"


@pytest.mark.parametrize(
    "override",
    [
        "optim.lr=1e-4",
        "model.budget=9",
        "data.fraction=0.2",
        "seed=1",
        "tune=projector_lora",
        "batch.micro=4",
        "weights=random",
    ],
)
def test_the_name_changes_with_a_setting(override):
    assert config.run_name(settings_of(override)) != config.run_name(settings_of())


@pytest.mark.parametrize("override", ["fresh=true", "track=none", "dry_run=true", "runs=elsewhere"])
def test_the_name_does_not_change_with_what_is_no_part_of_a_run(override):
    assert config.run_name(settings_of(override)) == config.run_name(settings_of())


# Building, and teaching


def test_build_makes_what_the_target_names():
    reducer = config.build(settings_of("model.budget=64", "reducer.merge=average").reducer)
    assert isinstance(reducer, VisionZip) and reducer.settings() == {"dominant": 54, "contextual": 10, "merge": "average"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reducer.budget=null", "give reducer.budget"),
        ("reducer.merge=median", "reducer.merge='median' does not exist"),
        ("reducer.contextual=-1", "give reducer.budget, or both"),
    ],
)
def test_build_turns_a_reducers_mistake_into_that_very_error(override, message):
    with pytest.raises(UserError) as error:
        config.build(settings_of(override).reducer)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("node", [{"budget": 8, "bugdet": 3}, {"budget": "many"}])
def test_build_turns_any_other_mistake_into_a_user_error(node):
    target = "vzip.reducers.random.Random"
    with pytest.raises(UserError, match=target):
        config.build(OmegaConf.create({"_target_": target, **node}))


def test_build_names_a_target_that_does_not_exist():
    with pytest.raises(UserError, match=r"vzip\.reducers\.nosuch"):
        config.build(OmegaConf.create({"_target_": "vzip.reducers.nosuch.NoSuch"}))


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        ("UserError('optim.lr=0 must be positive')", "error: optim.lr=0 must be positive\n"),
        ("OSError(28, 'No space left on device')", "error: the disk is full"),
    ],
)
def test_teach_prints_the_mistake_and_exits_2(raised, message):
    code = (
        "from train.config import teach; from vzip import UserError\n"
        f"@teach\ndef main(): raise {raised}\n"
        "main(); print('went on')"
    )
    env = {key: value for key, value in os.environ.items() if key != "RANK"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert done.stderr.startswith(message) and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_teach_lets_everything_else_through(monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail(f"exit {code}"))  # it would end pytest itself

    @config.teach
    def command(error):
        if error:
            raise error

    command(None)
    for error in (PermissionError(errno.EACCES, "no"), ValueError("a bug"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            command(error)


# The control


def test_the_control_has_as_many_random_tokens_and_its_own_name():
    asked = []

    def tune(cfg):
        asked.append(cfg)
        return [{"name": "tuned", "metrics": {"all": 0.5}}]

    assert control_row(settings_of(), tune) == [] and asked == []
    assert control_row(settings_of("control=true", "name=mine"), tune) == [{"name": "random", "metrics": {"all": 0.5}}]
    (cfg,) = asked
    assert config.build(cfg.reducer).settings() == {"budget": 8}
    assert cfg.name == "mine-random" and not cfg.control and not cfg.evaluate.baselines
    assert (cfg.seed, cfg.optim, cfg.batch) == (0, settings_of().optim, settings_of().batch)


def test_a_control_of_all_tokens_is_a_user_error():
    cfg = settings_of("control=true", "reducer=identity")
    with pytest.raises(UserError):
        config.check(cfg)
        control_row(cfg, lambda cfg: [{"name": "tuned"}])


# Grades


@pytest.mark.parametrize("answer", ["yes", "Yes", " yes.", "YES!\n", "'yes'", ". yes ."])
def test_answers_that_mean_the_same_are_equal(answer):
    assert _normal(answer) == "yes"


@pytest.mark.parametrize("answer", ["no", "yes, it is", "y e s", ""])
def test_other_answers_are_not(answer):
    assert _normal(answer) != "yes"


def graded(**kinds):
    return [{"kind": kind, "correct": bool(correct)} for kind, corrects in kinds.items() for correct in corrects]


def test_score_is_the_share_of_correct_answers_by_kind():
    row = score("full", 64, graded(yesno=[1, 0], open=[1, 1, 1, 0]))
    assert row == {
        "name": "full",
        "num_image_tokens": 64,
        "num_questions": 6,
        "metrics": {"open": 0.75, "yesno": 0.5, "all": pytest.approx(4 / 6)},
    }
    assert list(row["metrics"])[-1] == "all"


def test_score_counts_an_answer_without_a_kind_once():
    assert score("full", 64, graded(all=[1, 0, 0, 0]))["metrics"] == {"all": 0.25}
    assert score("full", 64, graded(all=[1], open=[0, 0, 0]))["metrics"] == {"open": 0, "all": 0.25}


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


def test_a_key_is_found_where_wandb_looks_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not _has_key()
    netrc = tmp_path / ".netrc"
    for content, found in (("machine other.host login user password x\n", False), ("no netrc at all", False)):
        netrc.write_text(content)
        netrc.chmod(0o600)
        assert _has_key() is found
    netrc.write_text("machine api.wandb.ai login user password x\n")
    assert _has_key()
    netrc.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert _has_key()


@pytest.mark.parametrize("mode", [{}, {"WANDB_MODE": "offline"}], ids=["no key", "asked for"])
def test_wandb_without_a_key_is_offline_and_never_prompts(tmp_path, mode):
    pytest.importorskip("wandb")
    code = (
        "import sys; from pathlib import Path; from omegaconf import OmegaConf; from train.track import Tracker\n"
        "cfg = OmegaConf.create({'track': {'wandb': True, 'project': 'vzip'}, 'seed': 0})\n"
        "tracker = Tracker(Path(sys.argv[1]), cfg, rank=0)\n"
        "tracker.log(0, {'train/loss': 1.0}); tracker.finish()"
    )
    run = tmp_path / "my-run"
    run.mkdir()
    env = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "NETRC"))}
    env |= {"HOME": str(tmp_path), **mode}
    main, terminal = pty.openpty()  # a prompt would wait here for a person, and run into the time limit
    with os.fdopen(main), os.fdopen(terminal, "w"):
        command = [sys.executable, "-c", code, str(run)]
        subprocess.run(command, cwd=ROOT, env=env, stdin=terminal, stdout=terminal, timeout=120, check=True)

    assert len(list(run.glob("wandb/offline-run-*/run-my-run.wandb"))) == 1
    assert lines(run) == [{"step": 0, "train/loss": 1.0}]


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
    assert json.loads(path.read_text()) == [2] and [file.name for file in tmp_path.iterdir()] == ["result.json"]
