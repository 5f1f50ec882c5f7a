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


def test_it_is_prepared_once_and_again_when_its_version_changes_or_its_stamp_is_damaged(
    tmp_path, monkeypatch
):
    targets = []
    monkeypatch.setattr(smol, "build_smol", lambda target, wheels: targets.append(target))
    assert smol.prepare_smol(tmp_path / "smol")
    assert not smol.prepare_smol(tmp_path / "smol")

    monkeypatch.setattr(smol, "VERSION", smol.VERSION + 1)
    assert smol.prepare_smol(tmp_path / "smol")
    assert len(targets) == 2 and sorted(path.name for path in tmp_path.iterdir()) == [".smol.lock", "smol"]

    (tmp_path / "smol" / "prepared.json").write_bytes(bytes(20))
    assert smol.prepare_smol(tmp_path / "smol")
    assert not smol.prepare_smol(tmp_path / "smol")


def test_others_read_the_old_folder_until_the_new_one_is_whole(tmp_path, monkeypatch):
    target = tmp_path / "smol"
    target.mkdir()
    (target / "old").touch()

    def fails(new, wheels):
        (new / "half").touch()
        assert (target / "old").exists()
        raise OSError("a full disk")

    monkeypatch.setattr(smol, "build_smol", fails)
    with pytest.raises(OSError, match="full disk"):
        smol.prepare_smol(target)
    assert [path.name for path in target.iterdir()] == ["old"]

    # What a killed command left is deleted, and never becomes part of the result.
    (tmp_path / ".smol.new").mkdir()
    (tmp_path / ".smol.new" / "half").touch()
    monkeypatch.setattr(smol, "build_smol", lambda new, wheels: (new / "new").touch())
    assert smol.prepare_smol(target)
    assert sorted(path.name for path in target.iterdir()) == ["new", "prepared.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".smol.lock", "smol"]


def test_processes_that_prepare_at_once_build_it_once(tmp_path):
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from scripts.prepare import smol\n"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules), 'the command would start slowly'\n"
        "def build(new, wheels):\n"
        "    time.sleep(0.3)\n"
        "    (new / 'x').touch()\n"
        "smol.build_smol = build\n"
        "print(smol.prepare_smol(Path(sys.argv[1])))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "smol")]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sorted(process.communicate()[0].strip() for process in running) == ["False", "False", "True"]
    assert [process.returncode for process in running] == [0, 0, 0]


def test_an_environment_without_pip_is_told_the_cure(tmp_path):
    code = (
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *rest: None if name == 'pip' else find(name, *rest)\n"
        "from scripts.common.pip import check_pip\n"
        "check_pip('this')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "this needs pip, which" in done.stderr and "-m ensurepip` (or `uv pip install pip`)" in done.stderr


def test_a_full_disk_and_a_missing_package_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)  # makes its import fail
    with pytest.raises(UserError, match=r"needs the package gguf.*pip install 'vzip\[smol\]'"):
        smol.prepare_smol(tmp_path / "smol")

    monkeypatch.setattr(smol, "NEEDED_BYTES", 10**18)
    with pytest.raises(UserError, match="GB are needed; set VZIP_DATA"):
        smol.prepare_smol(tmp_path / "smol")
    assert [path.name for path in tmp_path.iterdir()] == [".smol.lock"]


def test_every_tiny_model_gets_a_processor_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "VIDEO_TOKEN", "<video>")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    tiny.prepare_tiny(tmp_path / "model", tmp_path / "tiny")

    configs = {path.stem for path in (ROOT / "configs" / "model").glob("*-tiny.yaml")}
    assert {path.parent.name for path in (tmp_path / "tiny").glob("*/config.json")} == configs

    before = (tmp_path / "tiny" / "next-tiny" / "config.json").stat().st_mtime_ns
    tiny.prepare_tiny(tmp_path / "model", tmp_path / "tiny")
    assert (tmp_path / "tiny" / "next-tiny" / "config.json").stat().st_mtime_ns == before

    # The models' architectures survive JSON, or they would be prepared at each start.
    assert json.loads(json.dumps(tiny.tiny_models())) == tiny.tiny_models()
