"""Conversations for tests of data."""

from data.conversations import parse_conversation
from tests.helpers.broken import messages


def conversation(*texts, name="", **fields):
    """A conversation of these texts, questions and answers in turn. `fields` are `image`, `video`,
    `source` and the like.
    """
    return parse_conversation({"id": name, "conversations": messages(*texts), **fields})
