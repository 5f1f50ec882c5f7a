"""A served model as one more column of the page. The answers come from a stand-in for vLLM."""

import pytest

from scripts.demo.page import Page
from scripts.demo.served import ServedModel
from scripts.demo.sessions import Session, SharedModel
from scripts.demo.show import as_figures
from tests.helpers import tiny
from tests.helpers.chat_server import start_chat_server
from vzip import Comparison, UserError


@pytest.fixture
def chat_server():
    listener = start_chat_server()
    yield listener
    listener.shutdown()
    listener.server_close()


def test_its_answers_stand_beside_those_of_the_other_settings(chat_server, tuned_run):
    served = ServedModel(f"http://127.0.0.1:{chat_server.server_port}/v1/")
    model = SharedModel(Comparison.open(tuned_run, device="cpu"), max_new_tokens=5, served=served)
    assert model.settings == ("full", "free", "tuned", "served")

    session = Session(model, tiny.picture(), model.default_budget)
    turns = [turn.answer.text for turn in session.ask("served", "what?")]
    assert turns[0] == "a" and turns[-1] == "a large circle"
    *_, last = session.ask("served", "why?")
    assert last.answer.num_prompt_tokens == 99

    # The conversation so far, with the picture in front of its first question.
    first, answer, second = chat_server.questions[-1]["messages"]
    assert [part["type"] for part in first["content"]] == ["image_url", "text"]
    assert first["content"][1]["text"] == "what?"
    assert (answer, second) == (
        {"role": "assistant", "content": "a large circle"},
        {"role": "user", "content": "why?"},
    )
    assert "99 of 99" in as_figures(session.turns["served"])
    assert Page(model, title="", examples=[])._title("served", session).startswith("**served**: a server")

    # A server that has gone is a message, and the other settings answer on.
    chat_server.shutdown()
    chat_server.server_close()
    (refused,) = session.ask("served", "where?")
    assert "does not answer" in refused.refusal
    *_, tuned = session.ask("tuned", "where?")
    assert tuned.answer is not None


def test_a_refusal_of_the_server_is_shown(chat_server):
    served = ServedModel(f"http://127.0.0.1:{chat_server.server_port}")
    served.name = "broken"
    with pytest.raises(UserError, match="budget=7 was not tuned"):
        list(served.ask(tiny.picture(), [], "what?", max_new=3))


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:9", "make serve"),
        ("nosuch", "such as http"),
        ("http://nosuch.invalid:x", "--served"),
    ],
)
def test_an_address_without_a_server_is_refused(address, words):
    with pytest.raises(UserError, match=words):
        ServedModel(address)
