"""The demo as a person uses it: the command, and its page in a real browser."""

import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial

import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from tests.conftest import ROOT
from tests.helpers import tiny
from tests.helpers.commands import environment
from tests.helpers.runs import attached, save_run, tune
from vzip.templates.encode import vicuna

pytestmark = pytest.mark.integration

CHROMIUM = shutil.which("chromium")
FLAGS = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"]
FLAGS += ["disable-background-networking", "disable-component-update"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("demo") / "run"
    return save_run(folder, tune(attached(tiny_folder)), tiny_folder, template=asdict(vicuna("s ")))


def demo(run, port):
    """The command, on a machine with a proxy, which is not there."""
    command = [
        sys.executable,
        "-m",
        "scripts.demo.main",
        str(run),
        "--port",
        str(port),
        "--max-new-tokens",
        "8",
    ]
    proxied = environment(
        OMP_NUM_THREADS="1", HTTP_PROXY="http://127.0.0.1:9", HTTPS_PROXY="http://127.0.0.1:9"
    )
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": proxied}
    heed = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # which a shell's background jobs ignore, and what they start
    return subprocess.Popen(command, cwd=ROOT, preexec_fn=heed, **settings)


@contextmanager
def served(run):
    """The address of the page, while the command runs."""
    with demo(run, 0) as process:
        said = ""
        try:
            for line in process.stdout:
                said += line
                if found := re.search(r"the page: (http://127\.0\.0\.1:\d+)", line):
                    yield found[1]
                    break
            else:
                pytest.fail(said)
        finally:
            process.send_signal(signal.SIGINT)
        said += process.stdout.read()
    assert process.returncode == 0 and "Traceback" not in said, said


@contextmanager
def browser(address, requests):
    """The page in Chromium; `requests` collects the addresses that it asks for."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in FLAGS])
        page = chromium.new_page(viewport={"width": 1280, "height": 1200})
        page.on("request", lambda request: requests.append(request.url))
        page.set_default_timeout(20_000)
        expect.set_options(timeout=20_000)
        page.goto(address)
        yield page
        chromium.close()


def ask(page, question):
    page.locator("#question textarea").fill(question)
    page.keyboard.press("Enter")


def figures(page, row, turn):
    """(tokens run, tokens of the conversation) of a turn, once it is there."""
    line = page.locator(f"#figures-{row} tbody tr").nth(turn - 1)
    expect(line).to_be_visible()
    return tuple(int(count) for count in line.locator("td").nth(3).inner_text().split(" of "))


@pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed: `apt-get install chromium` to try the page"
)
def test_a_person_uploads_a_picture_asks_twice_and_moves_the_budget(run, tmp_path):
    tiny.picture(1).save(tmp_path / "noise.png")
    (tmp_path / "text.png").write_text("no picture")
    requests = []
    with served(run) as address, browser(address, requests) as page:
        second = demo(run, address.rpartition(":")[2])
        summary, upload = page.locator("#summary"), page.locator("#picture input[type=file]")
        ask(page, "what?")
        expect(page.locator("#hint")).to_contain_text("Choose a picture first")

        upload.set_input_files(tmp_path / "noise.png")
        expect(summary).to_contain_text("16 → 6 visual tokens")
        expect(page.locator(".drawing img")).to_have_count(3)
        expect(page.locator("#title-full")).to_contain_text("16 visual tokens, base projector")
        kept = page.locator(".drawing img").first.get_attribute("src")

        ask(page, "what is it?")
        for row in ("full", "free", "tuned"):
            ran, total = figures(page, row, 1)
            assert ran == total
        ask(page, "and <b>why</b>?")
        for row in ("full", "free", "tuned"):
            expect(page.locator(f"#answers-{row}")).to_contain_text("and <b>why</b>?")
            ran, total = figures(page, row, 2)
            assert 0 < ran < total
            answers = page.locator(f"#answers-{row} [data-testid=bot]").all_inner_texts()
            assert len(answers) == 2 and all(answers) and "…" not in answers
        page.screenshot(path=tmp_path / "answers.png", full_page=True)

        page.locator("#budget input[type=number]").fill("9")
        page.keyboard.press("Tab")
        expect(summary).to_contain_text("16 → 9 visual tokens")
        expect(page.locator("#title-tuned")).to_contain_text("for a budget of 6 alone; move the slider there")
        assert page.locator(".drawing img").first.get_attribute("src") != kept
        ask(page, "what?")
        figures(page, "free", 1)
        assert page.locator("#figures-tuned tbody tr").count() == 0

        upload.set_input_files(tmp_path / "text.png")
        expect(page.locator("#message")).to_contain_text("This file is no picture that can be read")
        expect(page.locator(".drawing img")).to_have_count(0)
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.screenshot(path=tmp_path / "phone.png", full_page=True)

        assert requests and all(request.startswith((address, "data:", "blob:")) for request in requests), (
            requests
        )
        elsewhere = address.replace("127.0.0.1", "localhost")
        fetched = "url => fetch(url, {mode: 'no-cors'}).then(() => 'loaded', () => 'refused')"
        assert page.evaluate(fetched, address) == "loaded" and page.evaluate(fetched, elsewhere) == "refused"

        with second as busy:
            assert re.search(r"^error: .*--port=\d+ can't be opened", busy.stdout.read(), re.MULTILINE)
        assert busy.returncode == 2
    assert Image.open(tmp_path / "phone.png").width == 390
