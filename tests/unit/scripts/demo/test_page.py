"""The page's reactions, without a browser."""

import pytest

from scripts.demo.page import ExamplePicture, Page
from tests.helpers import tiny


@pytest.fixture(scope="module")
def page(model):
    examples = [ExamplePicture(tiny.picture(seed), f"question {seed}?") for seed in (1, 2)]
    return Page(model, title="a model", examples=examples)


def test_the_page_opens_with_the_first_example(page):
    updates = page.show_first_example(6)
    assert updates[page.question] == "question 1?"
    assert updates[page.session].picture == updates[page.picture] == tiny.picture(1)
    assert "16 → 6 visual tokens" in updates[page.summary]
    assert all(updates[drawing] is not None for drawing in page.drawings)


def test_a_question_needs_a_picture_and_words(page):
    assert list(page.ask(None, "what?")) == [{page.hint: "Choose a picture first, then ask about it."}]
    session = page.show_first_example(6)[page.session]
    assert list(page.ask(session, "  ")) == [{page.hint: "Type a question."}]


def test_all_open_settings_answer(page):
    session = page.change_budget(page.show_first_example(6)[page.session], 9)[page.session]
    *_, last = page.ask(session, "what?")
    assert set(last) == {page.answers["free"], page.figures["free"]}  # tuned is closed at this budget
    assert [len(turns) for turns in session.turns.values()] == [1, 1, 0]

    restarted = page.restart(session)
    assert restarted[page.answers["free"]] == []
    assert page.clear()[page.session] is None
