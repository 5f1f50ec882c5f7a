"""A served model as one more setting of the page: its answers come from OpenAI's API."""

import base64
import http.client
import io
import json
import time
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from typing import Any

from PIL import Image

from scripts.serve.request import chat_body
from scripts.serve.server import read_page
from vzip import UserError
from vzip.chat import Answer

SERVED = "served"
"""Name of the setting."""

SECONDS = 300
"""Most seconds without anything new of an answer."""


class ServedModel:
    """A model that a server answers for, such as that of `make serve`.

    Args:
        address: such as http://127.0.0.1:8000.

    Attributes:
        name: the model's name in requests.

    Raises:
        UserError: no server answers there, or it serves no model.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/").removesuffix("/v1")
        if not self.address.startswith("http://"):
            raise UserError(f"--served {address} must begin with http://, such as http://127.0.0.1:8000")
        try:
            self.name = str(json.loads(read_page(self.address, "/v1/models") or "")["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"--served {address}: no server of OpenAI's API answers there; start one with `make serve`, "
                f"and give the address that it prints"
            ) from error

    def ask(
        self, picture: Image.Image, turns: Sequence[tuple[str, str]], question: str, *, max_new: int
    ) -> Iterator[Answer]:
        """Yield the answer to a question as it grows.

        Args:
            picture: what the conversation is about.
            turns: the questions and answers before.
            question: the new one.
            max_new: most tokens of the answer.

        Raises:
            UserError: the server refuses the question, or has gone.
        """
        body = json.dumps(self._body(picture, turns, question, max_new))
        connection = http.client.HTTPConnection(self.address.removeprefix("http://"), timeout=SECONDS)
        start = time.perf_counter()
        try:
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != HTTPStatus.OK:
                raise UserError(f"The server refuses: {response.read(1000).decode(errors='replace')}")
            yield from self._read(response, start)
        except UserError:
            # UserError is a ValueError too, but this one already says what the server answered.
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UserError(f"The server at {self.address} does not answer: {error}") from error
        finally:
            # A visitor who has left ends the answer in the server too.
            connection.close()

    def _body(
        self, picture: Image.Image, turns: Sequence[tuple[str, str]], question: str, max_new: int
    ) -> dict[str, Any]:
        """Make the request. The picture stands in front of the first question."""
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        first = turns[0][0] if turns else question
        settings = {
            "max_tokens": max_new,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body: dict[str, Any] = chat_body(
            self.name, first, base64.b64encode(buffer.getvalue()).decode(), **settings
        )

        # Then come the answers, each with the question after it.
        questions = [asked for asked, _ in turns[1:]] + [question]
        for (_, answer), after in zip(turns, questions, strict=False):
            body["messages"].append({"role": "assistant", "content": answer})
            body["messages"].append({"role": "user", "content": after})
        return body

    def _read(self, response: http.client.HTTPResponse, start: float) -> Iterator[Answer]:
        """Yield the answer after each event of a stream."""
        text = ""
        first: float | None = None
        usage: dict[str, int] = {}
        for line in response:
            event = line.decode().strip().removeprefix("data: ")
            if not event.startswith("{"):
                continue
            content = json.loads(event)
            if content.get("error"):
                raise UserError(f"The server ended the answer: {content['error']}")
            usage = content.get("usage") or usage
            for choice in content.get("choices", []):
                text += choice["delta"].get("content") or ""
            now = time.perf_counter()
            first = now if first is None else first

            # The last event counts the tokens.
            num_new = usage.get("completion_tokens", 0)
            yield Answer(
                text=text.strip(),
                num_visual_tokens=0,
                num_prompt_tokens=usage.get("prompt_tokens", 0),
                num_cached_tokens=0,
                seconds_to_first_token=first - start,
                tokens_per_second=(num_new - 1) / (now - first) if num_new > 1 and now > first else None,
                cache_bytes=0,
            )
