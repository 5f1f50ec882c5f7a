"""Functions that lmms-eval calls for the task `vzip_held_out`.

A document is one question, with the fields of `scripts.evaluate.questions.FEATURES`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from train.evaluation.questions import is_correct
from vzip.templates.encode import IMAGE, VIDEO


def _content(question: str, media: Mapping[str, Iterator[Any]]) -> list[dict[str, Any]]:
    """Return the parts of a question: pictures and videos first, as in training, then the text.

    Args:
        question: text with placeholders.
        media: by "image" and "video", the media that no earlier question has taken.
    """
    parts: list[dict[str, Any]] = []
    for kind, placeholder in (("image", IMAGE), ("video", VIDEO)):
        for _ in range(question.count(placeholder)):
            parts.append({"type": kind, "url": next(media[kind])})

    # The parts stand for the placeholders now, and the template would refuse them in the text.
    text = question
    if parts:
        text = question.replace(IMAGE, "").replace(VIDEO, "").strip()
    return [*parts, {"type": "text", "text": text}]


def messages(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the question as a conversation, with the turns before it and their true answers."""
    # The turns share one iterator for each kind: a placeholder takes the next picture or video.
    media = {"image": iter(document["images"]), "video": iter(document["videos"])}

    conversation = []
    for question, answer in json.loads(document["turns"]):
        conversation.append({"role": "user", "content": _content(question, media)})
        conversation.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})

    conversation.append({"role": "user", "content": _content(document["question"], media)})
    return conversation


def graded(document: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Return 1 for a right answer and 0 for a wrong one, under the question's kind and "all"."""
    score = float(is_correct(answers[0], document["answer"]))
    return {document["kind"]: score, "all": score}
