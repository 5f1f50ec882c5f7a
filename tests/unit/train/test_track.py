"""Metrics on disk; and runs in wandb: online or offline, never a prompt, never a reason for a run to fail."""

import json
import os
import pty
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from tests.conftest import ROOT
from tests.helpers.configs import composed
from train import track
from train.evaluation.questions import SettingAnswers
from train.track import INIT_TIMEOUT, Tracker, _has_key, memory_gb

pytestmark = pytest.mark.slow

wandb = pytest.importorskip("wandb")
wbauth = pytest.importorskip("wandb.sdk.lib.wbauth")

TRACKED = OmegaConf.create({"track": {"wandb": True, "project": "vzip"}})
UNTRACKED = OmegaConf.create({"track": {"wandb": False, "project": None}})
KEY = "x" * 40


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_forgets_the_steps_it_takes_again(tmp_path):
    tracker = Tracker(tmp_path, UNTRACKED, rank=0)
    tracker.forget_from(2)
    for step in range(5):
        tracker.log(step, {"train/loss": float(step)})
    assert lines(tmp_path) == [{"step": step, "train/loss": step} for step in range(5)]

    Tracker(tmp_path, UNTRACKED, rank=1).forget_from(0)
    assert len(lines(tmp_path)) == 5
    tracker.forget_from(3)
    tracker.log(3, {"train/loss": 9.0})
    tracker.finish()
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3]
    assert lines(tmp_path)[-1] == {"step": 3, "train/loss": 9.0}


def test_a_line_that_a_kill_cut_short_does_not_stop_the_resumed_run(tmp_path):
    tracker = Tracker(tmp_path, UNTRACKED, rank=0)
    tracker.log(0, {"train/loss": 1.0})
    with tracker.path.open("a") as file:
        file.write('{"step": 1, "train/lo')
    tracker.forget_from(1)
    tracker.log(1, {"train/loss": 2.0})
    assert [line["step"] for line in lines(tmp_path)] == [0, 1]


def test_lines_that_a_power_cut_damaged_are_left_out(tmp_path, capsys):
    tracker = Tracker(tmp_path, UNTRACKED, rank=0)
    for step in range(3):
        tracker.log(step, {"train/loss": float(step)})
    whole = tracker.path.read_bytes().splitlines(keepends=True)
    damaged = [b"\0" * 40 + b"\n", b"\xff\xfe\n", b'{"step": 1, "train\n', b"[1]\n", b'{"step": null}\n']
    tracker.path.write_bytes(b"".join([whole[0], *damaged, whole[1], whole[2]]))
    tracker.forget_from(2)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1]
    assert "5 damaged line(s) left out" in capsys.readouterr().out


def test_other_ranks_write_nothing(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    tracker = Tracker(folder, TRACKED, rank=1)
    tracker.log(0, {"train/loss": 1.0})
    tracker.forget_from(0)
    tracker.log_results([], [])
    tracker.finish()
    assert list(folder.iterdir()) == []


def test_memory_is_in_gigabytes():
    assert 0.05 < memory_gb(torch.device("cpu")) < 1000


def forget():
    """Make wandb look for credentials anew."""
    wandb.teardown()
    wbauth.unauthenticate_session(update_settings=False)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """That of a user without credentials."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    for name in [name for name in os.environ if name.startswith(("WANDB", "NETRC"))]:
        monkeypatch.delenv(name)
    forget()
    yield folder
    forget()


def log_in():
    """As `wandb login` does."""
    wbauth.write_netrc_auth(host=wandb.setup().settings.base_url, api_key=KEY)
    forget()


@pytest.fixture
def begun(monkeypatch):
    """What wandb.init is asked for, without running it."""
    asked = []

    monkeypatch.setattr(wandb, "init", lambda **settings: asked.append(settings))
    return asked


def test_a_key_is_found_where_wandb_keeps_it(home, monkeypatch):
    assert not _has_key()
    wbauth.write_netrc_auth(host="https://other.host", api_key=KEY)
    assert not _has_key()
    log_in()
    (home / ".netrc").chmod(0o644)
    assert _has_key()
    forget()
    monkeypatch.setenv("NETRC", str(home / "none"))
    assert not _has_key()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert _has_key()


def test_a_key_of_another_server_does_not_count(monkeypatch):
    log_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.our.company")
    assert not _has_key()


@pytest.mark.parametrize(
    ("asked", "key", "mode"),
    [
        (None, False, "offline"),
        (None, True, "online"),
        ("online", False, "offline"),
        ("offline", True, "offline"),
        ("disabled", True, "disabled"),
    ],
)
def test_a_run_is_online_where_there_is_a_key(tmp_path, monkeypatch, begun, asked, key, mode):
    if key:
        log_in()
    if asked:
        monkeypatch.setenv("WANDB_MODE", asked)
    Tracker(tmp_path, TRACKED, rank=0)
    assert [settings["mode"] for settings in begun] == [mode]


def test_a_run_without_a_network_is_offline(tmp_path, monkeypatch, capsys):
    asked = []

    def init(**settings):
        asked.append(settings)
        if settings["mode"] == "online":
            raise wandb.errors.CommError("no\nnetwork")
        return "the run"

    log_in()
    monkeypatch.setattr(wandb, "init", init)
    assert Tracker(tmp_path, TRACKED, rank=0).wandb == "the run"
    assert [settings["mode"] for settings in asked] == ["online", "offline"]
    assert all(settings["settings"].init_timeout == INIT_TIMEOUT for settings in asked)
    assert capsys.readouterr().out == "wandb can't be reached, the run is tracked offline: no network\n"


def test_a_run_with_a_malformed_key_is_offline(tmp_path, monkeypatch, capsys, begun):
    monkeypatch.setenv("WANDB_API_KEY", "bad")
    Tracker(tmp_path, TRACKED, rank=0)
    assert [settings["mode"] for settings in begun] == ["offline"]
    assert "WANDB_API_KEY invalid" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_id_and_no_other_has_it(tmp_path, begun):
    for folder in ("mine/my-run", "mine/my-run", "theirs/my-run"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        Tracker(tmp_path / folder, TRACKED, rank=0)
    first, resumed, other = (settings["id"] for settings in begun)
    assert first == resumed != other
    assert {settings["name"] for settings in begun} == {"my-run"}


def test_a_slow_upload_ends_with_the_command_that_sends_the_rest(tmp_path, monkeypatch, capsys):
    class Slow:
        dir = str(tmp_path / "wandb" / "run-1" / "files")

        def finish(self):
            raise TimeoutError

    monkeypatch.setattr(
        wandb, "init", lambda settings, **_: Slow() if settings.finish_timeout_raises else None
    )
    Tracker(tmp_path, TRACKED, rank=0).finish()
    assert f"`wandb sync {tmp_path / 'wandb' / 'run-1'}`" in capsys.readouterr().out


class Sent:
    """What a run sends to wandb."""

    id = "1"

    def __init__(self):
        self.summary = {}
        self.logged = set()

    def log(self, values, **_):
        self.logged |= set(values)

    def log_artifact(self, artifact):
        self.files = set(artifact.manifest.entries)
        self.metadata = artifact.metadata


@pytest.mark.parametrize("media", [None, False, True])
def test_pictures_and_answers_are_sent_only_on_request(tmp_path, monkeypatch, media):
    monkeypatch.setattr(wandb, "init", lambda **_: Sent())
    monkeypatch.setattr(track, "read_meta", lambda _: {"base": "http://me:s3cret@host/a"})
    for name in ("projector.safetensors", "meta.json", "config.yaml"):
        (tmp_path / name).write_bytes(b"...")
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")

    cfg = OmegaConf.merge(TRACKED, {"track": {"media": media}})
    tracker = Tracker(tmp_path, cfg, rank=0)
    answer = {
        "image": "a.png",
        "question": "a?",
        "expected": "b",
        "answer": "b",
        "kind": "open",
        "correct": True,
    }
    answer |= {"num_visual_tokens": 6}
    tracker.log_results([SettingAnswers("tuned", [answer])], [tmp_path / "a.png"])

    more = {"eval/answers", "eval/kept_tokens"} if media else set()
    assert tracker.wandb.logged == {"eval/scores"} | more
    assert tracker.wandb.summary == {"eval/tuned_open": 1.0, "eval/tuned_all": 1.0}
    assert tracker.wandb.files == {"projector.safetensors", "meta.json", "config.yaml"}
    assert tracker.wandb.metadata == {"base": "http://***@host/a"}


def test_media_stay_here_by_default():
    assert composed("track=wandb").track.media is False


@pytest.mark.integration
def test_wandb_without_a_key_is_offline_and_never_prompts(tmp_path, home):
    code = (
        "import sys; from pathlib import Path; from omegaconf import OmegaConf\n"
        "from train.track import Tracker\n"
        "track = {'wandb': True, 'project': 'vzip', 'media': False}\n"
        "cfg = OmegaConf.create({'track': track, 'data': {'address': sys.argv[2]}, 'seed': 0})\n"
        "tracker = Tracker(Path(sys.argv[1]), cfg, rank=0)\n"
        "tracker.log(0, {'train/loss': 1.0}); tracker.finish()"
    )
    run = tmp_path / "my-run"
    run.mkdir()
    main, terminal = pty.openpty()  # a prompt would wait here for a person, and run into the time limit
    with os.fdopen(main), os.fdopen(terminal, "w"):
        command = [sys.executable, "-c", code, str(run), "http://me:s3cret@host/a?sig=s3cret"]
        env = os.environ | {"WANDB_MODE": "online"}
        subprocess.run(command, cwd=ROOT, env=env, stdin=terminal, stdout=terminal, timeout=120, check=True)

    # What `wandb sync` would send holds no secret of the settings or of the command.
    assert len(list(run.glob("wandb/offline-run-*/run-*.wandb"))) == 1
    for file in run.glob("wandb/offline-run-*/**/*"):
        assert file.is_dir() or b"s3cret" not in file.read_bytes(), file
    assert json.loads((run / "metrics.jsonl").read_text()) == {"step": 0, "train/loss": 1.0}
