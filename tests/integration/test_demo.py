"""The demo as a person uses it: the command, and its page in a real browser."""

import json
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

from scripts.demo.load import Visitor
from tests.conftest import ROOT
from tests.helpers import tiny
from tests.helpers.commands import environment
from tests.helpers.runs import attached, held_out_answer, save_run, tune
from vzip.templates.encode import vicuna

pytestmark = pytest.mark.integration

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-sync",
    "disable-background-networking",
    "disable-component-update",
)
SETTINGS = ("full", "free", "tuned")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder):
    """A finished run that was evaluated with one picture."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    save_run(folder, tune(attached(tiny_folder)), tiny_folder, template=asdict(vicuna("s ")))

    tiny.picture(5).save(folder / "example.png")
    answers = [held_out_answer("example.png", "<image>\nwhat is shown?")]
    (folder / "answers_full.json").write_text(json.dumps(answers))
    (folder / "config.yaml").write_text(f"data: {{image_folder: '{folder}'}}\n")
    (folder / "result.json").write_text("{}")
    return folder


def start_demo(run, max_new_tokens):
    """Start the command on a machine with a proxy that does not answer."""
    arguments = [str(run), "--port", "0", "--max-new-tokens", str(max_new_tokens)]
    proxy = "http://127.0.0.1:9"
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.demo.main", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(OMP_NUM_THREADS="1", HTTP_PROXY=proxy, HTTPS_PROXY=proxy),
        # Background jobs of a shell ignore Ctrl-C, and so does what they start.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


@contextmanager
def served(run, max_new_tokens=8):
    """The address of the page, while the command runs. Ctrl-C ends it without an error."""
    with start_demo(run, max_new_tokens) as process:
        printed = ""
        try:
            for line in process.stdout:
                printed += line
                if address := re.search(r"the page: (http://127\.0\.0\.1:\d+)", line):
                    yield address[1]
                    break
            else:
                pytest.fail(printed)
        finally:
            process.send_signal(signal.SIGINT)
        after = process.stdout.read()
    assert (process.returncode, after) == (0, ""), printed + after


@pytest.fixture(scope="module")
def address(run):
    """The address of the page."""
    with served(run) as address:
        yield address


@pytest.fixture(scope="module")
def requests():
    """Addresses that the page has asked for."""
    return []


@pytest.fixture(scope="module")
def page(address, requests):
    """The page in Chromium."""
    if CHROMIUM is None:
        pytest.skip("needs chromium: `apt-get install chromium`")

    with sync_playwright() as playwright:
        flags = [f"--{flag}" for flag in FLAGS]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = chromium.new_page(viewport={"width": 1280, "height": 1200})
        page.on("request", lambda request: requests.append(request.url))
        page.set_default_timeout(20_000)
        expect.set_options(timeout=20_000)
        page.goto(address)
        yield page
        chromium.close()


def drawings(page):
    return page.locator(".drawing img")


def first_drawing(page):
    return drawings(page).first.get_attribute("src")


def ask(page, question):
    page.locator("#question textarea").fill(question)
    page.keyboard.press("Enter")


def upload(page, folder, seed):
    """Upload a picture, and wait for its tokens."""
    before = first_drawing(page) if drawings(page).count() else ""
    tiny.picture(seed).save(folder / "noise.png")
    page.locator("#picture input[type=file]").set_input_files(folder / "noise.png")
    expect(drawings(page).first).not_to_have_attribute("src", before)
    expect(drawings(page)).to_have_count(3)


def figures(page, setting, turn):
    """(tokens computed, tokens of the conversation) of a turn, once its answer is complete."""
    line = page.locator(f"#figures-{setting} tbody tr").nth(turn - 1)
    expect(line).to_be_visible()
    return tuple(int(count) for count in line.locator("td").nth(3).inner_text().split(" of "))


def test_the_page_opens_with_an_example(page):
    expect(page.locator("#summary")).to_contain_text("16 → 6 visual tokens")
    expect(drawings(page)).to_have_count(3)
    expect(page.locator("#question textarea")).to_have_value("what is shown?")
    expect(page.locator("#title-full")).to_contain_text("16 visual tokens, base projector")

    page.locator("#picture button[aria-label='Remove Image']").click()
    expect(drawings(page)).to_have_count(0)
    ask(page, "what?")
    expect(page.locator("#hint")).to_contain_text("Choose a picture first")


def test_a_second_question_computes_only_what_is_new(page, tmp_path):
    upload(page, tmp_path, seed=1)
    ask(page, "what is it?")
    for setting in SETTINGS:
        num_computed, num_tokens = figures(page, setting, 1)
        assert num_computed == num_tokens

    ask(page, "and <b>why</b>?")
    for setting in SETTINGS:
        expect(page.locator(f"#answers-{setting}")).to_contain_text("and <b>why</b>?")
        num_computed, num_tokens = figures(page, setting, 2)
        assert 0 < num_computed < num_tokens
        answers = page.locator(f"#answers-{setting} [data-testid=bot]").all_inner_texts()
        assert len(answers) == 2 and all(answers) and "…" not in answers
    page.screenshot(path=tmp_path / "answers.png", full_page=True)


def test_another_budget_keeps_other_tokens_and_closes_the_tuned_setting(page, tmp_path):
    upload(page, tmp_path, seed=2)
    before = first_drawing(page)
    page.locator("#budget input[type=number]").fill("9")
    page.keyboard.press("Tab")
    expect(page.locator("#summary")).to_contain_text("16 → 9 visual tokens")
    closed = "for a budget of 6 alone; move the slider there"
    expect(page.locator("#title-tuned")).to_contain_text(closed)
    assert first_drawing(page) != before

    ask(page, "what?")
    figures(page, "free", 1)
    assert page.locator("#figures-tuned tbody tr").count() == 0


def test_a_file_that_is_not_a_picture_is_refused_and_the_page_fits_a_phone(page, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    page.locator("#picture input[type=file]").set_input_files(tmp_path / "text.png")
    message = "This file is not a picture that can be read"
    expect(page.locator("#message")).to_contain_text(message)
    expect(drawings(page)).to_have_count(0)

    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.screenshot(path=tmp_path / "phone.png", full_page=True)
    assert Image.open(tmp_path / "phone.png").width == 390


def test_the_page_loads_nothing_from_other_hosts(page, address, requests):
    assert requests
    assert all(request.startswith((address, "data:", "blob:")) for request in requests), requests

    # The browser is told to refuse other hosts, even this machine under another name.
    elsewhere = address.replace("127.0.0.1", "localhost")
    fetch = "url => fetch(url, {mode: 'no-cors'}).then(() => 'loaded', () => 'refused')"
    assert page.evaluate(fetch, address) == "loaded"
    assert page.evaluate(fetch, elsewhere) == "refused"


def test_ctrl_c_ends_the_command_also_while_it_answers(run):
    with served(run, max_new_tokens=1_500) as address:
        visitors = [Visitor(address) for _ in range(3)]
        for visitor in visitors:
            assert visitor.choose(1)
            visitor.send("ask", None, "what?", None, visitor.budget)
        growing = visitors[0].messages()
        while next(growing)["msg"] != "process_generating":
            pass
