"""A finished run and a command line, for the tests of several scripts."""

import shutil
import sys
from dataclasses import asdict

import pytest

from tests.helpers.runs import attached, save_run, tune
from vzip.templates.encode import vicuna


@pytest.fixture(scope="session")
def tuned_run(tmp_path_factory, tiny_folder):
    """A finished run with a budget of 6, without config.yaml. Tests share it, and must not change it."""
    # The model reads bytes: behind a long system prompt, every question would have the same answer.
    template = asdict(vicuna("s "))
    folder = tmp_path_factory.mktemp("runs") / "run"
    return save_run(folder, tune(attached(tiny_folder)), tiny_folder, template=template)


@pytest.fixture
def run(tuned_run, tmp_path):
    """A copy of `tuned_run`, which a test may change."""
    return shutil.copytree(tuned_run, tmp_path / "finished" / "run")


@pytest.fixture
def call(monkeypatch, capsys):
    """Call a script's main function with the words of a command line, in this process. Returns what it
    prints.
    """

    def start(main, *words):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
        getattr(main, "__wrapped__", main)()
        return capsys.readouterr().out

    return start
