"""The page's reactions, without a browser: those that `tests/integration/test_demo*.py` does not see."""

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


def test_all_open_settings_answer(page):
    session = page.change_budget(page.show_first_example(6)[page.session], 9)[page.session]
    *_, last = page.ask(session, "what?")
    # "tuned" is closed at this budget.
    assert set(last) == {page.session, page.answers["free"], page.figures["free"]}
    assert [len(turns) for turns in session.turns.values()] == [1, 1, 0]

    restarted = page.restart(session)
    assert restarted[page.answers["free"]] == []
    assert page.clear()[page.session] is None


def test_only_examples_of_the_page_can_be_picked(page):
    assert page.pick(6, pick_event(1))[page.question] == "question 2?"
    for index in (2, -1, None, "0", [0]):
        assert page.pick(6, pick_event(index)) == {page.message: "There is no such example."}


def pick_event(index):
    return gr.SelectData(None, {"index": index, "value": None})


def test_a_conversation_that_was_forgotten_needs_a_picture_that_is_still_there(page):
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


@pytest.mark.parametrize(("source", "budget"), [("export", 6), ("no start", 6), ("no reducer", 16)])
def test_the_page_of_an_export_or_a_run_of_one_budget_has_no_slider(tiny_folder, tmp_path, source, budget):
    reducer = {"reducer": Identity()} if source == "no reducer" else {}
    handle = tune(attached(tiny_folder, **reducer))
    folder = save_run(tmp_path / "run", handle, tiny_folder, template=asdict(vicuna("s ")))
    if source == "export":
        (tmp_path / "export").mkdir()
        write_hf(folder, tmp_path / "export")
        folder = tmp_path / "export"
    elif source == "no start":
        gone = str(tmp_path / "gone.safetensors")
        edit_meta(folder, lambda meta: meta["base"].update(projector=gone))

    page = chat_on_page_of(folder)
    assert isinstance(page.budget, gr.State) and page.budget.value == budget
    if source != "no reducer":
        assert list(page.answers) == ["tuned"]
        assert page.change_budget(page.show_first_example(6)[page.session], 6)[page.message] == ""


def test_visitors_do_not_learn_where_the_run_is(model, run, tmp_path):
    title = title_of(str(run), model)
    assert title.startswith("`run`: LlavaForConditionalGeneration on cpu") and str(tmp_path) not in title
    assert title_of("llava-hf/llava-1.5-7b-hf", model).startswith("`llava-hf/llava-1.5-7b-hf`: ")
