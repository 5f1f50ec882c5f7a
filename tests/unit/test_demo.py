"""What the demo's page is made of: rows that share one model, and files that visitors bring."""

import json
import re
import socket
import time
from dataclasses import asdict

import pytest

import vzip
from scripts.demo.main import free_port, held_out_examples, open_rows
from scripts.demo.sessions import Session, SharedModel, Turn
from scripts.demo.show import as_figures, as_messages, describe_tokens, open_upload
from tests.helpers import tiny
from tests.helpers.runs import attached, save_run, tune
from vzip import Comparison, UserError
from vzip.chat import Chat
from vzip.pictures import open_picture
from vzip.templates.encode import vicuna
from vzip.templates.jinja import chat_template

TEMPLATE = asdict(vicuna("s "))


@pytest.fixture
def run(tmp_path, tiny_folder):
    return save_run(tmp_path / "run", tune(attached(tiny_folder)), tiny_folder, template=TEMPLATE)


@pytest.fixture
def rows(run):
    return open_rows(str(run), base=None, template=None, max_new_tokens=5)


def last(conversation, name, question):
    *_, turn = conversation.ask(name, question)
    return turn.answer


def test_each_row_answers_as_the_model_that_is_loaded_for_it_alone(rows, run):
    conversation = Session(rows, tiny.picture(), rows.budget)
    answers = [
        last(conversation, name, question).text
        for question in ("what?", "why?")
        for name in ("full", "free", "tuned")
    ]
    alone = Chat(*vzip.load(run, device="cpu"), tiny.picture(), max_new_tokens=5)
    for tuned, question in ((answers[2], "what?"), (answers[5], "why?")):
        *_, answer = alone.ask(question)
        assert tuned == answer.text
    assert len(set(answers[:3])) == 3
    assert [conversation.num_visual_tokens(name) for name in rows.names] == [16, 6, 6]


def test_conversations_share_the_model_and_not_their_turns(rows):
    first, second, alone = (Session(rows, tiny.picture(seed), 6) for seed in (1, 2, 1))
    for conversation in (first, second):
        last(conversation, "tuned", "what?")
    last(alone, "tuned", "what?")
    answer = last(first, "tuned", "why?")
    assert answer.text == last(alone, "tuned", "why?").text
    assert 0 < answer.num_cached_tokens < answer.num_prompt_tokens
    assert [turn.question for turn in second.turns["tuned"]] == ["what?"]
    assert first.restart().turns == {"full": [], "free": [], "tuned": []}


def test_the_tuned_row_is_closed_where_it_was_not_tuned(rows):
    conversation = Session(rows, tiny.picture(), 9)
    assert conversation.open_rows == ["full", "free"]
    assert conversation.closed("tuned") == "for a budget of 6 alone; move the slider there"
    assert (
        conversation.num_visual_tokens("free") == last(conversation, "free", "what?").num_visual_tokens == 9
    )


def test_a_reader_who_leaves_gives_the_model_back(rows):
    conversation, made = Session(rows, tiny.picture(), 6), []

    def long_work():
        with rows.comparison.row("free"):
            for number in range(2000):
                made.append(number)
                time.sleep(0.001)
                yield number

    read = rows.stream(long_work)
    assert next(read) == 0
    read.close()
    assert last(conversation, "tuned", "what?").text  # a model in another row would refuse
    assert len(made) < 2000


def test_what_goes_wrong_in_the_models_thread_reaches_the_reader(rows):
    def work():
        yield 1
        raise ArithmeticError

    read = rows.stream(work)
    assert next(read) == 1
    with pytest.raises(ArithmeticError):
        next(read)


def test_a_refused_question_is_a_turn_that_says_so(rows):
    conversation = Session(rows, tiny.picture(), 6)
    (turn,) = conversation.ask("free", "an <image>?")
    assert "spells <image>" in turn.refusal
    assert "spells &lt;image&gt;" in as_messages(conversation.turns["free"])[-1]["content"]
    assert as_figures(conversation.turns["free"]) == ""
    assert last(conversation, "free", "what?").num_cached_tokens == 0


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_family_can_be_looked_at_and_asked_at_all_budgets_that_are_offered(kind, tmp_path):
    comparison = Comparison.open(tiny.save_llava(tmp_path, kind), device="cpu")
    comparison.processor.chat_template = chat_template(vicuna(), comparison.processor.tokenizer)
    rows, picture = SharedModel(comparison, max_new_tokens=2), tiny.picture(1, 90, 60)
    rows.warm_up()
    for budget in {rows.budgets[0], rows.budget, rows.budgets[-1]}:
        seen, conversation = rows.look(picture, budget), Session(rows, picture, budget)
        assert last(conversation, "free", "what?").num_visual_tokens == seen.num_tokens
        assert f"{seen.num_full_tokens:,} → {seen.num_tokens:,} visual tokens" in describe_tokens(seen)
        assert ("tiles" in describe_tokens(seen)) == (seen.num_tiles > 1) == (kind in tiny.TILED)


def test_a_slider_between_budgets_takes_the_nearest(rows):
    assert [rows.nearest(value) for value in (-3, 1, 6.4, 99)] == [1, 1, 6, 16]


def test_a_model_without_a_chat_template_wants_one(tiny_folder):
    with pytest.raises(UserError, match="--template vicuna"):
        open_rows(str(tiny_folder), base=None, template=None, max_new_tokens=5)
    rows = open_rows(str(tiny_folder), base=None, template="vicuna", max_new_tokens=5)
    assert rows.names == ("full", "free") and rows.budget == 1
    assert last(Session(rows, tiny.picture(), 3), "free", "what?").num_visual_tokens == 3


def test_figures_have_a_line_for_each_turn(rows):
    conversation = Session(rows, tiny.picture(), 6)
    answers = [last(conversation, "tuned", question) for question in ("what?", "why?")]
    *_, first, second = as_figures(conversation.turns["tuned"]).splitlines()
    assert f"| {answers[0].num_prompt_tokens} of {answers[0].num_prompt_tokens} |" in first
    run = answers[1].num_prompt_tokens - answers[1].num_cached_tokens
    assert re.match(
        rf"\| 2 \| \d+\.\d\d s \| \d+\.\d \| {run} of {answers[1].num_prompt_tokens} \| 0\.\d\d MiB \|",
        second,
    )
    assert as_messages([Turn("what?", None)])[1] == {"role": "assistant", "content": "…"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no picture", "no picture that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture that can be read"),
        (b"P6 40 40 255\ncut", "no picture that can be read"),
        (b"P6 8000 7000 255\n", "8,000 x 7,000 pixels; at most 50 million"),
        (b"P6 100000 100000 255\n", "too large; at most 50 million"),
    ],
)
def test_files_that_are_no_pictures_or_bombs_are_refused(content, words, tmp_path):
    path = tmp_path / "upload.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        open_upload(str(path))


def test_a_busy_port_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port={port} can't be opened: .*in use"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", 0) > 0
    with pytest.raises(UserError, match="--port=99999"):
        free_port("127.0.0.1", 99_999)


def test_examples_are_the_runs_held_out_pictures_that_can_be_opened(run, tmp_path, monkeypatch):
    assert held_out_examples(run) == []
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny.picture().save(tmp_path / "a.png")
    for name in ("damaged.png", "clip.mp4"):
        (tmp_path / name).write_text("no picture")
    given = [
        ("a.png", "<image>\nwhat?"),
        ("a.png", "why?"),
        ("gone.png", "?"),
        ("damaged.png", "?"),
        ("clip.mp4", "?"),
        ("", "?"),
    ]
    (run / "answers_full.json").write_text(
        json.dumps([{"image": name, "question": question} for name, question in given])
    )
    (run / "config.yaml").write_text("data:\n  image_folder: '~'\n")
    (example,) = held_out_examples(run)
    assert (example.picture, example.question) == (open_picture(tmp_path / "a.png"), "what?")
