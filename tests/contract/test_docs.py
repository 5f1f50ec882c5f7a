"""README and docs name only what is there: links, paths, make targets, settings. The commands run in
test_readme.py.
"""

import re
import shlex

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

import vzip
from tests.conftest import ROOT
from tests.helpers import tiny
from tests.helpers.configs import composed

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}

ROOMS = ("configs/", "data/", "docs/", "scripts/", "tests/", "train/", "vzip/")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
TUNING = {"tune", "data", "data-check", "cache"}

PLACEHOLDERS = {"NAME", "KEY", "HASH", "FOLDER", "my-run", "stride"}
"""Words that stand for a name of the reader's."""

STARTERS = ("make ", "python ", "deepspeed ", "srun ", "pip ", "wandb ", ".venv")
"""What the commands of a page begin with; other lines of its blocks are trees and output."""

NOT_SETTINGS = {"pretrained", "row", "budget", "dominant", "contextual", "name"}
"""Names before a `=` that belong to lmms-eval or to Python, not to the recipe."""


def code_spans(text):
    """The `code` of a page, without its blocks."""
    without_blocks = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.findall(r"`([^`\n]+)`", without_blocks)


def command_lines(text, language="sh|text"):
    """The lines of a page's blocks of commands, without their comments."""
    for block in re.findall(rf"```(?:{language})\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            command = line.split("#")[0].strip()
            if command.startswith(STARTERS):
                yield command


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def overrides_of(command):
    """The settings that a command gives to the recipe; None if it starts something else."""
    words = shlex.split(command)

    if words[0] == "make":
        if words[1] not in TUNING:
            return None
        variables = dict(word.split("=", 1) for word in words[2:])
        overrides = shlex.split(variables.get("ARGS", ""))
        if "MODEL" in variables:
            overrides.append(f"model={variables['MODEL']}")
        if "BUDGET" in variables:
            overrides.append(f"reducer.budget={variables['BUDGET']}")
        return overrides

    if "train/tune.py" not in words:
        return None
    given = words[words.index("train/tune.py") + 1 :]
    return [word for word in given if not word.startswith("-")]


def test_links_lead_somewhere():
    broken = []
    for page, text in TEXTS.items():
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
            path = (ROOT / page).parent / target if target else ROOT / page
            if not path.exists():
                broken.append(f"{page}: {target}")
            elif anchor and anchor not in anchors(path.read_text(encoding="utf-8")):
                broken.append(f"{page}: {target}#{anchor}")

    assert broken == []


def test_paths_exist():
    broken = []
    for page, text in TEXTS.items():
        for span in code_spans(text):
            path = span.split(":")[0]
            # `train/loss` is a metric: a path ends with a suffix or with a slash.
            is_path = path.startswith(ROOMS) and bool(re.search(r"(\.\w+|/|\*)$", path))
            if not is_path or any(word in path for word in PLACEHOLDERS):
                continue
            if not list(ROOT.glob(path.rstrip("/"))):
                broken.append(f"{page}: {path}")

    assert broken == []


def test_make_commands_have_targets():
    broken = []
    for page, text in TEXTS.items():
        spans = [span for span in code_spans(text) if span.startswith("make ")]
        for command in [*spans, *command_lines(text)]:
            words = shlex.split(command)
            if words[0] != "make" or len(words) == 1:
                continue
            variables = {word.split("=", 1)[0] for word in words[2:]}
            known = {"MODEL", "BUDGET", "ARGS", "RUN", "TO", "EXTRAS"}
            if words[1] not in TARGETS or not variables <= known:
                broken.append(f"{page}: {command}")

    assert broken == []


@pytest.mark.parametrize("page", TEXTS)
def test_commands_give_settings_that_exist(page):
    text = TEXTS[page]
    spans = [
        span for span in code_spans(text) if span.startswith(("make ", "python train", "deepspeed train"))
    ]
    for command in [*spans, *command_lines(text)]:
        overrides = overrides_of(command) or []
        # A sweep's values are composed one by one.
        single = [re.sub(r"^(\+?[\w.]+=[^\[,]+),.*", r"\1", override) for override in overrides]
        if single and not any(word in " ".join(single) for word in PLACEHOLDERS | {"S", "D", "B", "C"}):
            composed(*single)


@pytest.mark.parametrize("page", TEXTS)
def test_settings_exist(page):
    for span in code_spans(TEXTS[page]):
        match = re.fullmatch(r"([a-z_]+(?:\.[a-z_]+)*)=([\w.\[\],-]+)", span)
        if not match or match[1] in NOT_SETTINGS or any(word in match[2] for word in PLACEHOLDERS):
            continue

        # The settings of a real model are all there is; a model is one itself.
        composed(span) if match[1] == "model" else composed("model=llava-7b", span)


def test_the_reducer_that_docs_show_works(tiny_folder):
    (code,) = re.findall(r"```python\n(.*?)```", TEXTS["docs/extending.md"], re.DOTALL)
    names = {}
    exec(code, names)

    model = LlavaForConditionalGeneration.from_pretrained(tiny_folder)
    pixel_values = torch.rand(2, 3, 56, 56)
    with vzip.attach(model, reducer=names["Stride"](budget=5)) as handle:
        assert handle.num_image_tokens() == 5
        features = model.model.get_image_features(pixel_values).pooler_output
        assert [len(image) for image in features] == [5, 5]


def test_the_example_of_stored_features_answers_as_the_model_does(tiny_folder):
    (code,) = re.findall(r"```python\n(.*?)```", TEXTS["docs/serving.md"], re.DOTALL)
    names = {}
    exec(code, names)

    model = LlavaForConditionalGeneration.from_pretrained(tiny_folder)
    processor = AutoProcessor.from_pretrained(tiny_folder)
    picture = tiny.picture(1, 60, 90)
    settings = {"max_new_tokens": 6, "do_sample": False}
    with vzip.attach(model, dominant=4, contextual=2) as handle:
        features = names["encode"](handle, processor, picture)
        for question in ("<image>what is it?", "<image>where?"):
            inputs = handle.processor(processor)(images=picture, text=question, return_tensors="pt")
            answer = names["ask"](handle, processor, features, question, **settings)
            assert torch.equal(answer, model.generate(**inputs, **settings))
