"""Sending an export to the hub, as far as that goes without a network."""

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from scripts import push
from tests.helpers.errors import refused


def test_a_dry_run_lists_the_files_that_links_lead_to(tmp_path, call, monkeypatch):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "README.md").write_text("---\ntags: [vzip]\n---\n")
    save_file({"a": torch.zeros(1_250_000)}, tmp_path / "shard")
    (folder / "model-1.safetensors").symlink_to(tmp_path / "shard")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    printed = call(push.main, folder, "--repo", "me/model", "--private", "--dry-run")
    assert "model-1.safetensors" in printed
    assert printed.count("5.000") == 2  # of the file, and of all
    assert f"{folder} to me/model, private if it is new" in printed
    assert "nothing was sent" in printed

    (tmp_path / "shard").unlink()
    words = ["model-1.safetensors link to files of the base model that are gone"]
    refused(push.files_of, folder, words=words)
    refused(push.files_of, tmp_path, words=["is not an export"])


@pytest.mark.parametrize("name", ["notes.txt", "model-1.safetensors"])
def test_a_link_to_a_private_file_is_not_sent(tmp_path, name):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "README.md").write_text("---\ntags: [vzip]\n---\n")
    (tmp_path / "private.key").write_text("secret key of this machine")
    (folder / name).symlink_to(tmp_path / "private.key")
    refused(push.files_of, folder, words=[name, "something other than weights"])


def test_without_a_token_nothing_is_sent(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    refused(push.push, tmp_path, "me/model", private=True, words=["no token for the hub"])


@pytest.mark.parametrize(
    "fault", [("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")], ids=["offline", "no network"]
)
def test_a_missing_network_is_a_user_error(fault, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr(constants, *fault)
    refused(push.push, tmp_path, "me/model", private=True, words=["--repo me/model could not be sent"])
