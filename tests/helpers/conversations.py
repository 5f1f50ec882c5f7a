"""Conversations for tests of data."""

from data.conversations import parse_conversation


def conversation(*texts, name="", **fields):
    """A conversation of these texts, questions and answers in turn. `fields` are `image`, `video`, `source` and the like."""
    messages = [
        {"from": ("human", "gpt")[position % 2], "value": text} for position, text in enumerate(texts)
    ]
    return parse_conversation({"id": name, "conversations": messages, **fields})
