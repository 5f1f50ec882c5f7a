"""Preparing the embedded default: its conversations, its stamp, and the processors of the tiny models."""

import json
import subprocess
import sys

import pytest

from scripts.prepare import smol, tiny
from tests.conftest import ROOT
from tests.helpers import tiny as tiny_models
from tests.helpers.broken import messages
from vzip.errors import UserError

QUESTIONS = [
    ["what shape?", "circle", 0],
    ["is it red?", "yes", 0],
    ["what color?", "red", 0],
    ["is it blue?", "no", 0],
    ["which one?", "circle", 0],
    ["what is it?", "circle", 0],
    ["what shape?", "square", 1],
]


def split(tmp_path, **options):
    smol.write_split(QUESTIONS, "test", tmp_path / "test.json", **options)
    return json.loads((tmp_path / "test.json").read_text())


def test_a_training_conversation_asks_some_questions_about_one_picture(tmp_path):
    first, second = split(tmp_path, held_out=False)

    assert (first["id"], first["image"]) == ("test-0", "test/0.png")
    answers = [message["value"] for message in first["conversations"] if message["from"] == "gpt"]
    assert len(answers) == 4 and len([answer for answer in answers if answer in ("yes", "no")]) == 1

    # The picture is in front of the first question only.
    questions = [message["value"] for message in first["conversations"] if message["from"] == "human"]
    assert [question.startswith("<image>\n") for question in questions] == [True, False, False, False]
    assert second["conversations"] == messages("<image>\nwhat shape?", "square")


def test_a_held_out_question_is_a_conversation_with_its_type(tmp_path):
    conversations = split(tmp_path, held_out=True)

    names = ["test-0-0", "test-0-1", "test-0-2", "test-0-3", "test-1-0"]
    assert [each["id"] for each in conversations] == names
    assert sorted(each["type"] for each in conversations) == ["open"] * 4 + ["yesno"]
    assert all(each["conversations"][0]["value"].startswith("<image>\n") for each in conversations)

    # The same questions as in training conversations, in the same order.
    training, _ = split(tmp_path, held_out=False)
    asked = [each["conversations"][1]["value"] for each in conversations[:4]]
    assert asked == [message["value"] for message in training["conversations"][1::2]]


def test_it_is_prepared_once_and_again_when_its_version_changes(tmp_path, monkeypatch):
    targets = []

    def build(target, wheels):
        targets.append(target)
        target.mkdir()

    monkeypatch.setattr(smol, "build_smol", build)
    assert smol.prepare_smol(tmp_path / "smol")
    assert not smol.prepare_smol(tmp_path / "smol")

    monkeypatch.setattr(smol, "VERSION", smol.VERSION + 1)
    assert smol.prepare_smol(tmp_path / "smol")
    assert len(targets) == 2 and [path.name for path in tmp_path.iterdir()] == ["smol"]


def test_a_full_disk_and_a_missing_package_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)  # makes its import fail
    with pytest.raises(UserError, match=r"needs the package gguf.*pip install 'vzip\[smol\]'"):
        smol.prepare_smol(tmp_path / "smol")

    monkeypatch.setattr(smol, "NEEDED_BYTES", 10**18)
    with pytest.raises(UserError, match="GB are needed; set VZIP_DATA"):
        smol.prepare_smol(tmp_path / "smol")
    assert list(tmp_path.iterdir()) == []


def test_starting_the_command_imports_no_torch():
    code = "import sys, scripts.prepare.smol; assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_tiny_model_gets_a_processor_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "VIDEO_TOKEN", "<video>")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    tiny.prepare_tiny(tmp_path / "model", tmp_path / "tiny")

    configs = {path.stem for path in (ROOT / "configs" / "model").glob("*-tiny.yaml")}
    assert {path.parent.name for path in (tmp_path / "tiny").glob("*/config.json")} == configs

    before = (tmp_path / "tiny" / "next-tiny" / "config.json").stat().st_mtime_ns
    tiny.prepare_tiny(tmp_path / "model", tmp_path / "tiny")
    assert (tmp_path / "tiny" / "next-tiny" / "config.json").stat().st_mtime_ns == before
