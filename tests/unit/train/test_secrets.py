"""No file of a run holds a secret of an address, and the run is still known as the same one."""

import sys

from omegaconf import OmegaConf

from data.locks import locked
from tests.helpers.configs import composed
from train.checkpoint import RunFolder, settings_without_secrets

ADDRESS = "https://me:s3cret@host/mix.json?X-Amz-Signature=s3cret"
SECRETS = [f"data.address='{ADDRESS}'", f"+data.pictures.coco=['{ADDRESS}',images.zip]"]


def files_with(secret, folder):
    return [path for path in folder.rglob("*") if path.is_file() and secret in path.read_text()]


def test_the_files_of_a_run_hold_no_secret(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train/tune.py", f"data.address={ADDRESS}"])
    cfg = composed(*SECRETS, f"runs={tmp_path}", "name=mine")
    manifest = {"hash": "a", "bad_rows": [{"id": "1", "reason": f"{ADDRESS}: answered 404"}]}

    # The second start compares its settings with those that the first one wrote.
    for _ in range(2):
        RunFolder(cfg).begin(manifest, num_trainable=1, world_size=1)
        assert files_with("s3cret", tmp_path) == []

    recorded = OmegaConf.load(tmp_path / "mine" / "config.yaml")
    assert recorded.data.address == "https://***@host/mix.json?X-Amz-Signature=***"
    assert recorded.data.pictures.coco[1] == "images.zip"

    # Without secrets, they are written as they are.
    assert settings_without_secrets(composed()) == OmegaConf.to_yaml(composed(), resolve=True)


def test_a_lock_names_its_holder_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fetch.py", f"data.address={ADDRESS}"])
    with locked(tmp_path / "lock", wait=False):
        assert "data.address" in (tmp_path / "lock.json").read_text()
        assert files_with("s3cret", tmp_path) == []
