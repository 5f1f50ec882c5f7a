"""A served model lives through what clients do: many at once, one that leaves, bad pictures and budgets."""

import base64
import http.client
import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from scripts.serve.server import ServerError, serving
from tests.helpers import tiny
from tests.serve.models import save_export

TEMPLATE = (
    "{% for m in messages %}{% for part in m.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}"
    "{% endfor %}{% endfor %}"
)
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--block-size", "32"]
NUM_CLIENTS = 32


def data_url(content):
    return "data:image/png;base64," + base64.b64encode(content).decode()


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def body(server, text, *pictures, **more):
    """A request of OpenAI's chat API."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    settings = {"max_tokens": 8, "min_tokens": 8, "temperature": 0, "ignore_eos": True}
    return {"model": server.model, "messages": [message], "chat_template": TEMPLATE, **settings, **more}


def post(server, content):
    """Send a request; returns the open connection and its response."""
    address = urlsplit(server.address)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=300)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(content), headers)
    return connection, connection.getresponse()


def ask(server, text, *pictures, **more):
    """Return the status and the content of an answer."""
    connection, response = post(server, body(server, text, *pictures, **more))
    content = json.loads(response.read())
    connection.close()
    return response.status, content


def text_of(answer):
    status, content = answer
    assert status == 200, content
    return content["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_export(tmp_path_factory.mktemp("served"), "clip", (4, 2), (8, 3))


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "serve.log"
    options = [*OPTIONS, "--trust-request-chat-template"]
    with serving(sys.executable, folder, model="tiny", log=log, options=options) as running:
        yield running
    assert running.process.poll() is not None


def test_many_clients_at_once_one_of_whom_leaves(server):
    alone = [text_of(ask(server, f"question {n}", png(tiny.picture(n)))) for n in range(4)]
    assert len(set(alone)) > 1

    # A client that leaves in the middle of its answer.
    connection, response = post(server, body(server, "leave", png(tiny.picture(9)), stream=True))
    assert response.readline().startswith(b"data: ")
    connection.close()

    def question(number):
        return text_of(ask(server, f"question {number % 4}", png(tiny.picture(number % 4))))

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        answers = list(pool.map(question, range(NUM_CLIENTS)))
    assert answers == [alone[number % 4] for number in range(NUM_CLIENTS)]


def test_streaming_and_budgets(server):
    picture = png(tiny.picture(1))
    counts = {}
    for budget in (6, 11):
        settings = {"mm_processor_kwargs": {"budget": budget}}
        status, content = ask(server, "what?", picture, **settings)
        assert status == 200, content
        counts[budget] = content["usage"]["prompt_tokens"]
        whole = text_of((status, content))

        connection, response = post(server, body(server, "what?", picture, stream=True, **settings))
        parts = []
        for line in response.read().decode().splitlines():
            if line.startswith("data: {"):
                parts.append(json.loads(line[6:])["choices"][0]["delta"].get("content") or "")
        connection.close()
        assert "".join(parts) == whole
    assert counts[11] - counts[6] == 5


@pytest.mark.parametrize(
    ("content", "settings", "words"),
    [
        (png(tiny.picture(1)), {"mm_processor_kwargs": {"budget": 7}}, "budget=7 was not tuned"),
        (png(tiny.picture(1)), {"mm_processor_kwargs": {"budget": "6"}}, "budget='6' was not tuned"),
        (png(tiny.picture(1)), {"mm_processor_kwargs": {"size": {"height": 99999}}}, "size can't be set"),
        (b"this is no picture", {}, "image"),
        (png(tiny.picture(1))[:60], {}, "image"),
    ],
)
def test_bad_requests_are_refused_and_the_server_lives_on(server, content, settings, words):
    status, answer = ask(server, "what?", content, **settings)
    assert 400 <= status < 500, answer
    assert words in json.dumps(answer)
    text_of(ask(server, "what?", png(tiny.picture(1))))


def test_a_folder_that_can_not_be_served_is_refused_at_the_start(folder, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        if file.name != "config.json":
            (broken / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    config["vzip"]["format"] = 2
    (broken / "config.json").write_text(json.dumps(config))

    log = tmp_path / "serve.log"
    with pytest.raises(ServerError), serving(sys.executable, broken, model="x", log=log, options=OPTIONS):
        pass
    assert "vzip.format=2 is unknown" in log.read_text()
