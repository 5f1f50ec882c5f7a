"""The commands of the README run, on less: their settings stay, steps and questions are cut."""

import re
import shlex

import pytest

from tests.conftest import ROOT
from tests.helpers.commands import start, tune

pytestmark = pytest.mark.integration

README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line
]
COMMANDS = list(dict.fromkeys(line.split("#")[0].strip() for line in LINES))

SHORT = ["optim.max_steps=1", "evaluate.questions=4", "track=none"]
RECIPE = ("tune", "data", "data-check", "cache")


def shortened(command, runs, overrides):
    """The words of the command, with its placeholders filled in and as little to do as possible."""
    words = shlex.split(command)
    extra = [*SHORT, f"runs={runs}"]

    if "llava-7b" in command:
        # The tiny model takes the place of the real one. What the command sets itself comes last, and wins.
        own = "data." if "DATA.json" in command else "reducer.budget"
        extra += [item for item in overrides if not item.startswith(("model=", "optim.max_steps=", own))]
        extra += ["reducer.budget=6"]

        for placeholder, name in {"DATA.json": "data.path", "IMAGES": "data.image_folder"}.items():
            value = next(item.split("=", 1)[1] for item in overrides if item.startswith(f"{name}="))
            words = [word.replace(placeholder, value) for word in words]

    if "+exp=next" in command:
        extra += ["model=next-tiny", "reducer.budget=40"]

    if words[0] != "make":
        return [*words, *extra]
    if words[1] not in RECIPE:
        return ["make", "--dry-run", *words[1:]]  # their own tests run them; `make test` can't run itself

    settings = [word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")]
    others = [word for word in words if not word.startswith("ARGS=")]
    return [*others, "ARGS=" + " ".join([*settings, *extra])]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command, tmp_path, overrides):
    done = start(shortened(command, tmp_path / "runs", overrides))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_python_of_the_readme_runs(tmp_path, overrides, tiny_folder):
    tune([*overrides, *SHORT, f"runs={tmp_path}", "name=my-run"])

    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for there, here in {
        "runs/my-run": f"{tmp_path}/my-run",
        "llava-hf/llava-1.5-7b-hf": str(tiny_folder),
        "budget=64": "budget=6",
    }.items():
        assert there in code
        code = code.replace(there, here)

    names = {}
    exec(code, names)
    assert names["handle"].num_image_tokens() == 6
    assert not names["handle"].attached


def test_the_two_commands_come_first():
    assert [command for command in COMMANDS if "figures" not in command][:2] == ["make tune", "make test"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tune", "model=llava-7b"], "the model is MODEL=..."),
        (["tune", "optim.lr=1e-4"], 'other settings go into ARGS="optim.lr=..."'),
        (["bench", "MODEL=llava-7b"], "`make bench` takes RUN=... or ARGS"),
    ],
)
def test_make_refuses_what_it_would_pass_over(arguments, words):
    done = start(["make", "--dry-run", *arguments])
    assert done.returncode == 2
    assert words in done.stderr
    assert not done.stdout


def test_make_help_lists_every_target_and_takes_variables_of_the_environment():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    done = start(["make", "help", "VZIP_DATA=/tmp", "http_proxy="])
    assert done.returncode == 0
    assert {line.split()[0] for line in done.stdout.splitlines()} == targets
