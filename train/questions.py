"""Held-out questions, and when an answer to one is correct: the same for `make tune` and `make eval`."""

import string
from collections.abc import Iterable
from dataclasses import dataclass

from data.conversations import Conversation
from vzip.templates.encode import IMAGE, VIDEO


@dataclass(frozen=True)
class HeldOutQuestion:
    """One question of a held-out conversation. The model sees the turns before it with their true answers.

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
        turns = self.conversation.turns[: self.turn + 1]
        return sum(question.count(placeholder) for question, _ in turns)


def held_out_questions(conversations: Iterable[Conversation], *, limit: int) -> list[HeldOutQuestion]:
    """The first `limit` questions of the conversations, in order."""
    questions: list[HeldOutQuestion] = []
    for conversation in conversations:
        if len(questions) >= limit:
            break
        questions += [HeldOutQuestion(conversation, turn) for turn in range(len(conversation.turns))]
    return questions[:limit]


def is_correct(answer: str, expected: str) -> bool:
    """Whether two answers are equal, apart from case and from punctuation and white space around them."""
    return _normalized(answer) == _normalized(expected)


def _normalized(answer: str) -> str:
    return answer.strip().strip(string.punctuation).strip().lower()
