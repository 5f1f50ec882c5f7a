"""The demo's page over HTTP, as browsers and other programs reach it."""

import gc
import os
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import httpx
import pytest

from scripts.demo import guard
from scripts.demo import page as page_module
from scripts.demo.load import RefusedError, Visitor, visit_at_once
from scripts.demo.main import free_port, open_model, opened, uploads_folder
from scripts.demo.page import ExamplePicture, Page
from scripts.demo.sessions import MAX_OPEN_SESSIONS
from tests.helpers import tiny
from tests.helpers.runs import attached, save_run, tune
from vzip.chat import Chat
from vzip.templates.encode import vicuna

pytestmark = pytest.mark.integration

HOST = "127.0.0.1"
LONG = 1_500
"""Tokens of an answer that takes seconds."""
NO_UPLOAD = "Only a picture that was uploaded"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder):
    template = asdict(vicuna("s "))
    return save_run(
        tmp_path_factory.mktemp("demo") / "run", tune(attached(tiny_folder)), tiny_folder, template=template
    )


@contextmanager
def serving(run, *, max_new_tokens, auth=None):
    """(page, address) of a page that is open to visitors."""
    with ExitStack() as stack:
        stack.enter_context(uploads_folder())
        model = open_model(str(run), base=None, template=None, max_new_tokens=max_new_tokens)
        examples = [ExamplePicture(tiny.picture(seed), f"question {seed}?") for seed in (1, 2)]
        page = Page(model, title="a model", examples=examples)
        yield page, stack.enter_context(opened(page, host=HOST, port=free_port(HOST, 0), auth=auth))


@pytest.fixture(scope="module")
def address(run):
    """The address of a page whose answers are short."""
    with serving(run, max_new_tokens=4) as (_, address):
        yield address


def result(messages):
    """Whether an event succeeded, and what it has sent, as text."""
    return messages[-1]["success"], str(messages)


def is_served(visitor):
    """Whether a visitor's picture is shown, and all settings answer a question about it."""
    return visitor.choose(0) and visitor.ask("what?") == visitor.num_settings


def png(folder, name="secret.png"):
    """Write a picture, and return its path."""
    tiny.picture().save(folder / name)
    return folder / name


@pytest.fixture
def not_uploaded(tmp_path):
    """Paths that no request may name."""
    os.mkfifo(tmp_path / "pipe.png")
    return [
        png(tmp_path),
        tmp_path / "pipe.png",
        tmp_path,
        "/dev/zero",
        "/dev/stdin",
        "http://127.0.0.1:9/a.png",
    ]


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}], ids=["bare", "marked"])
def test_a_request_that_names_a_file_of_the_machine_is_refused_and_blocks_nobody(address, not_uploaded, meta):
    visitor = Visitor(address)
    for path in not_uploaded:
        file = {"path": str(path), **meta}
        for function, inputs in (
            ("choose", [file, 6]),
            ("ask", [None, "what?", file, 6]),
            ("ask", [None, file, None, 6]),
            ("change_budget", [None, {"nested": [file]}]),
        ):
            success, sent = result(visitor.call(function, *inputs))
            assert not success and NO_UPLOAD in sent and "visual tokens" not in sent
            assert "secret" not in sent
    assert is_served(visitor)


def test_uploads_and_the_pages_examples_are_shown(address):
    visitor = Visitor(address)
    success, sent = result(visitor.call("show_first_example", 6))
    assert success and "question 1?" in sent and "visual tokens" in sent

    messages = visitor.call("pick", 6, event_data={"index": 1, "value": None})
    success, sent = result(messages)
    assert success and "question 2?" in sent
    assert visitor.ask("what?") == 3

    # A visitor whom the page has forgotten still sees the picture, and goes on with it.
    shown = [part for part in messages[-1]["output"]["data"] if isinstance(part, dict) and "path" in part]
    success, sent = result(Visitor(address).call("ask", None, "what?", {"path": shown[0]["path"]}, 6))
    assert success and "| turn |" in sent


def test_text_that_is_no_question_gets_a_message(address):
    visitor = Visitor(address)
    assert visitor.choose(1)
    for question, words in (
        ("why \ud83d?", "U+D83D"),
        ("x" * 5_000, "5,000 characters"),
        (3, "Type a question"),
    ):
        success, sent = result(visitor.call("ask", None, question, None, 6))
        assert success and words in sent
    assert visitor.ask("what?") == 3


def test_unknown_and_large_requests_are_refused_before_they_are_read(address, monkeypatch):
    visitor = Visitor(address)
    for path, size in (("queue/join", 2), ("queue/join/", 2), ("upload", 25)):
        response = visitor.client.post(f"/gradio_api/{path}", content=b"x" * (size * 2**20))
        assert response.status_code == 413, path

    # Services of Gradio that the page does not use are closed.
    for path in ("component_server", "process_recording", "run/choose", "call/choose", "stream/x"):
        assert visitor.client.post(f"/gradio_api/{path}", json={}).status_code == 404, path

    endless = visitor.client.post("/gradio_api/queue/join", content=iter([b"x"]))
    assert endless.status_code == 411
    assert is_served(visitor)

    monkeypatch.setattr(guard, "MIN_FREE_MB", 10**12)
    upload = visitor.client.post("/gradio_api/upload", files={"files": ("a.png", b"x")})
    assert upload.status_code == 507
    assert visitor.ask("what?") == 3


def test_thirty_visitors_at_once_have_whole_conversations_in_bounded_memory(address):
    assert visit_at_once(address, 30, 1) == {"whole": 30}
    assert is_served(Visitor(address))

    gc.collect()
    num_chats = sum(isinstance(thing, Chat) for thing in gc.get_objects())
    assert num_chats <= 3 * MAX_OPEN_SESSIONS


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def begin_long_answer(address):
    """A visitor whose question is being answered, and what the page says to them."""
    visitor = Visitor(address)
    assert visitor.choose(1)
    visitor.send("ask", None, "what?", None, 6)
    messages = visitor.messages()
    while next(messages)["msg"] != "process_generating":
        pass
    return visitor, messages


def test_a_picture_is_shown_while_a_long_answer_grows_which_ends_when_its_visitor_leaves(run):
    with serving(run, max_new_tokens=LONG) as (page, address):
        _, messages = begin_long_answer(address)
        assert Visitor(address).choose(2)
        (session,) = [session for session in page.model._open_sessions if session.in_use.locked()]
        messages.close()
        wait_until(lambda: not session.in_use.locked())

    # The first of three answers was broken off.
    assert [len(turns) for turns in session.turns.values()] == [1, 0, 0]
    assert session._chats["full"].messages == []


def test_who_comes_when_the_queue_is_full_is_told_so(run, monkeypatch):
    monkeypatch.setattr(page_module, "MAX_ANSWERS", 1)
    monkeypatch.setattr(page_module, "MAX_WAITING", 2)
    with serving(run, max_new_tokens=LONG) as (_, address):
        _, messages = begin_long_answer(address)
        visitors = [Visitor(address) for _ in range(3)]
        for visitor in visitors[:2]:
            visitor.send("ask", None, "what?", None, 6)
        with pytest.raises(RefusedError, match="Queue is full"):
            visitors[2].send("ask", None, "what?", None, 6)
        messages.close()


def test_a_visitor_who_stays_away_is_forgotten(run, monkeypatch):
    monkeypatch.setattr(page_module, "SECONDS_KEPT", 2)
    with serving(run, max_new_tokens=4) as (page, address):
        visitor = Visitor(address)
        assert is_served(visitor)
        assert page.model._open_sessions
        wait_until(lambda: not page.model._open_sessions)
        assert "Choose a picture first" in str(visitor.call("ask", None, "why?", None, 6))


def test_a_page_with_a_password_shows_nothing_without_it(run, tmp_path):
    with serving(run, max_new_tokens=4, auth=("me", "open sésame")) as (_, address):
        with httpx.Client(base_url=address, trust_env=False) as client:
            assert "sésame" not in client.get("/").text
            picture = {"files": ("a.png", Path(png(tmp_path)).read_bytes())}
            for answer in (
                client.get("/config"),
                client.post("/gradio_api/upload", files=picture),
                client.post("/gradio_api/queue/join", json={"data": [], "fn_index": 0, "session_hash": "x"}),
            ):
                assert answer.status_code == 401

            assert client.post("/login", data={"username": "me", "password": "wrong"}).status_code == 400
            right = {"username": "me", "password": "open sésame"}
            assert client.post("/login", data=right).status_code == 200
            assert client.get("/config").status_code == 200
