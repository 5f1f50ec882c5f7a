"""The page's reactions, without a browser."""

from dataclasses import asdict
from pathlib import Path

import gradio as gr
import pytest
from gradio.utils import get_upload_folder

from scripts.demo.main import open_model, title_of, uploads_folder
from scripts.demo.page import NO_SESSION, ExamplePicture, Page
from tests.helpers import tiny
from tests.helpers.runs import attached, edit_meta, save_run, tune
from vzip.reducers.identity import Identity
from vzip.runs.export import write_hf
from vzip.templates.encode import vicuna


@pytest.fixture(scope="module", autouse=True)
def uploads():
    with uploads_folder():
        yield


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
    # "tuned" is closed at this budget.
    assert set(last) == {page.session, page.answers["free"], page.figures["free"]}
    assert [len(turns) for turns in session.turns.values()] == [1, 1, 0]

    restarted = page.restart(session)
    assert restarted[page.answers["free"]] == []
    assert page.clear()[page.session] is None


def upload(page, name="picture.png"):
    """What a request says about a picture that was uploaded."""
    folder = Path(get_upload_folder())
    tiny.picture(3).save(folder / name)
    return {"path": str(folder / name)}


def test_an_upload_is_shown_and_no_other_file(page, tmp_path):
    updates = page.choose(upload(page), 6)
    assert updates[page.session].picture == tiny.picture(3)

    tiny.picture().save(tmp_path / "secret.png")
    for file in ({"path": str(tmp_path / "secret.png")}, {"path": None}, None, "text"):
        updates = page.choose(file, 6)
        assert "uploaded to this page" in updates[page.message]
        assert updates[page.session] is updates[page.picture] is None


def test_only_examples_of_the_page_can_be_picked(page):
    assert page.pick(6, pick_event(1))[page.question] == "question 2?"
    for index in (2, -1, None, "0", [0]):
        assert page.pick(6, pick_event(index)) == {page.message: "There is no such example."}


def pick_event(index):
    return gr.SelectData(None, {"index": index, "value": None})


def test_questions_that_are_not_plain_text_get_a_message(page):
    session = page.show_first_example(6)[page.session]
    for question, words in (("half \ud83d", "U+D83D"), ("x" * 3_000, "3,000 characters"), (None, "Type a")):
        (updates,) = page.ask(session, question)
        assert list(updates) == [page.hint] and words in updates[page.hint]
    assert session.turns == {"full": [], "free": [], "tuned": []}

    # Markup and very long words are text like any other.
    *_, last = page.ask(session, "<img src=x onerror=alert(1)> " + "x" * 500)
    assert "&lt;img src=x" in last[page.answers["tuned"]][0]["content"]


def test_a_conversation_that_was_forgotten_begins_again_with_the_shown_picture(page):
    first, *_ = updates = list(page.ask(None, "what?", upload(page), 6))
    assert first[page.session].picture == tiny.picture(3)
    assert updates[-1][page.session].turns["tuned"][0].answer.text

    gone = {"path": str(Path(get_upload_folder()) / "gone.png")}
    first, last = page.ask(None, "what?", gone, 6)
    assert "upload it" in first[page.message] and last == {page.hint: NO_SESSION}


def test_a_session_answers_one_question_at_a_time_and_is_free_when_its_visitor_leaves(page):
    session = page.show_first_example(6)[page.session]
    growing = page.ask(session, "what?")
    next(growing)
    assert list(page.ask(session, "why?")) == [{page.hint: "Wait for the answer to the last question."}]

    growing.close()
    *_, last = page.ask(session, "why?")
    assert last[page.session] is session


def chat_on_page_of(source):
    """Build the page of a run or an export, and ask about a picture. Returns the page."""
    model = open_model(str(source), base=None, template=None, max_new_tokens=2)
    model.warm_up()
    page = Page(model, title=title_of(str(source), model), examples=[ExamplePicture(tiny.picture(), "what?")])

    updates = page.show_first_example(model.default_budget)
    assert "visual tokens" in updates[page.summary]
    *_, last = page.ask(updates[page.session], "what?")
    assert all(turns[-1].answer.text for turns in last[page.session].turns.values())
    return page


def test_the_page_of_an_export_has_one_budget_and_no_slider(run, tmp_path):
    (tmp_path / "export").mkdir()
    write_hf(run, tmp_path / "export")
    page = chat_on_page_of(tmp_path / "export")
    assert list(page.answers) == ["tuned"]
    assert isinstance(page.budget, gr.State) and page.budget.value == 6
    assert page.change_budget(page.show_first_example(6)[page.session], 6)[page.message] == ""


def test_the_page_of_a_run_whose_starting_projector_is_gone_offers_its_own_budgets(tiny_folder, tmp_path):
    handle = tune(attached(tiny_folder))
    template = asdict(vicuna("s "))
    folder = save_run(tmp_path / "run", handle, tiny_folder, template=template)

    def name_a_projector_that_is_gone(meta):
        meta["base"]["projector"] = str(tmp_path / "gone.safetensors")

    edit_meta(folder, name_a_projector_that_is_gone)
    page = chat_on_page_of(folder)
    assert list(page.answers) == ["tuned"]
    assert isinstance(page.budget, gr.State) and page.budget.value == 6


def test_the_page_of_a_run_without_a_reducer_has_no_slider(tiny_folder, tmp_path):
    template = asdict(vicuna("s "))
    handle = tune(attached(tiny_folder, reducer=Identity()))
    page = chat_on_page_of(save_run(tmp_path / "run", handle, tiny_folder, template=template))
    assert isinstance(page.budget, gr.State) and page.budget.value == 16


def test_visitors_do_not_learn_where_the_run_is(model, run, tmp_path):
    title = title_of(str(run), model)
    assert title.startswith("`run`: LlavaForConditionalGeneration on cpu") and str(tmp_path) not in title
    assert title_of("llava-hf/llava-1.5-7b-hf", model).startswith("`llava-hf/llava-1.5-7b-hf`: ")
