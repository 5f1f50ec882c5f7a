"""Held-out questions, grades and scores."""

import pytest

from data.conversations import Conversation
from train.evaluation.questions import HeldOutQuestion, SettingAnswers, held_out_questions, is_correct, score

TALK = Conversation(
    id="a",
    images=("one.png", "two.png"),
    videos=("clip.mp4",),
    turns=(("<image>what?", "A cat."), ("and <image><video>?", "A dog."), ("sure?", "Yes.")),
    source="files",
    kind="open",
    digest="",
)


def test_a_question_has_the_turns_and_the_media_up_to_it():
    first, second, third = held_out_questions([TALK], limit=9)
    assert first == HeldOutQuestion(TALK, 0)
    assert (first.text, first.expected, first.kind) == ("<image>what?", "A cat.", "open")
    assert (first.previous_turns, first.images, first.videos) == ([], ["one.png"], [])
    assert second.previous_turns == [("<image>what?", "A cat.")]
    assert (second.images, second.videos) == (["one.png", "two.png"], ["clip.mp4"])
    assert (third.images, third.videos) == (second.images, second.videos)


def test_questions_are_the_first_ones_and_nothing_is_read_beyond_them():
    def conversations():
        yield from (TALK, TALK)
        pytest.fail("read on")

    every_question = held_out_questions(conversations(), limit=6)
    assert [question.turn for question in every_question] == [0, 1, 2, 0, 1, 2]
    for limit in range(1, 6):
        assert held_out_questions(conversations(), limit=limit) == every_question[:limit]
    assert held_out_questions([TALK, TALK], limit=7) == every_question


def test_case_and_punctuation_around_an_answer_do_not_matter():
    for answer in ("yes", "Yes", " yes.", "YES!\n", "'yes'", ". yes ."):
        assert is_correct(answer, "Yes.")
        assert is_correct("yes", answer)
    for answer in ("no", "yes, it is", "y e s", ""):
        assert not is_correct(answer, "Yes.")


def test_the_record_of_an_answer():
    question = HeldOutQuestion(TALK, 2)
    assert question.graded(" yes \n", num_visual_tokens=12) == {
        "num_visual_tokens": 12,
        "image": "one.png, two.png, clip.mp4",
        "question": "sure?",
        "expected": "Yes.",
        "answer": "yes",
        "kind": "open",
        "correct": True,
    }


def answers_of(**correct_by_kind):
    answers = []
    for kind, corrects in correct_by_kind.items():
        answers += [{"kind": kind, "correct": bool(one), "num_visual_tokens": 64} for one in corrects]
    return answers


def test_the_score_is_the_share_of_correct_answers_by_kind():
    row = SettingAnswers("full", answers_of(yesno=[1, 0], open=[1, 1, 1, 0])).row
    assert row == {
        "name": "full",
        "num_visual_tokens": 64,
        "num_questions": 6,
        "metrics": {"yesno": 0.5, "open": 0.75, "all": pytest.approx(4 / 6)},
    }
    assert list(row["metrics"]) == ["yesno", "open", "all"]

    # An answer without a kind counts once.
    assert score("full", answers_of(all=[1, 0, 0, 0]))["metrics"] == {"all": 0.25}
    assert score("full", answers_of(all=[1], open=[0, 0, 0]))["metrics"] == {"open": 0, "all": 0.25}


@pytest.mark.parametrize(
    ("counts", "mean"), [([96, 160], "128"), ([96, 96, 160], "117.3"), ([0, 17], "8.5"), ([0], "0")]
)
def test_the_score_has_the_mean_of_the_visual_tokens(counts, mean):
    answers = [{"kind": "all", "correct": True, "num_visual_tokens": count} for count in counts]
    assert str(score("free", answers)["num_visual_tokens"]) == mean
