"""Held-out questions, grades and scores: the same for `make tune` and `make eval`."""

import string
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.conversations import Conversation
from vzip.templates.encode import IMAGE, VIDEO


@dataclass(frozen=True)
class HeldOutQuestion:
    """One question of a held-out conversation. The turns before it keep their true answers.

    Attributes:
        conversation: where the question stands.
        turn: number of its turn, from 0.
    """

    conversation: Conversation
    turn: int

    @property
    def text(self) -> str:
        """The question, with its `<image>` and `<video>` placeholders."""
        return self.conversation.turns[self.turn][0]

    @property
    def expected(self) -> str:
        """The true answer."""
        return self.conversation.turns[self.turn][1]

    @property
    def kind(self) -> str:
        """The type of question that scores are grouped by."""
        return self.conversation.kind

    @property
    def previous_turns(self) -> list[tuple[str, str]]:
        """The turns before the question: (question, true answer)."""
        return list(self.conversation.turns[: self.turn])

    @property
    def images(self) -> list[str]:
        """Paths of the images that the model has seen by this question."""
        return list(self.conversation.images[: self._num_placeholders(IMAGE)])

    @property
    def videos(self) -> list[str]:
        """Paths of the videos that the model has seen by this question."""
        return list(self.conversation.videos[: self._num_placeholders(VIDEO)])

    def _num_placeholders(self, placeholder: str) -> int:
        """Count a kind of placeholder in this question and the turns before it."""
        # Each placeholder takes the next picture, so their number says how many have been shown.
        num_before = sum((question + answer).count(placeholder) for question, answer in self.previous_turns)
        return num_before + self.text.count(placeholder)

    def graded(self, answer: str, *, num_visual_tokens: int) -> dict[str, Any]:
        """Grade an answer. Return its record in answers_SETTING.json."""
        conversation = self.conversation
        return {
            "num_visual_tokens": num_visual_tokens,
            "image": ", ".join(conversation.images + conversation.videos),
            "question": self.text,
            "expected": self.expected,
            "answer": answer.strip(),
            "kind": self.kind,
            "correct": is_correct(answer, self.expected),
        }


def held_out_questions(conversations: Iterable[Conversation], *, limit: int) -> list[HeldOutQuestion]:
    """Return the first `limit` questions of the conversations, in order."""
    # Each turn is a question of its own. The last conversation may have too many.
    questions: list[HeldOutQuestion] = []
    for conversation in conversations:
        questions += [HeldOutQuestion(conversation, turn) for turn in range(len(conversation.turns))]
        if len(questions) >= limit:
            break
    return questions[:limit]


def is_correct(answer: str, expected: str) -> bool:
    """Tell whether two answers are equal, apart from case and punctuation around them."""
    return _normalized(answer) == _normalized(expected)


def _normalized(answer: str) -> str:
    """Remove space and punctuation around an answer, and make it lower case: " No." is "no"."""
    return answer.strip().strip(string.punctuation).strip().lower()


@dataclass(frozen=True)
class SettingAnswers:
    """The graded answers in one setting: full, free (training-free), tuned or random.

    Attributes:
        name: of the setting, with "-BUDGET" behind it if the run has several budgets.
        answers: records of `HeldOutQuestion.graded`, in the order of the questions.
    """

    name: str
    answers: list[dict[str, Any]]

    @property
    def row(self) -> dict[str, Any]:
        """The scores, as they stand in result.json."""
        return score(self.name, self.answers)


def score(name: str, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compute a setting's share of correct answers, for each kind of question and for all.

    Args:
        name: of the setting.
        answers: records of `HeldOutQuestion.graded`.
    """
    correct_by_kind: dict[str, list[bool]] = defaultdict(list)
    for answer in answers:
        # Questions without a kind have the kind "all". The set makes them count once.
        for kind in {answer["kind"], "all"}:
            correct_by_kind[kind].append(answer["correct"])

    # "all" comes last, as in the printed table.
    kinds = [kind for kind in correct_by_kind if kind != "all"]
    metrics = {}
    for kind in [*kinds, "all"]:
        correct = correct_by_kind[kind]
        metrics[kind] = sum(correct) / len(correct)

    # Images of different sizes may have different numbers of tokens. A mean that is a whole number
    # is written as one.
    num_visual_tokens = sum(answer["num_visual_tokens"] for answer in answers)
    mean = round(num_visual_tokens / len(answers), 1)
    return {
        "name": name,
        "num_visual_tokens": int(mean) if mean == int(mean) else mean,
        "num_questions": len(answers),
        "metrics": metrics,
    }
