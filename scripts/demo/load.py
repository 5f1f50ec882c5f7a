"""Let many visitors use a demo at the same time, and count how many of them are served.

python -m scripts.demo.load http://127.0.0.1:7860 --clients 30

Each visitor uploads a picture of noise, and asks several questions about it. A visitor is *whole* if
all settings have answered all questions, and *refused* if the page has said that it is too busy.
Anything else is a failure, and ends the command with an error.
"""

import argparse
import io
import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
from PIL import Image

from train.cli import count, exit_on_user_error
from vzip import UserError

SIDE = 96
"""Side in pixels of the pictures that are uploaded."""
TIMEOUT = 600
"""Seconds that a visitor waits for one answer of the page."""
BUSY = 503
"""HTTP status of a request that is refused because the queue is full."""


class RefusedError(Exception):
    """The page has said that it is too busy."""


@dataclass
class Visitor:
    """A visitor of the page without a browser.

    Args:
        address: of the page.
    """

    address: str
    client: httpx.Client = field(init=False)
    session: str = field(init=False, default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        # A page on this machine is never behind the network's proxy.
        self.client = httpx.Client(base_url=self.address, timeout=TIMEOUT, trust_env=False)
        config = self._checked(self.client.get("/config")).json()
        self._functions: dict[str, int] = {}
        for event in config["dependencies"]:
            self._functions.setdefault(event["api_name"], event["id"])

        # Each setting has a table of timings. A page with only one budget has no slider.
        values = {str(part["props"].get("elem_id")): part["props"] for part in config["components"]}
        self.num_settings = sum(name.startswith("figures-") for name in values)
        self.budget = values.get("budget", {}).get("value")

    def _checked(self, response: httpx.Response) -> httpx.Response:
        """Return a response that is not an error."""
        if response.status_code == BUSY:
            raise RefusedError(response.text)
        response.raise_for_status()
        return response

    def upload(self, content: bytes, name: str = "picture.png") -> str:
        """Upload a file, and return its path on the server."""
        response = self.client.post("/gradio_api/upload", files={"files": (name, content)})
        path: str = self._checked(response).json()[0]
        return path

    def send(self, function: str, *inputs: Any, event_data: Any = None) -> str:
        """Begin an event of the page, and return its id."""
        request = {
            "fn_index": self._functions[function],
            "data": inputs,
            "event_data": event_data,
            "session_hash": self.session,
        }
        # In ASCII, so that text that is not valid can be sent too.
        response = self.client.post(
            "/gradio_api/queue/join",
            content=json.dumps(request),
            headers={"content-type": "application/json"},
        )
        event: str = self._checked(response).json()["event_id"]
        return event

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield what the page says, until all events have ended."""
        query = {"session_hash": self.session}
        with self.client.stream("GET", "/gradio_api/queue/data", params=query) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

    def call(self, function: str, *inputs: Any, event_data: Any = None) -> list[dict[str, Any]]:
        """Begin an event, and return all messages about it. The last one says whether it succeeded."""
        event = self.send(function, *inputs, event_data=event_data)
        return [message for message in self.messages() if message.get("event_id") == event]

    def choose(self, seed: int) -> bool:
        """Upload a picture. Returns whether the page shows its tokens."""
        noise = Image.frombytes("L", (SIDE, SIDE), os.urandom(SIDE * SIDE))
        file = io.BytesIO()
        noise.save(file, "PNG")
        path = self.upload(file.getvalue(), f"{seed}.png")
        return "visual tokens" in json.dumps(self.call("choose", {"path": path}, self.budget))

    def ask(self, question: str) -> int:
        """Ask a question, and count the settings that answered it to the end."""
        # A table of timings is sent when an answer is complete.
        tables = set()
        for message in self.call("ask", None, question, None, self.budget):
            for text in _all_texts(message):
                if text.startswith("| turn |"):
                    tables.add(text)
        return len(tables)


def _all_texts(value: Any) -> Iterator[str]:
    """Yield all texts in a message."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _all_texts(list(value.values()))
    elif isinstance(value, list):
        for part in value:
            yield from _all_texts(part)


def visit(address: str, seed: int, num_questions: int) -> str:
    """Have one conversation. Returns "whole", "refused", or what went wrong."""
    try:
        visitor = Visitor(address)
        if not visitor.choose(seed):
            return "failed: no tokens were shown"
        for number in range(1, num_questions + 1):
            num_answers = visitor.ask(f"Question {number} of visitor {seed}?")
            if num_answers != visitor.num_settings:
                return f"failed: {num_answers} of {visitor.num_settings} settings answered"
    except RefusedError:
        return "refused"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"failed: {type(error).__name__}: {error}"
    except (ValueError, KeyError) as error:
        return f"failed: this is not the page of a demo ({type(error).__name__}: {error})"
    return "whole"


def visit_at_once(address: str, num_clients: int, num_questions: int) -> Counter[str]:
    """Let visitors have their conversations at the same time, and count how these ended."""
    with ThreadPoolExecutor(num_clients) as threads:
        jobs = [threads.submit(visit, address, seed, num_questions) for seed in range(num_clients)]
        return Counter(job.result() for job in jobs)


def memory_of(pid: int | None) -> str:
    """Say how much memory a process has. A dash without a process."""
    if pid is None:
        return "–"
    try:
        return f"{psutil.Process(pid).memory_info().rss / 2**20:,.0f} MiB"
    except psutil.Error as error:
        raise UserError(f"--pid={pid}: {error}; give the process of the demo, or leave it out") from error


def parse_load_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("address", help="of the page, as the demo prints it")
    add("--clients", type=count, default=30, help="visitors at the same time")
    add("--questions", type=count, default=2, help="questions of each visitor")
    add("--pid", type=int, help="process of the demo, to see its memory before and after")
    return parser.parse_args()


@exit_on_user_error
def main() -> None:
    """Visit the page, and print a table."""
    arguments = parse_load_arguments()
    before = memory_of(arguments.pid)
    start = time.monotonic()
    outcomes = visit_at_once(arguments.address, arguments.clients, arguments.questions)
    seconds = time.monotonic() - start

    print("| clients | whole | refused | seconds | memory before | after |\n|--:|--:|--:|--:|--:|--:|")
    cells = [arguments.clients, outcomes.pop("whole", 0), outcomes.pop("refused", 0), f"{seconds:.1f}"]
    print("|", " | ".join(map(str, [*cells, before, memory_of(arguments.pid)])), "|")

    # What is left are failures.
    if outcomes:
        reasons = "\n".join(f"{number} times {reason}" for reason, number in outcomes.items())
        raise UserError(f"not every visitor was served or refused:\n{reasons}\nSee the demo's own output")


if __name__ == "__main__":
    main()
