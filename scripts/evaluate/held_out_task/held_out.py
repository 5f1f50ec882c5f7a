"""What lmms-eval asks of the task `vzip_held_out`. A document has the fields of `scripts.evaluate.questions.FEATURES`."""

import json
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

IMAGE, VIDEO = "<image>", "<video>"


def _content(question: str, media: Mapping[str, Iterator[Any]]) -> list[dict[str, Any]]:
    """A question's parts, its pictures and videos first, as templates of the recipe have them."""
    parts = [
        {"type": kind, "url": next(media[kind])}
        for kind, placeholder in (("image", IMAGE), ("video", VIDEO))
        for _ in range(question.count(placeholder))
    ]
    text = question.replace(IMAGE, "").replace(VIDEO, "").strip() if parts else question
    return [*parts, {"type": "text", "text": text}]


def messages(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The question as a conversation, with the turns before it and their true answers."""
    media = {"image": iter(document["images"]), "video": iter(document["videos"])}
    made = []
    for question, answer in json.loads(document["turns"]):
        made.append({"role": "user", "content": _content(question, media)})
        made.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return [*made, {"role": "user", "content": _content(document["question"], media)}]


def normal(answer: str) -> str:
    """An answer as it is compared: as in train/evaluate.py."""
    return answer.strip().strip(string.punctuation).strip().lower()


def graded(document: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """1 or 0, under the question's kind and under "all"."""
    correct = float(normal(answers[0]) == normal(document["answer"]))
    return {document["kind"]: correct, "all": correct}
