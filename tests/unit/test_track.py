"""Runs in wandb: online or offline, never a prompt, never a reason for a run to fail."""

import json
import os
import pty
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from tests.conftest import ROOT
from train.track import Tracker, _has_key

wandb = pytest.importorskip("wandb")
wbauth = pytest.importorskip("wandb.sdk.lib.wbauth")

TRACKED = OmegaConf.create({"track": {"wandb": True, "project": "vzip"}})
KEY = "x" * 40


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


def test_a_key_of_another_server_is_none(monkeypatch):
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


@pytest.mark.integration
def test_wandb_without_a_key_is_offline_and_never_prompts(tmp_path, home):
    code = (
        "import sys; from pathlib import Path; from omegaconf import OmegaConf; from train.track import Tracker\n"
        "cfg = OmegaConf.create({'track': {'wandb': True, 'project': 'vzip'}, 'seed': 0})\n"
        "tracker = Tracker(Path(sys.argv[1]), cfg, rank=0)\n"
        "tracker.log(0, {'train/loss': 1.0}); tracker.finish()"
    )
    run = tmp_path / "my-run"
    run.mkdir()
    main, terminal = pty.openpty()  # a prompt would wait here for a person, and run into the time limit
    with os.fdopen(main), os.fdopen(terminal, "w"):
        command = [sys.executable, "-c", code, str(run)]
        env = os.environ | {"WANDB_MODE": "online"}
        subprocess.run(command, cwd=ROOT, env=env, stdin=terminal, stdout=terminal, timeout=120, check=True)

    assert len(list(run.glob("wandb/offline-run-*/run-*.wandb"))) == 1
    assert json.loads((run / "metrics.jsonl").read_text()) == {"step": 0, "train/loss": 1.0}
