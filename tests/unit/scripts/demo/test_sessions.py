"""A model that many visitors share, and what the page shows of its answers."""

import re
import time

import pytest

import vzip
from scripts.demo.sessions import Session, SharedModel, Turn
from scripts.demo.show import as_figures, as_messages, describe_tokens, open_upload
from tests.helpers import tiny
from tests.helpers.errors import refused
from vzip import Comparison
from vzip.chat import Chat
from vzip.templates.encode import vicuna
from vzip.templates.jinja import chat_template

QUESTIONS = ("what?", "why?")


def last_answer(session, setting, question):
    *_, turn = session.ask(setting, question)
    return turn.answer


def test_each_setting_answers_like_a_model_that_is_loaded_for_it_alone(model, run):
    session = Session(model, tiny.picture(), model.default_budget)
    assert model.settings == ("full", "free", "tuned")
    assert [session.num_visual_tokens(setting) for setting in model.settings] == [16, 6, 6]

    answers = {setting: [] for setting in model.settings}
    for question in QUESTIONS:
        for setting in model.settings:
            answers[setting].append(last_answer(session, setting, question).text)
    assert len({texts[0] for texts in answers.values()}) == 3

    chat = Chat(*vzip.load(run, device="cpu"), tiny.picture(), max_new_tokens=5)
    for question, text in zip(QUESTIONS, answers["tuned"], strict=True):
        *_, answer = chat.ask(question)
        assert answer.text == text


def test_sessions_share_the_model_but_not_their_turns(model):
    first, second, alone = (Session(model, tiny.picture(seed), 6) for seed in (1, 2, 1))
    for session in (first, second, alone):
        last_answer(session, "tuned", "what?")

    answer = last_answer(first, "tuned", "why?")
    assert answer.text == last_answer(alone, "tuned", "why?").text
    assert 0 < answer.num_cached_tokens < answer.num_prompt_tokens
    assert [turn.question for turn in second.turns["tuned"]] == ["what?"]
    assert first.restart().turns == {"full": [], "free": [], "tuned": []}


def test_tuned_is_closed_at_other_budgets(model):
    session = Session(model, tiny.picture(), 9)
    assert session.open_settings == ["full", "free"]
    assert session.why_closed("tuned") == "for a budget of 6 alone; move the slider there"

    answer = last_answer(session, "free", "what?")
    assert session.num_visual_tokens("free") == answer.num_visual_tokens == 9


def test_a_slider_between_budgets_takes_the_nearest(model):
    assert [model.nearest_budget(value) for value in (-3, 1, 6.4, 99)] == [1, 1, 6, 16]


def test_a_reader_who_leaves_gives_the_model_back(model):
    numbers = []

    def long_work():
        with model.comparison.row("free"):
            for number in range(2000):
                numbers.append(number)
                time.sleep(0.001)
                yield number

    reader = model.stream(long_work)
    assert next(reader) == 0
    reader.close()

    # A model that was left in the other setting would refuse this question.
    session = Session(model, tiny.picture(), 6)
    assert last_answer(session, "tuned", "what?").text
    assert len(numbers) < 2000


def test_an_error_in_the_models_thread_reaches_the_reader(model):
    def work():
        yield 1
        raise ArithmeticError

    reader = model.stream(work)
    assert next(reader) == 1
    with pytest.raises(ArithmeticError):
        next(reader)


def test_stopping_ends_an_answer(run):
    model = SharedModel(Comparison.open(run, device="cpu"), max_new_tokens=5)

    def endless():
        while True:
            yield 1

    reader = model.stream(endless)
    assert next(reader) == 1
    model.stop()
    assert all(value == 1 for value in reader)  # the values that were ready, and then the end


def test_a_refused_question_is_a_turn_with_the_reason(model):
    session = Session(model, tiny.picture(), 6)
    (turn,) = session.ask("free", "an <image>?")
    assert "spells <image>" in turn.refusal
    assert "spells &lt;image&gt;" in as_messages(session.turns["free"])[-1]["content"]
    assert as_figures(session.turns["free"]) == ""
    assert last_answer(session, "free", "what?").num_cached_tokens == 0


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_family_shows_its_tokens_and_answers_at_all_offered_budgets(kind, tmp_path):
    comparison = Comparison.open(tiny.save_llava(tmp_path, kind), device="cpu")
    comparison.processor.chat_template = chat_template(vicuna(), comparison.processor.tokenizer)
    model = SharedModel(comparison, max_new_tokens=2)
    model.warm_up()

    picture = tiny.picture(1, 90, 60)
    for budget in {model.budgets[0], model.default_budget, model.budgets[-1]}:
        tokens = model.look(picture, budget)
        answer = last_answer(Session(model, picture, budget), "free", "what?")
        assert answer.num_visual_tokens == tokens.num_tokens

        text = describe_tokens(tokens)
        assert f"{tokens.num_full_tokens:,} → {tokens.num_tokens:,} visual tokens" in text
        assert ("tiles" in text) == (tokens.num_tiles > 1) == (kind in tiny.TILED)


def test_the_figures_have_a_line_for_each_turn(model):
    session = Session(model, tiny.picture(), 6)
    first, second = (last_answer(session, "tuned", question) for question in QUESTIONS)
    *_, first_line, second_line = as_figures(session.turns["tuned"]).splitlines()
    assert f"| {first.num_prompt_tokens} of {first.num_prompt_tokens} |" in first_line

    num_run = second.num_prompt_tokens - second.num_cached_tokens
    pattern = rf"\| 2 \| \d+\.\d\d s \| \d+\.\d \| {num_run} of {second.num_prompt_tokens} \| 0\.\d\d MiB \|"
    assert re.match(pattern, second_line)

    waiting = as_messages([Turn("what?", None)])
    assert waiting[1] == {"role": "assistant", "content": "…"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no picture", "not a picture that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture that can be read"),
        (b"P6 40 40 255\ncut", "not a picture that can be read"),
        (b"P6 8000 7000 255\n", "8,000 x 7,000 pixels; at most 50 million"),
        (b"P6 100000 100000 255\n", "too large; at most 50 million"),
    ],
)
def test_an_upload_that_is_not_a_picture_or_is_a_bomb_is_refused(content, words, tmp_path):
    path = tmp_path / "upload.png"
    path.write_bytes(content)
    refused(open_upload, str(path), words=[words])
