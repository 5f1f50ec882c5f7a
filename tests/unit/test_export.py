"""The commands that write an export with its card, and push it to the hub."""

import argparse
import json
import os
import signal
import stat
import sys

import pytest
import torch
from huggingface_hub import ModelCard, constants
from omegaconf import OmegaConf

from scripts import push
from scripts.export import main as command
from tests.helpers import tiny
from tests.helpers.configs import composed
from tests.helpers.runs import attached, save_run, tune
from vzip import UserError
from vzip.runs.projector import WEIGHTS


@pytest.fixture
def run(tmp_path, tiny_folder):
    return save_run(tmp_path / "run", tune(attached(tiny_folder)), tiny_folder)


def arguments(run, to, **more):
    """Of the command."""
    absent = {"out": None, "base": None, "budget": None, "copy": False, "force": False}
    return argparse.Namespace(run=run, to=to, **{**absent, **more})


def empty(folder):
    folder.mkdir()
    return folder


def sharded(folder):
    tiny.llava().save_pretrained(folder, max_shard_size="60KB")
    tiny.processor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("to", command.FORMATS)
def test_the_command_writes_an_export_with_its_card(to, run):
    settings = composed("model=llava-7b", "optim.lr=0.002", "data.path=a/train.json")
    (run / "config.yaml").write_text(OmegaConf.to_yaml(settings, resolve=True))
    rows = [
        {"name": "full", "num_visual_tokens": 16, "num_questions": 8, "metrics": {"open": 0.5, "all": 0.25}},
        {"name": "tuned", "num_visual_tokens": 6, "num_questions": 8, "metrics": {"open": 0.4, "all": 0.25}},
    ]
    (run / "result.json").write_text(json.dumps({"rows": rows}))
    meta = json.loads((run / "meta.json").read_text())
    data = {"hash": "f00d", "num_rows": 1234, "fraction": 0.1, "seed": 3}
    (run / "meta.json").write_text(json.dumps(meta | {"data": data}))
    target = command.export(arguments(run, to))
    assert target == run / "export" / to and command.has_our_card(target)
    card = (target / "README.md").read_text()
    said = [
        "# llava-7b,",
        "VisionZip(4 dominant + 2 contextual)",
        "| tuned | 6 | 8 | .400 (80%) | .250 (100%) |",
        "1,234 examples of `train.json`",
    ]
    said += ["seed 3; manifest hash `f00d`", "lr: 0.002", "licence, which is unknown here", "Apache-2.0"]
    assert [words for words in said if words not in card] == []
    scores = [(result.metric_name, result.metric_value) for result in ModelCard(card).data.eval_results]
    assert scores == [("open, 6 visual tokens", 0.4), ("all, 6 visual tokens", 0.25)]
    assert (
        str(run) not in card and meta["base"]["id"] not in card
    )  # places on this machine are nobody's concern
    assert [path.name for path in (run / "export").iterdir()] == [to]


def test_the_card_names_the_bases_licence(tmp_path):
    base = tiny.save_llava(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: llama2\n---\n# A base\n")
    target = command.export(arguments(save_run(tmp_path / "run", attached(base), base), "llava"))
    card = (target / "README.md").read_text()
    assert "license: llama2\n" in card and "under its licence: llama2, according to its card" in card


def test_a_card_that_is_no_yaml_names_no_licence_and_is_no_export(tmp_path):
    base = tiny.save_llava(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: [llama2\n---\n# A base\n")
    target = command.export(arguments(save_run(tmp_path / "run", attached(base), base), "llava"))
    assert "licence, which is unknown here" in (target / "README.md").read_text()
    with pytest.raises(UserError, match="is no export, so that it is not replaced"):
        command.check_target(base, force=True)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_are_for_whom_the_umask_lets_read_and_linked_ones_stay(umask, mode, tmp_path):
    base = sharded(tmp_path / "base")
    run = save_run(tmp_path / "run", tune(attached(base)), base)
    before = {path: path.stat().st_mode for path in base.iterdir()}
    old = os.umask(umask)
    try:
        target = command.export(arguments(run, "hf"))
    finally:
        os.umask(old)
    own = [path for path in target.iterdir() if path.stat().st_nlink == 1]
    assert target / WEIGHTS in own and {stat.S_IMODE(path.stat().st_mode) for path in own} == {mode}
    assert {path: path.stat().st_mode for path in base.iterdir()} == before


def full(*_, **__):
    raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")


@pytest.mark.parametrize("place", ["/proc/nothing/hf", "file/x", "full"])
def test_a_place_that_can_not_be_written_is_refused(place, run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    if place == "full":
        monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"can't be written.*\n.*choose another place with --out"):
        command.export(arguments(run, "llava", out=tmp_path / place))
    assert not (tmp_path / "full").exists()


def test_only_an_older_export_is_replaced_and_only_when_asked(run, tmp_path, tiny_folder):
    target = command.export(arguments(run, "llava"))
    with pytest.raises(UserError, match="is an export already; replace it with --force"):
        command.export(arguments(run, "llava"))
    (target / "left").write_text("")
    command.export(arguments(run, "llava", force=True))
    assert not (target / "left").exists() and (target / "mm_projector.bin").is_file()
    with pytest.raises(UserError, match="is there already and is no export"):
        command.export(arguments(run, "hf", out=tiny_folder, force=True))


@pytest.mark.parametrize(
    ("to", "more", "words"),
    [
        ("gguf", {}, "TO=gguf is unknown; choose one of: hf, llava, peft"),
        ("peft", {"copy": True}, "are of TO=hf, not of TO=peft"),
        ("llava", {"budget": 6}, "are of TO=hf, not of TO=llava"),
        ("hf", {"base": "nowhere"}, "the base model nowhere can't be loaded"),
    ],
)
def test_a_refused_export_leaves_nothing(to, more, words, run, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=words):
        command.export(arguments(run, to, **more))
    assert not (run / "export").is_dir() or not list((run / "export").iterdir())


def test_a_kill_while_it_writes_leaves_no_export_and_the_next_one_cleans_up(tmp_path):
    target = tmp_path / "hf"
    child = os.fork()
    if not child:
        with command.written_beside(target) as folder:
            (folder / "half").write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert not target.exists()
    with command.written_beside(target) as folder:
        (folder / "whole").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"] and [
        path.name for path in target.iterdir()
    ] == ["whole"]
    with pytest.raises(RuntimeError), command.written_beside(target) as folder:
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["hf"] and (target / "whole").is_file()


def test_push_lists_what_links_lead_to_and_refuses_what_is_gone(tmp_path, capsys, monkeypatch):
    folder = empty(tmp_path / "hf")
    (folder / "README.md").write_text("---\ntags: [vzip]\n---\n")
    (tmp_path / "shard").write_bytes(bytes(5_000_000))
    (folder / "model-1.safetensors").symlink_to(tmp_path / "shard")
    monkeypatch.setattr(sys, "argv", ["push.py", str(folder), "--repo", "me/model", "--private", "--dry-run"])
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    push.main()
    shown = capsys.readouterr().out
    assert "model-1.safetensors" in shown and shown.count("5.000") == 2
    assert f"{folder} to me/model, private if it is new" in shown and "nothing was sent" in shown
    (tmp_path / "shard").unlink()
    with pytest.raises(UserError, match=r"model-1.safetensors link to files of the base model that are gone"):
        push.files_of(folder)
    with pytest.raises(UserError, match="is not an export"):
        push.files_of(tmp_path)


def test_push_teaches_who_has_no_token(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(UserError, match="no token for the hub"):
        push.push(tmp_path, "me/model", private=True)


@pytest.mark.parametrize(
    "fault", [("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")], ids=["offline", "no network"]
)
def test_push_says_that_there_is_no_network(fault, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr(constants, *fault)
    with pytest.raises(UserError, match="--repo me/model could not be sent"):
        push.push(tmp_path, "me/model", private=True)
