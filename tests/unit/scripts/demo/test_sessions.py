"""A model that many visitors share, and what the page shows of its answers."""

import re

import pytest
import torch

import vzip
from scripts.demo.sessions import MAX_OPEN_SESSIONS, Session, SharedModel, Turn
from scripts.demo.show import as_figures, as_messages, describe_tokens
from scripts.demo.turns import VALUES_PER_TURN
from scripts.demo.uploads import open_upload
from tests.helpers import tiny
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


def test_a_slider_between_budgets_takes_the_nearest(model):
    assert [model.nearest_budget(value) for value in (-3, 1, 6.4, 99)] == [1, 1, 6, 16]
    # A request may hold anything.
    assert [model.nearest_budget(value) for value in (None, "9", [], float("nan"))] == [6, 6, 6, 6]


def test_answers_that_grow_in_turns_are_the_same_as_alone(run):
    model = SharedModel(Comparison.open(run, device="cpu"), max_new_tokens=3 * VALUES_PER_TURN)
    asked = [
        (Session(model, tiny.picture(seed), 6), setting) for seed in (1, 2) for setting in model.settings
    ]
    alone = [last_answer(session.restart(), setting, "what?").text for session, setting in asked]

    # All answers are begun before any of them ends.
    growing = [session.ask(setting, "what?") for session, setting in asked]
    turns = [list(stream)[-1] for stream in interleaved(growing)]
    assert [turn.answer.text for turn in turns] == alone
    assert max(map(len, alone)) > VALUES_PER_TURN
    model.thread.stop()


def interleaved(streams):
    """Take one value of each stream in turn. Returns the values of each."""
    values = [[] for _ in streams]
    rest = dict(enumerate(streams))
    while rest:
        for index, stream in list(rest.items()):
            value = next(stream, None)
            if value is None:
                del rest[index]
            else:
                values[index].append(value)
    return values


def test_with_many_visitors_the_first_lose_only_what_can_be_made_again(model, tmp_path):
    def visit(seed):
        file = tmp_path / f"{seed}.png"
        tiny.picture(seed).save(file)
        session = Session(model, open_upload(file), 6, file)
        last_answer(session, "tuned", "what?")
        return session

    sessions = [visit(seed) for seed in range(MAX_OPEN_SESSIONS + 2)]
    assert [session.picture is None for session in sessions[:3]] == [True, True, False]
    assert not sessions[0]._chats and sessions[2]._chats

    # The first one goes on with its conversation. Only its cache is computed again.
    turn = last_answer(sessions[0], "tuned", "why?")
    other = Session(model, tiny.picture(0), 6)
    last_answer(other, "tuned", "what?")
    assert turn.text == last_answer(other, "tuned", "why?").text
    assert turn.num_cached_tokens == 0 and turn.num_prompt_tokens > 30

    # Gone is only a picture whose file is gone too.
    (tmp_path / "1.png").unlink()
    *_, turn = sessions[1].ask("tuned", "why?")
    assert turn.refusal == "This picture is no longer here; upload it again."


def test_a_session_that_is_in_use_stays_open(model):
    session = Session(model, tiny.picture(), 6)
    last_answer(session, "tuned", "what?")
    with session.in_use:
        assert not session.close()
        for seed in range(MAX_OPEN_SESSIONS + 1):
            model.keep_open(Session(model, tiny.picture(seed), 6))
    assert session._chats
    model.forget(session)
    assert not session._chats


def test_memory_that_runs_out_is_said_and_frees_what_others_keep(model, monkeypatch):
    other, session = (Session(model, tiny.picture(), 6) for _ in range(2))
    last_answer(other, "tuned", "what?")

    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    monkeypatch.setattr(Chat, "ask", run_out)
    (turn,) = session.ask("tuned", "what?")
    assert "memory ran out" in turn.refusal and "CUDA" not in turn.refusal
    assert not other._chats


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
        assert ("tiles" in text) == (tokens.num_tiles > 1) == (kind in (*tiny.TILED, *tiny.SHUFFLED))


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
