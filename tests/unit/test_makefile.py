"""The Makefile quotes what it is given, and works in a folder of any name."""

import re
import shutil
import subprocess

import pytest

from tests.conftest import ROOT

HOSTILE = "a;touch X;$(touch X)`touch X` it's & my run"
"""A name that is several commands to a shell, and a function to make."""


@pytest.fixture
def project(tmp_path):
    """A folder with spaces in its path, the Makefile in it, and a Python that prints its arguments."""
    folder = tmp_path / "my project; here"
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nfor word; do printf '<%s>' \"$word\"; done\necho\n")
    python.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


def make(folder, *words, code=0, **variables):
    """What a real make prints. Everything that make would install counts as installed."""
    for stamp in (".done", ".done-demo", ".done-video", ".done-dev"):
        (folder / ".venv" / stamp).touch()
    arguments = [f"{name}={value}" for name, value in variables.items()]
    done = subprocess.run(
        ["make", "-C", str(folder), *words, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    # Nothing that a name holds was started.
    assert not list(folder.rglob("X")) and not (folder.parent / "X").exists()
    return done.stdout + done.stderr


def test_the_newest_run_may_have_any_name(project):
    run = project / "runs" / HOSTILE
    run.mkdir(parents=True)
    (run / "result.json").touch()
    assert f"<-m><scripts.demo.main><runs/{HOSTILE}>" in make(project, "demo")


def test_what_a_user_gives_is_one_word(project):
    printed = make(project, "export", RUN=f"runs/{HOSTILE}", TO=HOSTILE, ARGS="--out 'my folder'")
    assert f"<runs/{HOSTILE}><{HOSTILE}><--out><my folder>" in printed
    printed = make(project, "tune", MODEL="a;touch X", BUDGET="$(touch X)[4,8]")
    assert "<model=a;touch X><reducer.budget=$(touch X)[4,8]>" in printed


@pytest.mark.parametrize("extras", ["dev;touch X", "dev'", "dev:x", "../x"])
def test_extras_are_names(project, extras):
    assert "EXTRAS holds" in make(project, "setup", code=2, EXTRAS=extras)


def test_a_name_of_a_variable_is_no_command(project):
    assert "not a variable here" in make(project, "demo", "x;touch;X=1", code=2)


def test_no_command_depends_on_the_first_line_of_a_script():
    """It names the Python of .venv, which a path with a space would break in two."""
    started = re.findall(r"\$\(BIN\)/(\S+)", (ROOT / "Makefile").read_text())
    assert set(started) == {"python"}
