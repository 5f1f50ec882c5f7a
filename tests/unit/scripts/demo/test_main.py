"""The command behind the page: its port, its model, and the pictures that it offers."""

import json
import socket

import pytest

from scripts.demo.main import AUTH, free_port, held_out_examples, is_open_to_others, open_model, read_auth
from scripts.demo.sessions import Session
from tests.helpers import tiny
from tests.helpers.errors import refused
from tests.helpers.runs import held_out_answer
from vzip import UserError
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

    # A run from somebody else may name files outside the folder.
    tiny.picture(1).save(tmp_path.parent / "secret.png")
    asked += [("../secret.png", "?"), (str(tmp_path.parent / "secret.png"), "?")]
    answers = [held_out_answer(name, question) for name, question in asked]

    (run / "answers_full.json").write_text(json.dumps(answers))
    (run / "config.yaml").write_text("data:\n  image_folder: '~'\n")
    (example,) = held_out_examples(run)
    assert example.picture == open_picture(tmp_path / "a.png")
    assert example.question == "what?"


def test_a_password_comes_from_the_command_or_the_environment_and_is_not_repeated(monkeypatch):
    assert read_auth(None) is None
    assert read_auth("me:a:b") == ("me", "a:b")
    for wrong in ("secret", ":secret", "me:", ""):
        with pytest.raises(UserError) as error:
            read_auth(wrong)
        assert "USER:PASSWORD" in str(error.value) and "secret" not in str(error.value)

    monkeypatch.setenv(AUTH, "you:word")
    assert read_auth(None) == ("you", "word")
    assert read_auth("me:a") == ("me", "a")


def test_a_page_without_a_password_is_warned_about_where_others_reach_it():
    assert not any(
        is_open_to_others(host, share=False) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost")
    )
    assert all(is_open_to_others(host, share=False) for host in ("0.0.0.0", "::", "10.0.0.3", "my-host"))
    assert is_open_to_others("127.0.0.1", share=True)
