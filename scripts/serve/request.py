"""A request to a served model that can be copied into a terminal."""

import json
from collections.abc import Sequence
from shlex import quote

from scripts.serve.server import Server

DATA_URL = "data:image/png;base64,"
"""What a picture begins with in a request."""


def chat_body(model: str, question: str, picture: str, **settings: object) -> dict[str, object]:
    """Make a request of OpenAI's chat API: a question about a picture in base64."""
    content = [
        {"type": "image_url", "image_url": {"url": f"{DATA_URL}{picture}"}},
        {"type": "text", "text": question},
    ]
    return {"messages": [{"role": "user", "content": content}], "model": model, **settings}


def example_request(server: Server, budgets: Sequence[int]) -> str:
    """Write a command of bash that asks about the file PICTURE.png."""
    settings: dict[str, object] = {"max_tokens": 64}
    if len(budgets) > 1:
        settings["mm_processor_kwargs"] = {"budget": budgets[-1]}
    body = json.dumps(chat_body(server.model, "What is in the picture?", "", **settings))

    # The picture goes through a pipe: it is longer than an argument of a command may be.
    before, url, after = body.partition(DATA_URL)
    picture = f"printf %s {quote(before + url)}; base64 -w0 PICTURE.png; printf %s {quote(after)}"
    curl = f"curl {server.address}/v1/chat/completions -H 'Content-Type: application/json' -d @-"
    return f"({picture}) |\n  {curl}"
