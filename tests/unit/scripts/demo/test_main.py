"""The command behind the page: its port, its model, and the pictures that it offers."""

import json
import socket

from scripts.demo.main import free_port, held_out_examples, open_model
from scripts.demo.sessions import Session
from tests.helpers import tiny
from tests.helpers.errors import refused
from vzip.pictures import open_picture


def test_a_model_without_a_chat_template_needs_one(tiny_folder):
    source = str(tiny_folder)
    refused(open_model, source, base=None, template=None, max_new_tokens=5, words=["--template vicuna"])

    model = open_model(source, base=None, template="vicuna", max_new_tokens=5)
    assert model.settings == ("full", "free")
    assert model.default_budget == 1

    *_, turn = Session(model, tiny.picture(), 3).ask("free", "what?")
    assert turn.answer.num_visual_tokens == 3


def test_a_busy_port_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        refused(free_port, "127.0.0.1", port, words=[f"--port={port} can't be opened: ", "in use"])

    assert free_port("127.0.0.1", 0) > 0
    refused(free_port, "127.0.0.1", 99_999, words=["--port=99999"])


def test_examples_are_the_runs_held_out_pictures_that_can_be_opened(run, tmp_path, monkeypatch):
    assert held_out_examples(run) == []

    monkeypatch.setenv("HOME", str(tmp_path))
    tiny.picture().save(tmp_path / "a.png")
    for name in ("damaged.png", "clip.mp4"):
        (tmp_path / name).write_text("not a picture")

    asked = [("a.png", "<image>\nwhat?"), ("a.png", "why?")]
    asked += [(name, "?") for name in ("gone.png", "damaged.png", "clip.mp4", "")]
    answers = [{"image": name, "question": question} for name, question in asked]

    (run / "answers_full.json").write_text(json.dumps(answers))
    (run / "config.yaml").write_text("data:\n  image_folder: '~'\n")
    (example,) = held_out_examples(run)
    assert example.picture == open_picture(tmp_path / "a.png")
    assert example.question == "what?"
